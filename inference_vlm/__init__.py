"""Using a trained model."""

import logging


# It says on import, on every CPU, that a faster kernel could be fetched; and at each layer and step, that products in
# 8 bit begin from 16 bits.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)
