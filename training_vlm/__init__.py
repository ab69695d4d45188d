"""Training both stages: arguments, tuning policy, trainer, evaluation, model card."""
