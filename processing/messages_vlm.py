"""The one encoder of messages into ids, for training and for generation.

What is special about it: it never tokenises a conversation twice to compare lengths, and never looks for roles in the
text. It renders the chat template once with marks in place of the texts, so it knows which characters come from the
template and which from a message. Control tokens are read in the template's part only: what a user types is text. The
prompt of every answer is cut exactly where generation would start, so the ids before an answer in training are the ids
that generation is given. The file travels with every checkpoint.
"""

import ast
import bisect
import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from .data_error_vlm import DuetError
from .texts_vlm import MARK, TextEncoder


# Besides the mark of a text: a blank that every `trim` removes and nobody types, and what stands in for a text.
_MARK_PATTERN = re.compile(MARK.format(r"(\d+)"))
_BLANK = "\u2003"
_STAND_IN = "\ue002"

CONTEXT_ONLY = "an answer is context only"
"""Noted once for each answer that is not learned, because generation would be asked for it in other words."""

# Texts that a template may treat apart for being empty, in the order of trying: none; those of others than the
# assistant, of nothing at all or of blanks; the same of everyone.
_HIDES = (None, ("nothing", False), ("blank", False), ("nothing", True), ("blank", True))

_PLAIN = {"role", "content", "train", "weight"}

_LONG = 64  # messages above which an answer's prompt is compared with its neighbours alone


class _Slot(NamedTuple):
    """The place of some words in the rendered template, and what the template strips there (`None`: all blanks)."""

    word: int
    left: str | None
    right: str | None


class _Layout(NamedTuple):
    """`literal, slot, literal, ..., slot, literal`; and the literals that were typed, by the words before them."""

    literals: tuple[str, ...]
    slots: tuple[_Slot, ...]
    typed: dict[int, str]


class _Reading(NamedTuple):
    """How a template is followed: where texts are cut, which empty ones are left out, whether it strips blanks."""

    template: str
    kwargs: dict
    cut: str | None
    hides: tuple[str, bool] | None
    strips: bool


class _Marked(NamedTuple):
    """Messages with marks in place of words; the words, whose they are, which have no mark, what is between two."""

    messages: list[dict]
    words: list[str]
    owners: list[int]
    hidden: list[int]
    between: dict[int, str]


def _mark(messages, reading, before="", after="", shows=None, swaps=None) -> _Marked:
    """
    Marked messages.

    Args:
        before, after: what is put around each mark.
        shows: the number of words that get a mark though they would be left out.
        swaps: the number of words behind which something else stands than was typed.
    """
    marked = _Marked([], [], [], [], {})
    for number, message in enumerate(messages):
        content = []
        for part in message["content"]:
            if part["type"] == "text":
                pieces = re.split(reading.cut, part["text"]) if reading.cut else [part["text"]]
                hidden, text = _is_hidden(message, part["text"], reading.hides), ""
                for words, typed in itertools.zip_longest(pieces[0::2], pieces[1::2], fillvalue=""):
                    index = len(marked.words)
                    if hidden and shows != index:
                        marked.hidden.append(index)
                    else:
                        text += before + MARK.format(index) + after + (_STAND_IN if swaps == index else typed)
                    if typed:
                        marked.between[index] = typed
                    marked.words.append(words)
                    marked.owners.append(number)
                part = {"type": "text", "text": text}
            content.append(part)
        marked.messages.append({**message, "content": content})
    return marked


def _shape(messages, reading):
    """What of messages decides how a template writes them, where every word has a mark in its place."""
    if reading.cut is None and reading.hides is None and all(message.keys() <= _PLAIN for message in messages):
        parts = [(message["role"], *map(_kind, message["content"])) for message in messages]
        if not any(None in of_message for of_message in parts):
            return tuple(parts)
    messages = [{**message, "train": None, "weight": None} for message in messages]
    return json.dumps(_mark(messages, reading).messages, default=repr, sort_keys=True)


def _kind(part):
    """Whether a part is a text or an image and holds nothing else; `None` where it does."""
    kind = part["type"]
    return kind if len(part) == 1 + (kind == "text") and kind in ("text", "image") else None


def _is_hidden(message, text, hides):
    if hides is None or (message["role"] == "assistant" and not hides[1]):
        return False
    return not text if hides[0] == "nothing" else not text.strip()


def _fill(literals: Sequence[str], slots: Sequence[_Slot], words: Sequence[str]) -> list[str]:
    """The words as the template writes them; what is stripped reaches through parts that stand side by side."""
    filled = [words[slot.word] for slot in slots]
    strips: str | None = ""
    for index, slot in enumerate(slots):
        reached = index and not filled[index - 1] and not literals[index]
        strips = slot.left if slot.left != "" else strips if reached else ""
        filled[index] = filled[index].lstrip(strips)
    strips = ""
    for index, slot in reversed(list(enumerate(slots))):
        reached = index + 1 < len(slots) and not filled[index + 1] and not literals[index + 1]
        strips = slot.right if slot.right != "" else strips if reached else ""
        filled[index] = filled[index].rstrip(strips)
    return filled


def _written(literals, filled):
    return "".join(a + b for a, b in zip(literals, [*filled, ""]))


@functools.lru_cache
def _looked_for(template):
    """The strings that a template looks for in texts (`'</think>' in content`, `content.split('</think>')`)."""
    quoted = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
    found = re.findall(rf"({quoted})\s+(?:not\s+)?in\b", template)
    found += re.findall(rf"(?:split|partition|startswith|endswith|replace)\(\s*({quoted})", template)
    strings = {ast.literal_eval(string) for string in found}
    return sorted((string for string in strings if string.strip()), key=lambda string: (-len(string), string))


def _cuts(template, messages):
    """Where texts may be cut, as patterns: nowhere, and then at what the template looks for."""
    yield None
    texts = [part["text"] for part in all_parts(messages) if part["type"] == "text"]
    there = [re.escape(string) for string in _looked_for(template) if any(string in text for text in texts)]
    if there:
        yield "(" + "|".join(there) + ")"


def _start(prompt, literals, slots, first):
    """Where in literal `first` the answer starts, whose prompt this is; `None` where that does not begin the whole."""
    begins = (
        prompt.slots == tuple(slots[:first])
        and prompt.literals[:-1] == tuple(literals[:first])
        and literals[first].startswith(prompt.literals[-1])
    )
    return len(prompt.literals[-1]) if begins else None


def _around(messages, turns, index):
    """A long dialogue cut to its beginning, the turns next to a message, and its end; and where the message is then."""
    turn = bisect.bisect_right(turns, index) - 1
    kept = {0, 1, *range(turn - 2, turn + 2), len(turns) - 2, len(turns) - 1}
    ends = [*turns[1:], len(messages)]
    chosen = [*range(turns[0]), *(i for t in sorted(kept) if 0 <= t < len(turns) for i in range(turns[t], ends[t]))]
    return [messages[i] for i in chosen], chosen.index(index)


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
        self._layouts: dict[tuple, _Layout] = {}
        self._reads: dict[str, dict[str, bool]] = {}

    def encode_messages(
        self,
        messages: list[dict],
        template: str,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        supervise_prompt: bool = False,
        max_length: int | None = None,
        notes: list[str] | None = None,
        **template_kwargs,
    ) -> tuple[list[int], list[float]]:
        """See `VLMProcessor.encode_messages`."""
        messages = with_parts(messages)
        reading, layout = self._follow(messages, template, add_generation_prompt, template_kwargs)
        literals, slots, marked = list(layout.literals), list(layout.slots), _mark(messages, reading)
        if continue_final_message:
            literals[-1] = ""
        answers = self._find_answers(messages, marked.owners, literals, slots, reading, notes)
        filled = _fill(literals, slots, marked.words)
        for position, slot in enumerate(slots[:-1]):
            if literals[position + 1] == layout.typed.get(slot.word) and slots[position + 1].word == slot.word + 1:
                filled[position], literals[position + 1] = filled[position] + literals[position + 1], ""
        pieces = _Pieces(self.image_token_id, prompt_weight=float(supervise_prompt), max_length=max_length)
        self._encode_pieces(pieces, literals, filled, answers, open_end=continue_final_message)
        images = sum(part["type"] == "image" for part in all_parts(messages))
        if pieces.ids.count(self.image_token_id) != images:
            raise DuetError(
                f"the chat template writes {pieces.ids.count(self.image_token_id)} image tokens for {images} images; "
                f"expected one {self.image_token} for each image part."
            )
        return pieces.ids, pieces.weights

    def encode_caption(self, content: list[dict], max_length: int | None = None) -> tuple[list[int], list[float]]:
        """See `VLMProcessor.encode_caption`."""
        pieces = _Pieces(self.image_token_id, prompt_weight=1.0, max_length=max_length)
        pieces.add(self.text.prefix_ids, None)
        pieces.weights = [0.0] * len(pieces.ids)
        for part in content:
            if part["type"] == "image":
                pieces.add([self.image_token_id], "control")
            else:
                pieces.add(self.text.encode(part["text"], pieces.after, pieces.room), "text")
        pieces.add([self.tokenizer.eos_token_id], "control")
        return pieces.ids, pieces.weights

    # -- rendering ------------------------------------------------------------------------------------------------

    def render(self, messages: list[dict], template: str, **kwargs) -> str:
        """
        The text that a template makes of normalised messages; what it raises becomes a `DuetError`.

        Contents are given as lists of parts to a template that reads them so, else as strings, with the image token in
        the place of an image.
        """
        reads = self.reads_parts(template)
        return self._render([self._shown(m, reads.get(m["role"], reads["user"])) for m in messages], template, **kwargs)

    def _shown(self, message, as_parts):
        content = [p if p["type"] == "text" else {"type": "image"} for p in message["content"]]
        if not as_parts:
            content = "".join(self.image_token if part["type"] == "image" else part["text"] for part in content)
        return {**message, "content": content}

    def _render(self, shown, template, **kwargs):
        try:
            return self.tokenizer.apply_chat_template(shown, chat_template=template, tokenize=False, **kwargs)
        except Exception as error:  # a template may raise whatever it likes
            reason = " ".join(str(error).split())
            missing = re.search(r"'(\w+_token)' is undefined", reason)
            if missing:
                raise DuetError(
                    f"the chat template needs {missing[1]}, and the tokenizer has none; give the tokenizer one, or "
                    "choose another template (--chat_template)."
                ) from error
            roles = ", ".join(str(message.get("role")) for message in shown[:8]) + (", ..." if len(shown) > 8 else "")
            raise DuetError(f"the chat template refuses these messages (roles: {roles}): {reason[:300]}") from error

    def reads_parts(self, template: str) -> dict[str, bool]:
        """
        For each role whether a template reads a content given as parts, found by trying.

        Raises:
            `DuetError`: it places the text and the image of a user message in neither way, or cannot be rendered.
        """
        if template not in self._reads:
            user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": MARK.format(0)}]}
            found, errors = {}, []
            for as_parts in (True, False):
                try:
                    text = self._render([self._shown(user, as_parts)], template)
                except DuetError as error:
                    errors.append(error)
                    continue
                if text.count(self.image_token) == 1 and text.count(MARK.format(0)) == 1 and "'type'" not in text:
                    found["user"] = as_parts
                    break
            if not found and len(errors) == 2:
                raise errors[-1]
            if not found:
                raise DuetError(
                    "the chat template loses the text or the image of a user message; expected a jinja template that "
                    "writes `message['content']`, given as a string or as a list of parts."
                )
            for role in ("system", "assistant") if found["user"] else ():
                found[role] = not self._only_as_string(role, template)
            self._reads[template] = found
        return self._reads[template]

    def _only_as_string(self, role, template):
        """Whether a template that reads a user's content as parts wants another role's as a string."""
        content = [{"type": "text", "text": MARK.format(index)} for index in (1, 2)]
        user = {"role": "user", "content": [{"type": "text", "text": MARK.format(0)}]}
        for as_parts in (True, False):
            said = [self._shown(user, True), self._shown({"role": role, "content": content}, as_parts)]
            try:
                text = self._render(said if role == "assistant" else said[::-1], template)
            except DuetError:
                continue
            if all(text.count(MARK.format(index)) == 1 for index in range(3)) and "'type'" not in text:
                return not as_parts
        return False

    # -- what of it is whose --------------------------------------------------------------------------------------

    def _follow(self, messages, template, add_generation_prompt, kwargs):
        """How the template reads these very messages, and the layout that gives just what it writes of them."""
        rendered = self.render(messages, template, add_generation_prompt=add_generation_prompt, **kwargs)
        for cut in _cuts(template, messages):
            for hides, strips in itertools.product(_HIDES, (False, True)):
                reading = _Reading(template, kwargs, cut, hides, strips)
                words = _mark(messages, reading).words
                if strips and all(word == word.strip() for word in words):
                    continue
                layout = self._layout(messages, reading, add_generation_prompt)
                if _written(layout.literals, _fill(layout.literals, layout.slots, words)) == rendered:
                    return reading, layout
        raise DuetError(
            "the chat template rewrites the text of a message, so its tokens cannot be told apart; expected a template "
            "that writes texts as they are, or trimmed."
        )

    def _layout(self, messages, reading, prompt):
        """The rendered conversation; it depends on roles and parts, so it is found once for each shape of these."""
        key = (_shape(messages, reading), repr(reading), prompt)
        if key not in self._layouts:
            if len(self._layouts) > 4096:
                self._layouts.clear()
            messages = [{**message, "train": None, "weight": None} for message in messages]
            self._layouts[key] = self._make_layout(messages, reading, prompt, _mark(messages, reading))
        return self._layouts[key]

    def _make_layout(self, messages, reading, prompt, marked):
        def split(**marks):
            shown = _mark(messages, reading, **marks).messages
            text = self.render(shown, reading.template, add_generation_prompt=prompt, **reading.kwargs)
            pieces = _MARK_PATTERN.split(text)
            return pieces[0::2], [int(index) for index in pieces[1::2]]

        literals, words = split()
        left, right = [""] * len(words), [""] * len(words)
        for blank in (" ", "\n", _BLANK) if reading.strips else ():
            before, there = split(before=blank)
            if there == words and all(a in (b, b + blank) for a, b in zip(before, literals)):
                left = [chars + blank * (a == b) for chars, a, b in zip(left, before, literals)]
            after, there = split(after=blank)
            if there == words and all(a in (b, blank + b) for a, b in zip(after, literals)):
                right = [chars + blank * (a == b) for chars, a, b in zip(right, after[1:], literals[1:])]
        # What strips a blank that nobody types strips every kind.
        left, right = ([None if _BLANK in chars else chars for chars in side] for side in (left, right))
        slots = list(map(_Slot, words, left, right))

        typed = {}
        for position, (word, following) in enumerate(zip(words, words[1:])):
            between = marked.between.get(word)
            if following == word + 1 and literals[position + 1] == between:
                swapped = [*literals[: position + 1], _STAND_IN, *literals[position + 2 :]]
                if split(swaps=word) == (swapped, words):  # the template takes no notice of it
                    typed[word] = between

        # An empty answer that the template was not shown has a place as well: before what follows such an answer.
        places = []
        for word in marked.hidden:
            shown, there = split(shows=word)
            at = there.index(word) if word in there else len(literals)
            if messages[marked.owners[word]]["role"] == "assistant" and shown[:at] == literals[:at]:
                if at < len(literals) and literals[at].endswith(shown[at + 1]):
                    places.append((at, len(literals[at]) - len(shown[at + 1]), word))
        for at, start, word in sorted(places, reverse=True):
            literals[at : at + 1] = [literals[at][:start], literals[at][start:]]
            slots.insert(at, _Slot(word, None, None))
        return _Layout(tuple(literals), tuple(slots), typed)

    def _find_answers(self, messages, owners, literals, slots, reading, notes):
        """
        For each assistant message: the pieces from which to which it goes, and its weight in the loss.

        An answer starts where the generation prompt of the messages before it ends, so what the template still writes
        before the text (a blank, an empty thought) belongs to the answer. If the last answer's generation prompt is no
        beginning of the conversation, it takes that beginning's place; an earlier such answer is only context.
        """
        places, answers = {}, []
        for position, slot in enumerate(slots):
            places[owners[slot.word]] = (places.get(owners[slot.word], (position,))[0], position)
        roles = [message["role"] for message in messages]
        turns = [i for i, role in enumerate(roles) if role == "user" and roles[max(0, i - 1)] != "user"] or [0]
        for index in reversed([i for i, role in enumerate(roles) if role == "assistant"]):
            message, start = messages[index], None
            weight = 1.0 if message.get("weight") is None else float(message["weight"])
            weight = 0.0 if message.get("train") is False else weight
            if index in places:
                first, last = places[index]
                if not index:  # nothing can be asked before it; what the template writes before its text is given
                    start = len(literals[first])
                elif index < len(messages) - 1:
                    start = self._start_of(messages, turns, index, reading, literals, slots, first)
                else:
                    prompt = self._layout(messages[:index], reading, True)
                    start = _start(prompt, literals, slots, first)
                    if start is None:
                        literals[: first + 1], slots[:first] = prompt.literals, prompt.slots
                        start, shift = len(prompt.literals[-1]), len(prompt.slots) - first
                        first, last = first + shift, last + shift
                answers.append(
                    _Answer(first, len(literals[first]), last, 0.0)
                    if start is None
                    else _Answer(first, start, last, weight)
                )
            if start is None and weight and notes is not None:
                notes.append(CONTEXT_ONLY)
        return answers

    def _start_of(self, messages, turns, index, reading, literals, slots, first):
        """Where an answer within the conversation starts; in a long one the turns far away are left out to see."""
        if len(messages) > _LONG:
            short, at = _around(messages, turns, index)
            owners = _mark(short, reading).owners
            try:
                layout, prompt = self._layout(short, reading, False), self._layout(short[:at], reading, True)
                there = next(i for i, slot in enumerate(layout.slots) if owners[slot.word] == at)
            except (DuetError, StopIteration):  # not to be shortened
                there = None
            if there is not None and layout.literals[there] == literals[first]:
                return _start(prompt, layout.literals, layout.slots, there)
        return _start(self._layout(messages[:index], reading, True), literals, slots, first)

    def _encode_pieces(self, pieces, literals, filled, answers, open_end):
        """Tokenise what stands between control tokens and the ends of answers, piece by piece."""
        encoder, buffer = self.text, ""

        def flush():
            nonlocal buffer
            pieces.add(encoder.encode(buffer, pieces.after, pieces.room), "text")
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
            if position < len(filled):
                buffer += filled[position]
            if position in ends:
                # A blank between an answer and its end token is the answer's: a blank alone could not end one.
                (control, piece), *more = encoder.split(literals[position + 1]) or [(None, "")]
                if control is None and piece.isspace() and more:
                    buffer += piece
                    written = len(piece)
                flush()
                pieces.answer_weight = None
                at_end = position == len(filled) - 1 and not literals[-1]
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

    def __init__(self, image_token_id, prompt_weight, max_length=None):
        self.image_token_id, self.prompt_weight, self.max_length = image_token_id, prompt_weight, max_length
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

    @property
    def room(self) -> int | None:
        """
        Ids of a text that matter: those that `max_length` keeps and one more, which shows that there are more.

        Past these, one of each text, so that it is known whether there is anything to learn.
        """
        return None if self.max_length is None else max(1, self.max_length + 1 - len(self.ids))


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
                found = part["image_url"]
                part = {"type": "image", "url": found["url"] if isinstance(found, dict) else found}
            elif kind not in ("image", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise DuetError(
                    f'a content part of type {kind!r} was found; expected {{"type": "text", "text": ...}} or '
                    '{"type": "image"}.'
                )
            parts.append(part)
        result.append({**message, "content": parts})
    return result


def all_parts(messages: list[dict]) -> list[dict]:
    """Every part of normalised messages, in order."""
    return [part for message in messages for part in message["content"]]


__all__ = ["CONTEXT_ONLY", "MessageEncoder", "all_parts", "with_parts"]
