"""What a run may leave out because it cannot change the result: the settings of every saving."""

from dataclasses import dataclass


@dataclass
class EfficiencyArguments:
    """What is saved of a step's work; losses and gradients stay what they are."""
