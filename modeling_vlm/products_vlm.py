"""Attention by matrix products, for processors that multiply bfloat16 themselves and texts of a moderate length.

torch's fused attention does not: on a CPU it is as slow in bfloat16 as in float32. Here scores are products of
matrices, the softmax is in float32, and its result is kept for the gradients in bfloat16. Key heads that several query
heads share are not repeated, and what a text sees of itself is computed in blocks, so that little of what the mask
hides is. The file travels with every checkpoint.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable


LONGEST = 1024
"""Keys beyond which a fused attention, which keeps no probabilities, is worth its time."""

BLOCK = 128  # queries


def fused_is_slow(query: torch.Tensor) -> bool:
    """Whether autocast has it compute in bfloat16, whatever it is given; a model that is in bfloat16 keeps it."""
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16):
        return False
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def by_products_where_faster(fused: Callable) -> Callable:
    """An attention of the library, by products where that is the faster way to outputs and gradients."""

    def attention(module, query, key, value, attention_mask, dropout=0.0, **kwargs):
        if fused_is_slow(query) and key.shape[2] <= LONGEST and not dropout:
            # Autocast does so for the library's functions, and not for ours.
            query, key, value = (whole.to(torch.bfloat16) for whole in (query, key, value))
            return attend_by_products(module, query, key, value, attention_mask, **kwargs)
        return fused(module, query, key, value, attention_mask, dropout=dropout, **kwargs)

    return attention


def attend_by_products(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    What the library's other attentions give, `(batch, tokens, heads, width)`.

    Args:
        query: `(batch, heads, tokens, width)`.
        key, value: `(batch, key heads, keys, width)`.
        attention_mask: `(batch or 1, 1, tokens, keys)`, true where a query sees a key.
        is_causal: without a mask, each sees all before it and itself; else all.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None or not is_causal:
        return _Attention.apply(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    # Cut once: a slice's gradient would be as large as the whole.
    queries, keys, values = (whole.split(BLOCK, 2) for whole in (query, key, value))
    outputs, begin = [], 0
    for number, block in enumerate(queries, 1):
        end = begin + block.shape[2]
        seen = torch.ones(end - begin, end, dtype=torch.bool).tril(begin)[None, None]
        before = (torch.cat(parts[:number], 2) if number > 1 else parts[0] for parts in (keys, values))
        outputs.append(_Attention.apply(block, *before, seen, scaling))
        begin = end
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Attention of one block of queries; the query heads that share a key head are rows of one matrix."""

    @staticmethod
    def forward(ctx, query, key, value, seen, scaling):
        batch, heads, tokens, _ = query.shape
        shared, keys = key.shape[1], key.shape[2]
        of_queries, of_keys, of_values = (
            whole.reshape(batch * shared, -1, whole.shape[-1]) for whole in (query, key, value)
        )
        exact = torch.promote_types(query.dtype, torch.float32)
        scores = torch.bmm(of_queries, of_keys.transpose(1, 2)).to(exact).mul_(scaling)
        if seen is not None:
            scores = scores.view(batch, shared, heads // shared, tokens, keys)
            scores = scores.masked_fill_(~seen[:, :, None], torch.finfo(scores.dtype).min)
        shares = scores.softmax(-1).to(query.dtype).view(batch * shared, -1, keys)
        output = torch.bmm(shares, of_values)
        ctx.save_for_backward(of_queries, of_keys, of_values, shares, output)
        ctx.shapes, ctx.scaling = (query.shape, key.shape, value.shape), scaling
        return output.view(batch, heads, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        of_queries, of_keys, of_values, shares, output = ctx.saved_tensors
        gradient = gradient.reshape(output.shape)
        exact = torch.promote_types(gradient.dtype, torch.float32)
        of_scores = torch.bmm(gradient, of_values.transpose(1, 2)).to(exact)
        mean = (gradient.to(exact) * output).sum(-1, keepdim=True)  # of the gradients of the scores' shares
        of_scores = of_scores.sub_(mean).mul_(shares).mul_(ctx.scaling).to(gradient.dtype)
        found = (
            torch.bmm(of_scores, of_keys),
            torch.bmm(of_scores.transpose(1, 2), of_queries),
            torch.bmm(shares.transpose(1, 2), gradient),
        )
        return *(part.view(shape) for part, shape in zip(found, ctx.shapes)), None, None


__all__ = ["attend_by_products", "by_products_where_faster"]
