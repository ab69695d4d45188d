"""Training both stages: arguments, tuning policy, trainer, evaluation, model card."""

import logging


# It says on import, on every CPU, that a faster kernel could be fetched.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
