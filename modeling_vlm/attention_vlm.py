"""Attention by segment: a row of many texts, each of which sees the prefix that it shares and itself, in any model.

A segment is a run of positions and the segments before it whose keys it sees too. The attention that was chosen for the
language model stays the inner function, with its scaling, soft caps and sinks. Around it a layer's mask is an object
made where the library asks for that mask, so windows are those of the model, and a layer that is run again for its
gradients has the same. It names the calls that the row takes: texts of like lengths are the rows of one batch, without
a mask where nothing stands before them, and short texts behind one prefix are one text with a small mask. Flash
attention takes the row in one call of variable lengths, flex attention a block mask; a model with attention of its own
is given one dense mask. The file travels with every checkpoint.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .model_error_vlm import DuetError
from .products_vlm import by_products_where_faster


Segment = tuple[int, int, int, int]
"""`(start, end, parent, text)`: positions [start, end) of the row; they see those of the segment numbered `parent` (-1:
of none), of its parent and so on, and themselves. `text` is the conversation that ends there; -1 for a prefix."""

BY_SEGMENT = f"{__name__}."
"""Before the name of an attention. Of this copy of the file: a checkpoint's own copy registers its own."""

CALL = {"cpu": 4096}
"""How many scores cost as much as another call of the inner attention."""

CALL_ELSEWHERE = 1_000_000


class Run(NamedTuple):
    """Segments one behind the other, `first` to before `behind`, and those before them that they see."""

    first: int
    behind: int
    seen: list[int]
    queries: int
    keys: int
    is_plain: bool
    """Whether each position sees all before it and itself, so that there need be no mask."""
    scores: float


class Row:
    """
    The segments of a row.

    Args:
        segments: in the order of the row, without gaps; a parent stands before those that see it.
        tokens: length of the row.
        device: where masks are made.

    Raises:
        `DuetError`: they do not cover the row, or a parent is no earlier segment.
    """

    def __init__(self, segments: Sequence[Segment], tokens: int, device: torch.device):
        self.segments, self.tokens, self.device = segments, tokens, device
        self.asked = False  # whether the language model asked for a mask
        self.ancestors: list[list[int]] = []
        self.begins: list[int] = []  # position of each segment's first token in its text
        end = 0
        for number, segment in enumerate(segments):
            if len(segment) != 4 or not (segment[0] == end < segment[1] and -1 <= segment[2] < number):
                raise DuetError(
                    f"segment {number} of the row is {segment}; segments cover the row one behind the other, each "
                    "(start, end, parent, text), and a parent is an earlier one's number or -1."
                )
            _, end, parent, _ = segment
            above = [] if parent < 0 else [*self.ancestors[parent], parent]
            self.ancestors.append(above)
            self.begins.append(sum(segments[one][1] - segments[one][0] for one in above))
        if end != tokens:
            raise DuetError(f"the segments cover {end} positions and the row has {tokens}; cover the whole row.")
        self.lengths = [stop - start for start, stop, _, _ in segments]
        self.longest = max(begin + length for begin, length in zip(self.begins, self.lengths))
        number_of = [number for number, length in enumerate(self.lengths) for _ in range(length)]
        position = [begin + i for begin, length in zip(self.begins, self.lengths) for i in range(length)]
        self.number_of, self.position = torch.tensor([number_of, position], device=device)
        related = torch.eye(len(segments), dtype=torch.bool)
        for number, above in enumerate(self.ancestors):
            related[number, above] = True
        self.related = related.to(device)

    def sees(self, mask_function: Callable, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """
        Whether queries see keys, as `mask_function` would have it were each text a row of its own.

        Args:
            queries, keys: positions in the row, of shapes that broadcast.
        """
        none = torch.zeros_like(queries)
        seen = mask_function(none, none, self.position[queries], self.position[keys])
        return seen & self.related[self.number_of[queries], self.number_of[keys]]

    def calls(self) -> list[list[Run]]:
        """
        The runs that share a call each of the inner attention, as rows of a batch that are padded.

        A segment that sees others joins the run before it, and a run a call, where the scores that are computed in vain
        cost less than another call.
        """
        worth = CALL.get(self.device.type, CALL_ELSEWHERE)
        runs: list[Run] = []
        for number, above in enumerate(self.ancestors):
            alone = self._run(number, number + 1, above)
            if above:
                last = runs[-1]
                seen = sorted({*last.seen, *(one for one in above if one < last.first)})
                joined = self._run(last.first, number + 1, seen)
                if joined.scores - last.scores - alone.scores <= worth:
                    runs[-1] = joined
                    continue
            runs.append(alone)
        calls: list[list[Run]] = []
        size, scores = (0, 0), 0.0
        # The longest first, so that the first of a call has the most keys.
        for run in sorted(runs, key=lambda run: (run.is_plain, run.keys, run.queries), reverse=True):
            if calls and calls[-1][0].is_plain == run.is_plain:
                larger = (max(size[0], run.queries), size[1])
                padded = (len(calls[-1]) + 1) * larger[0] * larger[1] / (2 if run.is_plain else 1)
                if padded - scores - run.scores <= worth:
                    calls[-1].append(run)
                    size, scores = larger, padded
                    continue
            calls.append([run])
            size, scores = (run.queries, run.keys), run.scores
        return sorted(calls)

    def _run(self, first, behind, seen) -> Run:
        queries = sum(self.lengths[first:behind])
        keys = queries + sum(self.lengths[one] for one in seen)
        is_plain = behind - first == 1 and not seen
        return Run(first, behind, seen, queries, keys, is_plain, queries * keys / (2 if is_plain else 1))


def readers_of(segments: Sequence[Segment], device: torch.device) -> torch.Tensor:
    """How many texts see each position, `(1, tokens)`: what it counts among those of separate rows."""
    readers = [int(text >= 0) for *_, text in segments]
    for number in reversed(range(len(segments))):
        if (parent := segments[number][2]) >= 0:
            readers[parent] += readers[number]
    counts = [count for count, (start, end, *_) in zip(readers, segments) for _ in range(end - start)]
    return torch.tensor([counts], device=device)


def row_of(segments: Sequence[Segment], inputs_embeds: torch.Tensor, beside: dict[str, object]) -> Row:
    """
    The row of segments that a model is given as embeddings, `(1, tokens, hidden)`.

    Args:
        beside: what cannot be given beside segments, by name; `None` or `False` where it is not.

    Raises:
        `DuetError`: something of that is given, there are several rows, or the segments are none; see `Row`.
    """
    if len(inputs_embeds) != 1:
        raise DuetError(f"segments are those of one row, and the batch has {len(inputs_embeds)}; give one row.")
    for name, given in beside.items():
        if given is not None and given is not False:
            raise DuetError(f"segments say who sees whom, and {name} cannot be given beside them; leave it out.")
    return Row(segments, inputs_embeds.shape[1], inputs_embeds.device)


class SegmentMask:
    """
    What layers are given as their mask: the calls that they make of the inner attention.

    Args:
        row: the segments.
        mask_function: the library's, by positions in a text; `None` where each sees all before it.
        additive: whether masks are added to scores, as the eager functions do.
        dtype: of an additive mask.
    """

    def __init__(self, row: Row, mask_function: Callable | None, additive: bool, dtype: torch.dtype):
        self.tokens = row.tokens
        self.learns = torch.is_grad_enabled()  # asked once, as a checkpointed layer is run without gradients at first
        self.calls = []
        queries: list[int] = []
        keys: list[int] = []
        back = [0] * row.tokens  # where each position stands among the outputs of all calls
        for call in row.calls():
            longest = max(run.queries for run in call), call[0].keys
            first_query, first_key = len(queries), len(keys)
            for run in call:
                start = row.segments[run.first][0]
                own = range(start, start + run.queries)
                back[own.start : own.stop] = range(len(queries), len(queries) + run.queries)
                before = [position for one in run.seen for position in range(*row.segments[one][:2])]
                # What is padded repeats a position that is there; nothing sees its key, and what it sees is dropped.
                queries += [*own, *[start] * (longest[0] - run.queries)]
                keys += [*before, *own, *[start] * (longest[1] - run.keys)]
            mask = None
            if mask_function is not None or additive or not call[0].is_plain:
                of_queries = torch.tensor(queries[first_query:], device=row.device).view(len(call), 1, -1, 1)
                of_keys = torch.tensor(keys[first_key:], device=row.device).view(len(call), 1, 1, -1)
                filled = torch.tensor([run.keys for run in call], device=row.device).view(-1, 1, 1, 1)
                mask = row.sees(mask_function or causal, of_queries, of_keys)
                mask &= torch.arange(longest[1], device=row.device) < filled
                if additive:
                    mask = added(mask, dtype)
            self.calls.append((len(call), longest, mask))
        as_it_lies = list(range(row.tokens))
        self.back = None if queries == as_it_lies else torch.tensor(back, device=row.device)
        self.queries, self.keys = (
            None if order == as_it_lies else torch.tensor(order, device=row.device) for order in (queries, keys)
        )

    def attend(self, inner, module, query, key, value, **kwargs) -> tuple[torch.Tensor, None]:
        """What the inner attention gives for the row, `(1, tokens, heads, width)`."""
        kwargs.pop("is_causal", None)
        # Taken and cut once: a slice's gradient would be as large as the row.
        taken = []
        for whole, order, size in ((query, self.queries, 0), (key, self.keys, 1), (value, self.keys, 1)):
            parts = _taken(whole.transpose(1, 2)[0], order).split([many * sizes[size] for many, sizes, _ in self.calls])
            taken.append([p.unflatten(0, (many, -1)).transpose(1, 2) for p, (many, *_) in zip(parts, self.calls)])
        outputs = [
            inner(module, *of_runs, mask, is_causal=mask is None, **kwargs)[0].flatten(0, 1)
            for *of_runs, (_, _, mask) in zip(*taken, self.calls)
        ]
        return _taken(torch.cat(outputs), self.back)[None], None


def _taken(positions, order):
    return positions if order is None else positions.index_select(0, order.to(positions.device))


class VaryingLengths:
    """A `SegmentMask` for flash attention: one call for the row, keys gathered, windows by the model's own argument."""

    def __init__(self, row: Row):
        self.tokens = row.tokens
        of_queries, of_keys, keys = [0], [0], []
        for number, above in enumerate(row.ancestors):
            for one in [*above, number]:
                keys.extend(range(*row.segments[one][:2]))
            of_queries.append(row.segments[number][1])
            of_keys.append(len(keys))
        # Where no text has a prefix, keys are those of the row as they lie.
        self.keys = torch.tensor(keys, device=row.device) if any(row.ancestors) else None
        self.lengths = {
            "cu_seq_lens_q": torch.tensor(of_queries, device=row.device, dtype=torch.int32),
            "cu_seq_lens_k": torch.tensor(of_keys, device=row.device, dtype=torch.int32),
            "max_length_q": max(row.lengths),
            "max_length_k": row.longest,
        }

    def attend(self, inner, module, query, key, value, **kwargs) -> tuple[torch.Tensor, None]:
        """See `SegmentMask.attend`."""
        kwargs.pop("is_causal", None)
        if self.keys is not None:
            key, value = (whole.index_select(2, self.keys.to(whole.device)) for whole in (key, value))
        return inner(module, query, key, value, None, is_causal=True, **{**kwargs, **self.lengths})


def causal(batch, head, query, key):
    """Each sees all before it and itself."""
    return key <= query


def added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


_RUNNING: ContextVar[Row | None] = ContextVar("row", default=None)


@contextlib.contextmanager
def attending(model: PreTrainedModel, row: Row, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """
    While the language model runs on the row; gives the mask to hand it.

    Raises:
        `DuetError`: it never asked for a mask of its layers, so that its texts saw each other.
    """
    if not goes_through_interface(model):
        positions = torch.arange(row.tokens, device=row.device)
        yield added(row.sees(causal, positions[None, None, :, None], positions[None, None, None]), dtype)
        return
    attend_by_segment(model)
    token = _RUNNING.set(row)
    try:
        # Where there is a mask, the library does not look for texts in the positions by itself.
        yield torch.ones(1, row.tokens, dtype=torch.long, device=row.device)
    finally:
        _RUNNING.reset(token)
    if not row.asked:
        raise DuetError(
            f"the language model ({model.config.model_type}) asks for no attention mask, so the texts of a row would "
            "see each other; give it one text a row, padded."
        )


def goes_through_interface(model: PreTrainedModel) -> bool:
    """Whether the layers call attention through the library's interface, where it can be another function."""
    return hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")


def attend_by_segment(model: PreTrainedModel) -> None:
    """
    Let rows of segments be given to a language model; others are computed as they were.

    Raises:
        `DuetError`: its attention is none that is known to understand masks.
    """
    inner = model.config._attn_implementation or "eager"
    if inner.startswith(BY_SEGMENT):
        return
    name = BY_SEGMENT + inner
    if not (inner in ("eager", "sdpa") or "flash" in inner or "flex" in inner):
        raise DuetError(
            f"texts in one row need to know how the attention {inner!r} reads a mask; choose sdpa, eager, "
            "flash_attention_2 or flex_attention."
        )
    if name not in AttentionMaskInterface():
        AttentionInterface.register(name, _attention_around(inner))
        AttentionMaskInterface.register(name, _mask_around(inner))
    # Not by the model's own method, which checks names that it knows, and puts its own flash attention in place of one.
    model.config._attn_implementation = _Name(name)


def attend_as_chosen(model: PreTrainedModel) -> None:
    """Give a language model back the attention that was chosen for it."""
    name = model.config._attn_implementation or ""
    if name.startswith(BY_SEGMENT):
        model.config._attn_implementation = name.removeprefix(BY_SEGMENT)


def _mask_around(inner):
    original = AttentionMaskInterface()[inner]

    def mask(*args, mask_function=causal, attention_mask=None, **kwargs):
        row = _RUNNING.get()
        if row is None:
            return original(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
        row.asked = True
        if kwargs.get("use_vmap"):
            raise DuetError("the language model adds a mask of its own to what texts see; give it one text a row.")
        if "flash" in inner:
            return VaryingLengths(row)
        if "flex" in inner:

            def in_row(batch, head, query, key):
                return row.sees(mask_function, query, key)

            return original(*args, mask_function=in_row, attention_mask=None, **kwargs)
        # The library's rule for where a mask may be left out.
        size = kwargs.get("local_size")
        plain = kwargs.get("allow_is_causal_skip", True) and (size is None or row.longest < size)
        return SegmentMask(row, None if plain else mask_function, inner == "eager", kwargs.get("dtype", torch.float32))

    return mask


def _attention_around(inner):
    def attention(module, query, key, value, attention_mask, **kwargs):
        if inner == "eager":  # each family's own, with its soft cap or sinks
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = AttentionInterface()[inner]
        if "flash" in inner:  # it reads there which flash attention it is
            module = _As(module, config=_As(module.config, _attn_implementation=inner))
        if not isinstance(attention_mask, (SegmentMask, VaryingLengths)):
            return function(module, query, key, value, attention_mask, **kwargs)
        if key.shape[2] != attention_mask.tokens or kwargs.get("position_bias") is not None:
            raise DuetError("texts in one row take neither a cache nor a bias by position; give one text a row.")
        if inner == "sdpa" and attention_mask.learns:
            function = by_products_where_faster(function)
        return attention_mask.attend(function, module, query, key, value, **kwargs)

    return attention


class _Name(str):
    """Name of an attention by segment, equal to the inner one's: code that asks for that by name goes its own way."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return other in (str(self), self.removeprefix(BY_SEGMENT))

    def __ne__(self, other):
        return not self == other


class _As:
    """An object as it is, but for these attributes."""

    def __init__(self, of, **own):
        vars(self).update(own, _of=of)

    def __getattr__(self, name):
        return getattr(self._of, name)


__all__ = [
    "Row",
    "Segment",
    "attend_as_chosen",
    "attend_by_segment",
    "attending",
    "goes_through_interface",
    "readers_of",
    "row_of",
]
