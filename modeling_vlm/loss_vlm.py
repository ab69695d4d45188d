"""What predictions cost: which tokens count, with what weight and smoothing, and what a mixture of experts adds.

Who predicts whom is said where a batch is made: `shift_labels` holds the token that each position predicts, and
`loss_weights` beside them what its cost is multiplied by. Labels that come alone lie at their tokens' own positions, as
their weights do, and only those are shifted here. The model, the Trainer and the evaluation all ask this file. Where
nobody reads the logits they are made for a part of the predictions at a time, and so are their gradients: logits of a
large vocabulary are never there whole. A head that does more than its product when it is called, or whose weight is
there only then, is called once, and autograd keeps its logits. The file travels with every checkpoint.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig

from .backbones_vlm import scale_logits
from .model_error_vlm import DuetError


IGNORE = -100
"""What stands where nothing is predicted."""

LOGITS_AT_A_TIME = {"cpu": 2**23}
LOGITS_AT_A_TIME_ELSEWHERE = 2**26


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


def keep_positions(states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """`(batch, tokens, ...)` at the positions that `logits_to_keep` names; a bool mask gives `(kept, ...)`."""
    if isinstance(keep, torch.Tensor) and keep.dtype == torch.bool and keep.ndim == 2:
        return states[keep]
    return states[:, slice(-keep, None) if isinstance(keep, int) else keep]


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
    return with_balance(total / share_of(targets, count, logits.device), targets, count, balance)


def loss_in_parts(
    head: nn.Module,
    config: PreTrainedConfig,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    count: torch.Tensor | int | None = None,
    smoothing: float = 0.0,
    balance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `mean_loss` without the logits: those of a part of the predictions are made, turned into gradients and left.

    Args:
        head: gives logits; where it has hooks, or a weight that is gathered for a call, it is called once for all.
        config: the language model's, which says what is done to them.
        hidden_states: `(..., hidden)`.
        targets, weights: `(...)`.
        count, smoothing, balance: see `mean_loss`.

    Returns:
        the loss, and what each prediction costs, `(...)`, through which no gradient goes.
    """
    keep = targets != IGNORE
    states, predicted = hidden_states[keep.to(hidden_states.device)], targets[keep]
    weights = None if weights is None else weights[keep]

    def cost(logits, part):
        return token_costs(
            scale_logits(logits, config), predicted[part], None if weights is None else weights[part], smoothing
        )

    if _acts_when_called(head):
        costs = cost(head(states), slice(None))
        loss = costs.sum() / share_of(targets, count, costs.device)
    else:
        share, parameters = 1.0 / share_of(targets, count, states.device), list(head.parameters())
        learns = torch.is_grad_enabled() and any(one.requires_grad for one in [states, *parameters])
        loss, costs = _InParts.apply(states, share, head, config.vocab_size, cost, learns, *parameters)
    of_tokens = costs.new_zeros(targets.shape)
    of_tokens[keep.to(costs.device)] = costs.detach()
    return with_balance(loss, targets, count, balance), of_tokens


def share_of(targets: torch.Tensor, count: torch.Tensor | int | None, device: torch.device) -> torch.Tensor:
    """What costs are divided by: the supervised tokens of the optimiser step, or of these where it is not said."""
    return torch.as_tensor((targets != IGNORE).sum() if count is None else count, device=device).clamp(min=1)


def with_balance(
    loss: torch.Tensor, targets: torch.Tensor, count: torch.Tensor | int | None, balance: torch.Tensor | None
) -> torch.Tensor:
    """The loss and what a mixture of experts adds, by the share that these tokens are of the optimiser step."""
    if balance is None:
        return loss
    return loss + balance * (targets != IGNORE).sum().to(loss.device) / share_of(targets, count, loss.device)


class _InParts(torch.autograd.Function):
    """The sum of what predictions cost times `share`, and the costs; gradients are made with them, part by part."""

    @staticmethod
    def forward(ctx, states, share, head, columns, cost, learns, *parameters):
        wanted = [learns and one.requires_grad for one in (states, *parameters)]
        gradients: list[torch.Tensor | None] = [torch.zeros_like(states) if wanted[0] else None]
        gradients += [None] * len(parameters)
        costs = [torch.zeros(0, device=states.device)]
        weight = _cast_once(head)
        # Gradients of a mean over the step are too small for float16, which a scaler would make larger only afterwards.
        late = torch.float16 in (states.dtype, _autocast_type(states.device))
        unit, ctx.late = (torch.ones_like(share), share) if late else (share, None)
        for part in _parts(len(states), columns, states.device, any(wanted[1:])):
            if weight is None:  # quantised, with an adapter
                rows = states[part].detach().requires_grad_(wanted[0])
                leaves = [rows, *parameters]
            else:
                rows = states[part].to(weight.dtype)
                logits = nn.functional.linear(rows, weight, head.bias).requires_grad_(learns)
                leaves = [logits]
            with torch.set_grad_enabled(learns):
                made = cost(head(rows) if weight is None else logits, part)
            costs.append(made.detach())
            if not learns:
                continue
            leaves = [leaf for leaf in leaves if leaf.requires_grad]
            found = torch.autograd.grad(made, leaves, unit.expand_as(made), allow_unused=True)
            if weight is None:
                rest = iter(found)
                products = [(next(rest), None) if want else None for want in wanted]
            else:
                [of_logits] = found
                products = [(of_logits, weight), (of_logits.t(), rows)]
                if head.bias is not None:
                    products.append((of_logits.sum(0), None))
            for place, (want, product) in enumerate(zip(wanted, products)):
                if want and product[0] is not None:
                    if place == 0:
                        gradients[0][part] = _product(*product)
                    else:
                        gradients[place] = _added(gradients[place], *product, parameters[place - 1].dtype)
        ctx.gradients = [
            torch.zeros_like(one) if want and gradient is None else gradient
            for one, want, gradient in zip((states, *parameters), wanted, gradients)
        ]
        costs = torch.cat(costs)
        ctx.mark_non_differentiable(costs)
        return costs.sum() * share, costs

    @staticmethod
    def backward(ctx, of_loss, _):
        gradients = ctx.gradients
        if gradients is None or torch.is_grad_enabled():
            found = "a backward has taken them" if gradients is None else "they have no graph, as create_graph wants"
            raise DuetError(f"gradients of a loss with skip_logits=True are made with it, and {found}; leave it out.")
        ctx.gradients = None
        if ctx.late is not None:
            of_loss = of_loss * ctx.late
        if of_loss.device.type != "cpu" or of_loss != 1:  # a pass over a large matrix, mostly for nothing
            gradients = [None if one is None else one.mul_(of_loss) for one in gradients]
        of_states, *others = gradients
        return of_states, None, None, None, None, None, *others


def _parts(rows, columns, device, head_learns):
    """Rows in parts of one size, of which there is room for the logits."""
    most = LOGITS_AT_A_TIME.get(device.type, LOGITS_AT_A_TIME_ELSEWHERE)
    # Each part is a pass over the head's gradient, so there are fewer where it has one.
    size = -(-rows // max(1, -(-rows * columns // (2 * most if head_learns else most))))
    return [slice(start, start + size) for start in range(0, rows, max(1, size))]


def _acts_when_called(head):
    """Whether a call does more than the layer's product: hooks, another `forward`, a weight gathered for it alone."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    for module in head.modules():
        if "forward" in vars(module) or any(getattr(module, name) for name in hooks):
            return True
    weights = [module.weight for module in head.modules() if isinstance(module, nn.Linear)]
    return any(hasattr(one, "ds_id") or one.ndim != 2 or not one.numel() for one in weights)


def _cast_once(head):
    """The weight as autocast has it, of torch's own layer; `None` for another."""
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return None
    return head.weight.to(_autocast_type(head.weight.device) or head.weight.dtype)


def _autocast_type(device):
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _product(left, right):
    return left if right is None else left @ right


def _added(total, left, right, dtype):
    """`total + left @ right`, in place where there is a total."""
    if total is None:
        return _product(left, right).to(dtype)
    if right is None or right.dtype != total.dtype:
        return total.add_(_product(left, right))
    return total.addmm_(left, right)


def balance_loss(
    router_logits: tuple[torch.Tensor, ...], config: PreTrainedConfig, counted: torch.Tensor | None
) -> torch.Tensor:
    """
    What a mixture of experts adds so that all of its experts are used (https://arxiv.org/abs/2101.03961, eq. 4).

    Args:
        counted: how often each position counts, `(batch, tokens)`: an attention mask, or how many texts read it.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # which the other families copy

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    counted = counted if counted is not None and counted.ndim == 2 else None
    if counted is not None:  # in a batch of which nothing is learned no position counts, and 0 / 0 would be no number
        counted = torch.where(counted.any(), counted, torch.ones_like(counted))
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, counted)


def zero_of(parameters: Iterable[nn.Parameter]) -> torch.Tensor | float:
    """A 0 that all of these which learn have a gradient of: in a distributed run every process waits for theirs."""
    return 0.0 * sum(parameter.sum() for parameter in parameters if parameter.requires_grad)


__all__ = [
    "IGNORE",
    "balance_loss",
    "keep_positions",
    "loss_in_parts",
    "mean_loss",
    "targets_of",
    "token_costs",
    "zero_of",
]
