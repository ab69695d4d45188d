"""What predictions cost: which tokens count, with what weight and smoothing, and what a mixture of experts adds.

Who predicts whom is said where a batch is made: `shift_labels` holds the token that each position predicts, and
`loss_weights` beside them what its cost is multiplied by. Labels that come alone lie at their tokens' own positions, as
their weights do, and only those are shifted here. The model, the Trainer and the evaluation all ask this file. It
travels with every checkpoint.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig


IGNORE = -100
"""What stands where nothing is predicted."""


def targets_of(
    labels: torch.Tensor | None, loss_weights: torch.Tensor | None = None, shift_labels: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    What each position predicts, and what its cost is multiplied by; both `(batch, tokens)`, or `None` where not given.

    Args:
        labels: the token at each position; of no account where `shift_labels` are given.
        loss_weights: of `shift_labels` where they are given, else of `labels`.
        shift_labels: the token that each position predicts.
    """
    if shift_labels is not None or labels is None:
        return shift_labels, loss_weights
    if loss_weights is not None:
        loss_weights = nn.functional.pad(loss_weights, (0, 1))[..., 1:]
    return nn.functional.pad(labels, (0, 1), value=IGNORE)[..., 1:], loss_weights


def token_costs(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """
    The cost of each prediction, `(predictions,)`; 0 where the target is `IGNORE`.

    Args:
        logits: `(..., vocab)`.
        targets, weights: `(...)`.
        smoothing: share of each target that is spread over the vocabulary (https://arxiv.org/abs/1512.00567).
    """
    targets = targets.flatten().to(logits.device)
    costs = nn.functional.cross_entropy(
        logits.float().flatten(0, -2), targets, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )
    return costs if weights is None else costs * weights.flatten().to(logits.device)


def mean_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    count: torch.Tensor | int | None = None,
    smoothing: float = 0.0,
    balance: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The sum of what predictions cost over their number; 0 with a graph where there is none.

    Args:
        logits, targets, weights, smoothing: see `token_costs`; the number stays that of targets whatever they weigh.
        count: supervised tokens of the whole optimiser step, where these are not all.
        balance: what a mixture of experts adds, by the share that these tokens are of the optimiser step.
    """
    supervised = (targets != IGNORE).sum().to(logits.device)
    count = torch.as_tensor(supervised if count is None else count, device=logits.device).clamp(min=1)
    if weights is None:  # summed in one pass
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, -2),
            targets.flatten().to(logits.device),
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=smoothing,
        )
    else:
        total = token_costs(logits, targets, weights, smoothing).sum()
    loss = total / count
    return loss if balance is None else loss + balance * supervised / count


def balance_loss(
    router_logits: tuple[torch.Tensor, ...], config: PreTrainedConfig, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """What a mixture of experts adds so that all of its experts are used (https://arxiv.org/abs/2101.03961, eq. 4)."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # which the other families copy

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, mask)


def zero_of(parameters: Iterable[nn.Parameter]) -> torch.Tensor | float:
    """A 0 that all of these which learn have a gradient of: in a distributed run every process waits for theirs."""
    return 0.0 * sum(parameter.sum() for parameter in parameters if parameter.requires_grad)


__all__ = ["IGNORE", "balance_loss", "mean_loss", "targets_of", "token_costs", "zero_of"]
