"""The one encoder of messages into ids, for training and for generation.

What is special about it: it never tokenises a conversation twice to compare lengths, and never looks for roles in the
text. It renders the chat template once with marks in place of the texts, so it knows which characters come from the
template and which from a message. Control tokens are read in the template's part only: what a user types is text. The
prompt of every answer is cut exactly where generation would start, so the ids before an answer in training are the ids
that generation is given. The file travels with every checkpoint and imports nothing of this package.
"""

import itertools
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer


# Marks for the rendering: characters of a private use area and a blank that every `trim` removes and none writes.
MARK = "\ue000{}\ue001"
_MARK_PATTERN = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")
_BLANK = "\u2003"


class _Slot(NamedTuple):
    """The place of one message text in the rendered template, and whether the template trims it there."""

    text: int
    lstrip: bool
    rstrip: bool


def _fill(literals: Sequence[str], slots: Sequence[_Slot], texts: Sequence[str]) -> list[str]:
    """The texts as the template writes them; what is trimmed reaches through parts that stand side by side."""
    filled, trims = [texts[slot.text] for slot in slots], False
    for index, slot in enumerate(slots):
        trims = slot.lstrip or (trims and not filled[index - 1] and not literals[index])
        filled[index] = filled[index].lstrip() if trims else filled[index]
    trims = False
    for index, slot in reversed(list(enumerate(slots))):
        trims = slot.rstrip or (trims and not filled[index + 1] and not literals[index + 1])
        filled[index] = filled[index].rstrip() if trims else filled[index]
    return filled


class TextEncoder:
    """
    A tokenizer that can tell control tokens from text.

    `encode` turns a string into ids without ever giving a control token, whatever the string says; `split` finds the
    control tokens of a template's own text. Control tokens are the special tokens and the added tokens that are not
    plain words or blanks (those are vocabulary).

    Raises:
        `ValueError`: the tokenizer has no backend of the `tokenizers` library.
    """

    def __init__(self, tokenizer):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is a slow tokenizer; Duet needs one with a `tokenizers` backend "
                "(a folder with tokenizer.json)."
            )
        special = set(tokenizer.all_special_ids)
        added = tokenizer.added_tokens_decoder
        control = {
            id: token
            for id, token in added.items()
            if token.special or id in special or not re.fullmatch(r"[\w\s]+", token.content)
        }
        self.control_ids = {token.content: id for id, token in control.items()}
        # The longest token wins, and takes the blanks that its flags say, as in the tokenizers library.
        patterns = [
            (r"\s*" if token.lstrip else "") + f"(?:{re.escape(token.content)})" + (r"\s*" if token.rstrip else "")
            for token in sorted(control.values(), key=lambda token: -len(token.content))
        ]
        self._control = re.compile("(" + "|".join(patterns) + ")") if patterns else None
        # Text may still come out as the unknown token; where that is eos as well (GPT-2), it never does.
        unknown = tokenizer.unk_token_id
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self._forbidden = set(control) - ({unknown} - ends)

        # What the tokenizer puts before every text (bos, where it adds one).
        with_special, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
        self.prefix_ids = list(with_special[: len(with_special) - len(plain)])

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # A control token that is no word of the vocabulary keeps its place, so that those behind it keep their ids.
        words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        state["added_tokens"] = [
            {**token, "content": MARK.format(token["id"])} if token["id"] in control else token
            for token in state["added_tokens"]
            if token["id"] not in control or token["content"] not in words
        ]
        state["truncation"] = state["padding"] = None
        self._first = Tokenizer.from_str(json.dumps(state))
        changed, only_first = _without_prefix_space(state)
        self._inner = Tokenizer.from_str(json.dumps(state)) if changed else self._first
        self._after_control = self._inner if only_first else self._first

    def split(self, text: str) -> list[tuple[int | None, str]]:
        """A template's text as `(control id, its string)` and `(None, plain text)`, in order."""
        if self._control is None:
            return [(None, text)] if text else []
        pieces = self._control.split(text)
        return [
            (self.control_ids[piece.strip() if piece not in self.control_ids else piece], piece)
            if index % 2
            else (None, piece)
            for index, piece in enumerate(pieces)
            if piece
        ]

    def encode(self, text: str, after: str | None = None) -> list[int]:
        """
        The ids of plain text.

        Args:
            text (`str`): read as text, also where it spells a control token.
            after (`str`, *optional*): what stands before it: nothing (`None`), `"control"` or `"text"`. A tokenizer
                that puts a blank before words does so at a beginning only, never inside a text.
        """
        if not text:
            return []
        backend = {None: self._first, "control": self._after_control, "text": self._inner}[after]
        encoding = backend.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self._forbidden.isdisjoint(ids):
            return ids
        # The model's own vocabulary spells a control token: break it in two and read each half as text.
        start, end = next(span for id, span in zip(ids, encoding.offsets) if id in self._forbidden)
        middle = (start + end + 1) // 2
        if not 0 < middle < len(text):
            return [id for id in ids if id not in self._forbidden]
        return self.encode(text[:middle], after) + self.encode(text[middle:], "text")


def _without_prefix_space(state: dict) -> tuple[bool, bool]:
    """Take the rule that puts a blank before a text out of a tokenizer's state: (was there one, at the start only)."""
    changed = only_first = False
    for key in ("normalizer", "pre_tokenizer"):
        part = state[key] or {}
        steps = part.get("normalizers", part.get("pretokenizers", [part]))
        for step in list(steps):
            if step.get("type") == "Prepend":
                changed = True
                steps.remove(step)
                if step is part:
                    state[key] = None
            elif step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                changed, only_first = True, step.get("prepend_scheme") == "first"
                step["prepend_scheme"] = "never"
            elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
                changed = True
                step["add_prefix_space"] = False
    return changed, only_first


class MessageEncoder:
    """
    Conversations and captions into ids, one id an image, with the weight of each in the loss.

    Args:
        tokenizer: the language model's tokenizer, with a `tokenizers` backend.
        image_token (`str`): the special token that stands for an image in what a template writes.
    """

    def __init__(self, tokenizer, image_token: str):
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.text = TextEncoder(tokenizer)
        self._layouts = {}

    def encode_messages(
        self,
        messages: list[dict],
        template: str,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        supervise_prompt: bool = False,
        **template_kwargs,
    ) -> tuple[list[int], list[float]]:
        """See `VLMProcessor.encode_messages`."""
        messages = with_parts(messages)
        texts = [part["text"] for part in all_parts(messages) if part["type"] == "text"]
        literals, slots, empty = self._follow(messages, texts, template, add_generation_prompt, template_kwargs)
        if continue_final_message:
            literals[-1] = ""
        answers = self._find_answers(messages, literals, slots, template, template_kwargs, empty)
        pieces = _Pieces(self.image_token_id, prompt_weight=float(supervise_prompt))
        self._encode_pieces(pieces, texts, literals, slots, answers, open_end=continue_final_message)
        images = sum(part["type"] == "image" for part in all_parts(messages))
        if pieces.ids.count(self.image_token_id) != images:
            raise ValueError(
                f"the chat template writes {pieces.ids.count(self.image_token_id)} image tokens for {images} images; "
                f"expected one {self.image_token} for each image part."
            )
        return pieces.ids, pieces.weights

    def encode_caption(self, content: list[dict]) -> tuple[list[int], list[float]]:
        """See `VLMProcessor.encode_caption`."""
        ids = list(self.text.prefix_ids)
        weights, after = [0.0] * len(ids), None
        for part in content:
            if part["type"] == "image":
                piece, after = [self.image_token_id], "control"
            else:
                piece, after = self.text.encode(part["text"], after), "text"
            ids = ids + piece
            weights += [float(part["type"] == "text")] * len(piece)
        return ids + [self.tokenizer.eos_token_id], weights + [1.0]

    def render(self, messages: list[dict], template: str, **kwargs) -> str:
        """The text that a template makes of normalised messages; what it raises becomes a `ValueError`."""
        shown = [
            {**m, "content": [p if p["type"] == "text" else {"type": "image"} for p in m["content"]]} for m in messages
        ]
        try:
            return self.tokenizer.apply_chat_template(shown, chat_template=template, tokenize=False, **kwargs)
        except Exception as error:  # a template may raise whatever it likes
            roles = ", ".join(str(message.get("role")) for message in messages)
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses these messages (roles: {roles}): {reason}") from error

    def _layout(self, messages, template, add_generation_prompt, kwargs, empty):
        """
        The rendered conversation as literals and slots: `literal, slot, literal, ..., slot, literal`.

        It depends on roles and parts, not on the words, so it is found once for each shape of conversation.
        """
        shape = [{**m, "content": [p["type"] for p in m["content"]], "train": None, "weight": None} for m in messages]
        key = json.dumps([shape, template, add_generation_prompt, kwargs, sorted(empty)], default=repr, sort_keys=True)
        if key in self._layouts:
            return self._layouts[key]

        def render(mark):
            marks = itertools.count()
            marked = []
            for message in messages:
                content = []
                for part in message["content"]:
                    if part["type"] == "text":
                        index = next(marks)
                        part = {"type": "text", "text": "" if index in empty else mark.format(index)}
                    content.append(part)
                marked.append({**message, "content": content})
            return self.render(marked, template, add_generation_prompt=add_generation_prompt, **kwargs)

        pieces = _MARK_PATTERN.split(render(MARK))
        trimmed = _MARK_PATTERN.split(render(_BLANK + MARK + _BLANK))
        literals = tuple(pieces[0::4])
        if tuple(trimmed[0::4]) != literals:
            raise ValueError("the chat template changes with the text of the messages; choose another template.")
        slots = tuple(
            _Slot(int(index), lstrip=not left, rstrip=not right)
            for left, index, right in zip(trimmed[1::4], trimmed[2::4], trimmed[3::4])
        )
        if len(self._layouts) > 4096:
            self._layouts.clear()
        self._layouts[key] = literals, slots
        return literals, slots

    def _follow(self, messages, texts, template, add_generation_prompt, kwargs):
        """The layout of these very messages, and which texts it leaves out: some templates treat empty ones apart."""
        rendered = self.render(messages, template, add_generation_prompt=add_generation_prompt, **kwargs)
        owners = [message["role"] for message in messages for part in message["content"] if part["type"] == "text"]
        blank = frozenset(index for index, text in enumerate(texts) if not text.strip())
        nothing = frozenset(index for index in blank if not texts[index])
        answers = frozenset(index for index in blank if owners[index] == "assistant")
        for empty in dict.fromkeys((frozenset(), nothing - answers, blank - answers, nothing, blank)):
            literals, slots = self._layout(messages, template, add_generation_prompt, kwargs, empty)
            filled = [*_fill(literals, slots, texts), ""]
            if "".join(a + b for a, b in zip(literals, filled)) == rendered:
                return list(literals), list(slots), empty
        raise ValueError(
            "the chat template rewrites the text of a message, so its tokens cannot be told apart; expected a template "
            "that writes texts as they are, or trimmed."
        )

    def _find_answers(self, messages, literals, slots, template, kwargs, empty):
        """
        For each assistant message: the pieces from which to which it goes, and its weight in the loss.

        An answer starts where the generation prompt of the messages before it ends, so what the template still writes
        before the text (a blank, an empty thought) belongs to the answer. If the last answer's generation prompt is no
        beginning of the conversation, it takes that beginning's place; an earlier such answer is only context.
        """
        owner = [i for i, message in enumerate(messages) for part in message["content"] if part["type"] == "text"]
        answers = []
        for index in reversed([i for i, message in enumerate(messages) if message["role"] == "assistant"]):
            own = [position for position, slot in enumerate(slots) if owner[slot.text] == index]
            if not own:
                continue
            first, last = own[0], own[-1]
            if index:
                prompt_literals, prompt_slots = self._layout(messages[:index], template, True, kwargs, empty)
            else:  # nothing can be asked before it; what the template writes before its text is given
                prompt_literals, prompt_slots = tuple(literals[: first + 1]), tuple(slots[:first])
            begins = (
                prompt_slots == tuple(slots[:first])
                and prompt_literals[:-1] == tuple(literals[:first])
                and literals[first].startswith(prompt_literals[-1])
            )
            if not begins and index == len(messages) - 1:
                literals[: first + 1], slots[:first] = prompt_literals, prompt_slots
                last += len(prompt_slots) - first
                first, begins = len(prompt_slots), True
            start = len(prompt_literals[-1]) if begins else len(literals[first])
            message = messages[index]
            weight = 1.0 if message.get("weight") is None else float(message["weight"])
            weight = 0.0 if message.get("train") is False or not begins else weight
            answers.append(_Answer(first, start, last, weight))
        return answers

    def _encode_pieces(self, pieces, texts, literals, slots, answers, open_end):
        """Tokenise what stands between control tokens and the ends of answers, piece by piece."""
        encoder = self.text
        buffer, filled = "", _fill(literals, slots, texts)

        def flush():
            nonlocal buffer
            pieces.add(encoder.encode(buffer, pieces.after), "text")
            buffer = ""

        def write(literal):
            nonlocal buffer
            for control, piece in encoder.split(literal):
                if control is None:
                    buffer += piece
                else:
                    flush()
                    pieces.add([control], "control")

        starts = {answer.first: answer for answer in answers}
        ends = {answer.last: answer for answer in answers}
        written = 0
        for position, literal in enumerate(literals):
            if position in starts:
                write(literal[written : starts[position].start])
                flush()
                pieces.answer_weight = starts[position].weight
                written = starts[position].start
            write(literal[written:])
            written = 0
            if position < len(slots):
                buffer += filled[position]
            if position in ends:
                # A blank between an answer and its end token is the answer's: a blank alone could not end one.
                (control, piece), *more = encoder.split(literals[position + 1]) or [(None, "")]
                if control is None and piece.isspace() and more:
                    buffer += piece
                    written = len(piece)
                flush()
                pieces.answer_weight = None
                at_end = position == len(slots) - 1 and not literals[-1]
                if literals[position + 1] or at_end:
                    pieces.end_weight = ends[position].weight
                if at_end and not open_end:
                    pieces.add([self.tokenizer.eos_token_id], "control")
        flush()


class _Answer(NamedTuple):
    """An assistant message: from character `start` of literal `first` to slot `last`."""

    first: int
    start: int
    last: int
    weight: float


class _Pieces:
    """
    Ids as they are written, each with its weight in the loss: that of the answer it belongs to or ends, else the
    prompt's; none for an image.
    """

    def __init__(self, image_token_id, prompt_weight):
        self.image_token_id, self.prompt_weight = image_token_id, prompt_weight
        self.ids, self.weights = [], []
        self.after, self.answer_weight, self.end_weight = None, None, None

    def add(self, ids, kind):
        for id in ids:
            if id == self.image_token_id:
                weight = 0.0
            else:
                weights = (self.answer_weight, self.end_weight, self.prompt_weight)
                weight, self.end_weight = next(w for w in weights if w is not None), None
            self.ids.append(id)
            self.weights.append(weight)
            self.after = kind


def with_parts(messages: list[dict]) -> list[dict]:
    """Messages with contents as lists of parts, without the null keys that `datasets` adds."""
    result = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = []
        for part in content or []:
            part = {key: value for key, value in part.items() if value is not None}
            kind = part.get("type")
            if kind == "image_url":
                part = {"type": "image", "url": part["image_url"]["url"]}
            elif kind not in ("image", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise ValueError(
                    f'a content part of type {kind!r} was found; expected {{"type": "text", "text": ...}} or '
                    '{"type": "image"}.'
                )
            parts.append(part)
        result.append({**message, "content": parts})
    return result


def all_parts(messages: list[dict]) -> list[dict]:
    """Every part of normalised messages, in order."""
    return [part for message in messages for part in message["content"]]


__all__ = ["MARK", "MessageEncoder", "TextEncoder", "all_parts", "with_parts"]
