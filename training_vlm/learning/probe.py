"""Whether a model keeps the texts of a row apart, found by trying it: two short texts are run together and apart.

What is special: no list of families decides. What counts as rounding is measured on the model as well, as what padding
does to the same texts, which no one minds.
"""

import contextlib

import torch
from transformers import PreTrainedModel

from modeling_vlm import VLMForConditionalGeneration


_SHARED, _LENGTHS, _WINDOW = 14, (25, 19), 8


@torch.no_grad()
def why_not_packed(model: VLMForConditionalGeneration) -> str | None:
    """In a clause, why texts of a row would not be what each is by itself; `None` where they prove to be."""
    device, was_training = model.device, model.training
    drawn = torch.Generator().manual_seed(0)
    spared = {model.config.image_token_id}
    known = torch.tensor([id for id in range(min(model.config.text_config.vocab_size, 2000)) if id not in spared])
    ids = known[torch.randint(len(known), (2, max(_LENGTHS)), generator=drawn)]
    ids[1, :_SHARED] = ids[0, :_SHARED]
    texts = [row[:length].to(device)[None] for row, length in zip(ids, _LENGTHS)]
    dtypes = {parameter.dtype for parameter in model.model.language_model.parameters()} - {torch.float32}
    low = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), None)
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, low, enabled=low is not None),
            _short_windows(model),
        ):
            return _difference(model.model, texts, 1e-5 if low is None else 0.05)
    finally:
        model.train(was_training)


def _difference(model, texts, least):
    apart = [_states(model, text) for text in texts]
    padded = _states(model, *_padded(texts))
    rounding = max(_distance(row[: len(text)], text) for row, text in zip(padded, (one[0] for one in apart)))
    limit = max(10 * rounding, least)
    a, b = _LENGTHS
    rows = {
        "texts of a row": ((*texts,), [(0, a, -1, 0), (a, a + b, -1, 1)], [(0, a), (a, a + b)]),
        "texts behind a prefix": (
            (texts[0], texts[1][:, _SHARED:]),
            [(0, _SHARED, -1, -1), (_SHARED, a, 0, 0), (a, a + b - _SHARED, 0, 1)],
            [(_SHARED, a), (a, a + b - _SHARED)],
        ),
    }
    for name, (parts, segments, places) in rows.items():
        try:
            states = _states(model, torch.cat(parts, dim=1), segments=segments)[0]
        except (
            ValueError,
            TypeError,
            RuntimeError,
            NotImplementedError,
            AttributeError,
            KeyError,
            IndexError,
        ) as error:
            return f"the language model does not run a row of texts ({' '.join(str(error).split())[:200]})"
        for (start, end), alone in zip(places, apart):
            expected = alone[0, -(end - start) :]
            if (found := _distance(states[start:end], expected)) > limit:
                return (
                    f"{name} are not what they are by themselves in this language model (they differ by {found:.1g}, "
                    f"and rounding by {rounding:.1g})"
                )
    return None


def _states(model, ids, attention_mask=None, segments=None):
    return model(input_ids=ids, attention_mask=attention_mask, segments=segments, use_cache=False).last_hidden_state


def _padded(texts):
    length = max(text.shape[1] for text in texts)
    ids = torch.cat([torch.nn.functional.pad(text, (0, length - text.shape[1])) for text in texts])
    mask = torch.tensor([[1] * text.shape[1] + [0] * (length - text.shape[1]) for text in texts], device=ids.device)
    return ids, mask


def _distance(one, other):
    one, other = one.double(), other.double()
    return float(((one - other).norm() / other.norm()).nan_to_num(torch.inf))


@contextlib.contextmanager
def _short_windows(model: PreTrainedModel):
    """Windows of attention shorter than the texts, so that they matter."""
    config = model.config.text_config
    window = getattr(config, "sliding_window", None)
    if window:
        config.sliding_window = min(window, _WINDOW)
    try:
        yield
    finally:
        if window:
            config.sliding_window = window


__all__ = ["why_not_packed"]
