"""The known layouts of rows, each with its reader; which one a row has is read from its columns, never asked for.

What is special: `LAYOUTS` is a table. A new layout is a new entry there: its columns, and a reader that takes them out
of a `Row` and gives conversations; whatever it does not take is named in the account. Columns for the same thing are a
family, of which the first that holds something is read.
"""

import difflib
import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from .cells import (
    LONGEST_LIST,
    MalformedRow,
    Row,
    cut,
    found,
    holds_something,
    is_nothing,
    is_picture,
    listed,
    literal,
    malformed,
)
from .messages import as_reference, as_text, conversation, read_messages, said


CHOICE_ANSWERS = ("letter", "text")
"""How the right one of several options is said."""

# Files that are named by what they are: here only what ends like a picture is one.
_WEAK_IMAGE_COLUMNS = ("filename", "file_name", "url", "URL")
# The last ones of images and captions are what the files of a WebDataset sample end in, then names of single data sets.
IMAGE_COLUMNS = (
    *("decoded_image", "images", "image", "jpg", "jpeg", "png", "webp", "img", "imgs"),
    *("image_path", "image_paths", "image_file", "image_files", "image_filename", "image_file_name", "imgname"),
    *("img_path", "image_url", "image_urls", *_WEAK_IMAGE_COLUMNS),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "raw", "sentences", "TEXT")
CONVERSATION_COLUMNS = ("conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
PAIR_COLUMNS = ("texts", "qas", "qa_pairs")
_QUESTION_LISTS = ("questions",)
COMPLETION_COLUMNS = ("completion", "response")
QUESTION_COLUMNS = ("question", "query", "instruction")
_INDEX_COLUMNS = ("correct_choice_idx", "answer_index", "answer_idx")
_ANSWER_LISTS = ("answers", "direct_answers")
ANSWER_COLUMNS = (
    *("answer", "multiple_choice_answer", *_INDEX_COLUMNS, "answerKey", *_ANSWER_LISTS, "response", "output"),
)
_ANSWERS_OF_A_QUERY = ("label",)
# What is a row of its own, though it stands in the text of another (RLHF-V), is learned by nobody as it is written.
_NO_CAPTION_KEYS = {"question", "messages", "conversations", "chosen", "rejected"}
ID_COLUMNS = ("id", "question_id", "questionId", "qid", "sample_id", "uid")
_CHOICE_COLUMNS = ("choices", "options")
_CONTEXT_COLUMNS = ("context", "hint")
_FAMILIES = (
    IMAGE_COLUMNS,
    CAPTION_COLUMNS,
    CONVERSATION_COLUMNS,
    SYSTEM_COLUMNS,
    PAIR_COLUMNS,
    COMPLETION_COLUMNS,
    QUESTION_COLUMNS,
    ANSWER_COLUMNS,
)

# Columns of one image each, whose names say in which order: image_1 and image_2, left_image and right_image.
_NUMBERED_IMAGE = re.compile(
    r"(?:image|img|picture)[_ -]?(\d+)|(?:image|img|picture)[_ -]([a-z]+)|([a-z]+)[_ -](?:image|img|picture)",
    re.IGNORECASE,
)
_PAIRED_IMAGES = (("left", "right"), ("first", "second"), ("before", "after"), ("a", "b"))
_LETTERED_OPTION = re.compile(r"(?:(choice|option)[_ -]?)?([A-Z])", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Wanted(NamedTuple):
    """What a row is to become where it may become several things; see `conversations_from_row`."""

    prompt: str = ""
    choice_answer: str = "letter"


Read = Callable[[Row, Wanted], list[dict[str, Any]]]


# --- the readers


def _read_messages(row: Row, wanted: Wanted) -> list[dict[str, Any]]:
    """`messages` as chat models take them."""
    return [_dialogue(row, read_messages(row, _items(row, ("messages",)), "message"))]


def _read_completion(row: Row, wanted: Wanted) -> list[dict[str, Any]]:
    """TRL's `prompt` and `completion`, texts or lists of messages; what is learned is the completion."""
    given: list[dict[str, Any]] = []
    learned: list[dict[str, Any]] = []
    for messages, columns, role in ((given, ("prompt",), "user"), (learned, COMPLETION_COLUMNS, "assistant")):
        column, value = row.take(columns)
        if isinstance(value, (str, int, float)):
            messages.append(said(role, value, column))
        else:
            items = _items(row, (column,), "a text or a list of messages")
            messages += read_messages(row, items, "message", f"{column} message")
    for message in given:
        if message["role"] == "assistant":
            message.setdefault("train", False)
    return [_dialogue(row, given + learned)]


def _read_conversations(row: Row, wanted: Wanted) -> list[dict[str, Any]]:
    """
    LLaVA's and ShareGPT's turns of `from` and `value`, or of `role` and `content`.

    A `system` column opens the conversation, unless that has a system turn of its own.
    """
    turns = _items(row, CONVERSATION_COLUMNS, "a list of turns")
    return [_dialogue(row, read_messages(row, turns, "turn"), places=True)]


def _read_pairs(row: Row, wanted: Wanted) -> list[dict[str, Any]]:
    """Pairs of what the user and the assistant say: `texts` of the_cauldron and FineVision, `qas` of Visual Genome."""
    messages = []
    column, _ = row.take(PAIR_COLUMNS)
    for number, pair in enumerate(_items(row, PAIR_COLUMNS, "a list of pairs of user and assistant")):
        if not isinstance(pair, dict):
            raise malformed(found(pair, f"{column} {number}"), "a pair of user and assistant")
        keys = ("question", "answer") if "question" in pair and "user" not in pair else ("user", "assistant")
        for key, role in zip(keys, ("user", "assistant")):
            messages.append(said(role, pair.get(key), f"{key} of {column} {number}"))
        for key, value in pair.items():
            if key not in keys:
                row.leave(column, key, value)
    return [_dialogue(row, messages)]


def _read_question_lists(row: Row, wanted: Wanted) -> list[dict[str, Any]]:
    """Questions about one image and their answers as two lists (OCR-VQA): the turns of one dialogue."""
    questions = _items(row, _QUESTION_LISTS, "a list of questions")
    answers = _items(row, ("answers",), "a list of answers")
    if len(questions) != len(answers):
        raise malformed(f"{len(questions)} questions and {len(answers)} answers", "one answer to each question")
    messages = []
    for number, pair in enumerate(zip(questions, answers)):
        for role, text, column in zip(("user", "assistant"), pair, ("questions", "answers")):
            messages.append(said(role, text, f"{column} {number}"))
    return [_dialogue(row, messages)]


def _read_question(row: Row, wanted: Wanted) -> list[dict[str, Any]]:
    """
    A question and its answer; of several answers (VQAv2, TextVQA) the one most often given, the first among equals.

    VQAv2's own choice among its answers, `multiple_choice_answer`, goes before ours. Context stands before the
    question, Alpaca's `input` and the options of a multiple choice behind it, `history` in turns of its own.
    """
    column, question = row.take(QUESTION_COLUMNS)
    lines = [as_text(question, column)]
    choices, is_positional = _choices(row)
    is_labelled = column == "query" and not any(holds_something(row.cells.get(name)) for name in ANSWER_COLUMNS)
    column, answer = row.take(_ANSWERS_OF_A_QUERY if is_labelled and "label" in row.unread else ANSWER_COLUMNS)
    is_choice = bool(choices) and column not in ("response", "output")
    if not is_choice and column in _INDEX_COLUMNS:
        raise malformed(found(answer, column), "a column of choices or options that it is the number of")
    answers = _answers(row, answer, column)
    counts = Counter(answers)
    learned = max(counts, key=counts.__getitem__)  # the first, as a Counter keeps the order in which they came
    if choices and lines[0].endswith("<image>"):
        lines[0] += "\n"  # of which the tag takes one
    lines += [f"{letter}. {option}" for letter, option in zip(_LETTERS, choices)]
    if is_choice:
        if len(counts) > 1:
            raise malformed(found(answer, column), "one answer to a multiple choice")
        chosen = _chosen(answer, learned, column, choices, is_positional)
        said_as = choices if wanted.choice_answer == "text" else list(_LETTERS[: len(choices)])
        learned = said_as[chosen]
        all_answers = [learned]
    else:
        all_answers = answers if len(answers) > 1 else _further_answers(row)
    messages = _history(row)
    messages += [said("user", "\n".join([*_context(row), lines[0], *_input(row), *lines[1:]]), "question")]
    messages += [said("assistant", learned, column)]
    read = _dialogue(row, messages)
    if is_choice:
        read["choices"] = said_as
    return [{**read, "answers": all_answers} if all_answers else read]


def _read_captions(row: Row, wanted: Wanted) -> list[dict[str, Any]]:
    """An image and what is said of it; each caption is the answer of its own conversation."""
    images = row_images(row)
    if not images:
        hint, named = row.hint(), "an image for the caption, in a column that is named with --columns image=NAME"
        raise malformed("no image", hint[1] if hint else named)
    column, value = row.take(CAPTION_COLUMNS)
    captions = captions_of(value)
    if not captions:
        raise malformed(f"an empty list in {column}", "at least one caption")
    question = [{"type": "text", "text": wanted.prompt}] if wanted.prompt else []
    read, errors = [], []
    for caption in captions:
        try:
            text = _caption(caption, column)
        except MalformedRow as error:
            read.append({"dropped": str(error)})
            errors.append(error)
            continue
        user = {"role": "user", "content": [{"type": "image"} for _ in images] + question}
        read.append(conversation(row, [user, said("assistant", text, column)], list(images)))
    if len(errors) == len(read):
        raise errors[0]
    return read


def _caption(caption: Any, column: str) -> str:
    if isinstance(caption, dict):  # as in Karpathy's splits of COCO
        caption = caption.get("raw", caption.get("caption", caption))
    text = as_text(caption, column, "a text, or a list of texts")
    if text.lstrip().startswith("{") and (keys := _NO_CAPTION_KEYS & _keys(text)):
        raise malformed(
            f"JSON with {', '.join(sorted(keys))} as {column}",
            "a caption, or what the JSON holds in columns of its own",
        )
    # Captions come with stray spaces and line ends (COCO's do), and a model would learn to say them.
    if not text.strip():
        raise malformed(found(caption, column), "a text, or a list of texts")
    return text.strip()


def _keys(text: str) -> set[str]:
    """The keys of a text that is a JSON object."""
    value = literal(text) if len(text) <= LONGEST_LIST else None
    return set(value) if isinstance(value, dict) else set()


def captions_of(value: Any) -> list[Any]:
    """The captions that a cell holds: the elements of a list, also of one that is written as text; else its one."""
    value = listed(value)
    return value if isinstance(value, list) else [value]


# --- what several layouts have


def _dialogue(row: Row, messages: list[dict[str, Any]], places: bool = False) -> dict[str, Any]:
    """A conversation of these messages, the row's images, and its system text where they have none."""
    if all(message["role"] != "system" for message in messages):
        column, system = row.take_said(SYSTEM_COLUMNS)
        if column:
            messages.insert(0, said("system", system, column))
    return conversation(row, messages, row_images(row), places)


def row_images(row: Row) -> list[Any]:
    """The image references of a row, in order, as they stand there; none where its image columns hold nothing."""
    for column in IMAGE_COLUMNS:
        if column not in row.unread:
            continue
        value = row.cells[column]
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
            written = literal(value)
            value = written if isinstance(written, (list, dict)) else value
        if isinstance(value, dict) and all(str(key).startswith("<image") for key in value):  # as MiniCPM names them
            value = [value[key] for key in sorted(value)]
        images = list(value) if isinstance(value, (list, tuple)) else [value]
        if column in _WEAK_IMAGE_COLUMNS and not all(map(is_picture, images)):
            continue
        del row.unread[column]
        return [as_reference(image, column) for image in images if not is_nothing(image)]
    return []


def _items(row: Row, columns: Collection[str], expected: str = "a list of messages") -> list[Any]:
    """The elements of a column that holds a list, or a list written as text, which parquet files often have instead."""
    column, value = row.take(columns)
    items = literal(value) if isinstance(value, str) else value
    if isinstance(items, dict) and all(isinstance(values, list) for values in items.values()):
        # A list of structs, as `datasets` stored it where it was declared as a sequence.
        items = [dict(zip(items, values)) for values in zip(*items.values())]
    if not isinstance(items, list) or not items:
        raise malformed(found(value, column), expected)
    return items


# --- the columns of a question


def _answers(row: Row, value: Any, column: str) -> list[str]:
    """The answers that a cell holds; of several that one is none costs itself alone."""
    is_list = column in _ANSWER_LISTS
    value = listed(value, (str, dict, int, float) if is_list else (str,))
    if isinstance(value, dict):  # a list of structs, as `datasets` stores it where it was declared as a sequence
        value = value.get("answer")
    if not isinstance(value, list):
        value = [value]
    if not value:
        raise malformed(f"an empty list in {column}", "at least one answer")
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in value]
    given = [answer for answer in answers if not is_nothing(answer)] or answers
    if len(given) < len(answers):
        row.note("an answer beside it is none")
    return [as_text(answer, column) for answer in given]


def _further_answers(row: Row) -> list[str]:
    """All right answers beside the one that is learned; none where a row has no list of them."""
    column, value = row.take_said(_ANSWER_LISTS)
    try:
        return _answers(row, value, column) if column else []
    except MalformedRow:
        row.leave("the row", column, value)
        return []


def _context(row: Row) -> list[str]:
    """What stands before a question. (MMBench writes nan where there is none.)"""
    texts = [(name, row.cells[name]) for name in _CONTEXT_COLUMNS if name in row.unread]
    texts = [(name, text) for name, text in texts if isinstance(text, str)]
    for name, _ in texts:
        del row.unread[name]
    return [text for _, text in texts if text != "nan"]


def _input(row: Row) -> list[str]:
    column, value = row.take_said(("input",))
    return [as_text(value, column)] if column else []


def _history(row: Row) -> list[dict[str, Any]]:
    """Former questions and answers, as pairs."""
    messages = []
    column, value = row.take_said(("history",))
    for number, pair in enumerate((literal(value) if isinstance(value, str) else value) if column else []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise malformed(found(pair, f"history {number}"), "a question and its answer")
        for role, text in zip(("user", "assistant"), pair):
            messages.append(said(role, text, f"history {number}"))
    return messages


def _choices(row: Row) -> tuple[list[str], bool]:
    """The options of a multiple choice, and whether their columns say that the answer is a letter or a number."""
    column, value = row.take_said(_CHOICE_COLUMNS)
    is_positional = column != "choices"
    if not column:
        columns = _lettered(tuple(row.cells))
        value = [row.cells[name] for name in columns]
        while value and (is_nothing(value[-1]) or value[-1] == "nan"):
            value.pop()
        for name in columns:
            row.unread.pop(name, None)
        column = columns[0] if columns else ""
    if isinstance(value, str) and len(value) <= LONGEST_LIST:
        value = literal(value)
        if isinstance(value, str) and "\n" in value.strip():
            value = value.strip().splitlines()
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # ARC and its like, with a label for each
        value = value["text"]
    elif isinstance(value, dict) and all(len(str(key)) == 1 for key in value):
        value = [value[key] for key in sorted(value, key=str) if not is_nothing(value[key])]
    if not value:
        return [], is_positional
    if not isinstance(value, list) or len(value) > len(_LETTERS):
        raise malformed(found(value, column), f"a list of up to {len(_LETTERS)} options")
    options = [as_text(option, column).strip() for option in value]
    own = [re.match(rf"\(?{letter}\s*[).:]\s*", option) for letter, option in zip(_LETTERS, options)]
    if all(own):  # their letters stand in them already
        options = [option[match.end() :] for option, match in zip(options, own) if match]
    return options, is_positional


@functools.lru_cache(maxsize=64)
def _lettered(names: tuple[str, ...]) -> list[str]:
    """Columns named A, B, C, ... or choice_a, option_b, ..., of which there are at least two; in order."""
    lettered: dict[str, dict[str, str]] = {}
    for name in names:
        match = _LETTERED_OPTION.fullmatch(name)
        if match and (match[1] or match[2].isupper()):
            lettered.setdefault((match[1] or "").lower(), {})[match[2].upper()] = name
    for columns in lettered.values():
        letters = "".join(sorted(columns))
        if len(letters) > 1 and _LETTERS.startswith(letters):
            return [columns[letter] for letter in letters]
    return []


def _chosen(given: Any, answer: str, column: str, options: list[str], is_positional: bool) -> int:
    """
    The number of the option that is right.

    A number is the option's number, from 0. A text is an option's own words, its letter or its number, tried in this
    order where the options are `choices`, the words last where they are `options` or have columns of their own.
    """
    text = answer.strip()
    letter = _LETTER.fullmatch(text)
    by_letter = _LETTERS.index(letter[1].upper()) if letter else None
    by_number = int(float(text)) if re.fullmatch(r"\d{1,2}(\.0)?", text) else None
    words = re.sub(r"^\(?[A-Z]\s*[).:]\s+", "", text) if text not in options else text
    by_words = options.index(words) if words in options else None
    if column in _INDEX_COLUMNS or isinstance(given, (int, float)):
        ways = [by_number]
    elif is_positional or column == "answerKey":
        ways = [by_letter, by_number, by_words]
    else:
        ways = [by_words, by_letter, by_number]
    right = next((way for way in ways if way is not None and way < len(options)), None)
    if right is None:
        raise malformed(found(given, column), f"the number (from 0), the letter or the words of one of {len(options)}")
    return right


# --- the table


class Layout(NamedTuple):
    """A known arrangement of columns."""

    description: str
    """The columns, in words, for the message about an unknown layout."""
    needs: tuple[tuple[str, ...], ...]
    """The columns that make it: one of each family."""
    read: Read
    """Row and what it is to become -> conversations, and for a part that is bad why it is `dropped`."""
    is_common: bool = True
    """Whether it is proposed to those whose rows have none."""

    def fits(self, names: Collection[str]) -> bool:
        """Whether these names are enough."""
        return all(any(name in names for name in family) for family in self.needs)

    def is_named(self, names: Collection[str]) -> bool:
        """Whether one of these names is what this layout differs from others by."""
        return any(name in family for name in names for family in self.needs if family is not IMAGE_COLUMNS)

    def likeness(self, names: Collection[str]) -> tuple[int, bool, float]:
        """How near these names come to what it needs: how much of it they are, and how alike the rest is, up to 1."""
        closest = [
            max(difflib.SequenceMatcher(None, name.lower(), wanted).ratio() for name in names for wanted in family)
            for family in self.needs
        ]
        return closest.count(1.0), self.is_named(names), sum(closest) / len(closest)


# The first that fits is taken. Captions come last: `text` is a name that a column of any data set may have.
LAYOUTS = (
    Layout("messages [+ images or image]", (("messages",),), _read_messages),
    Layout("prompt + completion [+ images or image]", (("prompt",), COMPLETION_COLUMNS), _read_completion),
    Layout("conversations [+ system, image or images]", (CONVERSATION_COLUMNS,), _read_conversations),
    Layout("texts (user and assistant) [+ images]", (PAIR_COLUMNS,), _read_pairs),
    Layout("question + answer or answers [+ image]", (QUESTION_COLUMNS, ANSWER_COLUMNS), _read_question),
    Layout("query + label [+ image]", (("query",), _ANSWERS_OF_A_QUERY), _read_question, is_common=False),
    Layout(
        "questions + answers, two lists [+ image]",
        (_QUESTION_LISTS, ("answers",)),
        _read_question_lists,
        is_common=False,
    ),
    Layout("image + caption, captions or text", (IMAGE_COLUMNS, CAPTION_COLUMNS), _read_captions),
)

NAMES = {name for layout in LAYOUTS for family in layout.needs for name in family} | {
    *(*IMAGE_COLUMNS, *SYSTEM_COLUMNS, *ID_COLUMNS, *_CHOICE_COLUMNS, *_CONTEXT_COLUMNS),
    *("input", "history", "kind", "subset"),
}
"""What a column can be."""


def find_layout(row: Row, preferred: Collection[str] = ()) -> Layout:
    """The layout of a row, where two fit one with a `preferred` column.

    Raises:
        MalformedRow: no known layout has these columns.
    """
    # An empty cell is an absent one; but where that leaves nothing known, the columns' names tell what was meant.
    present = [
        name
        for name, value in row.cells.items()
        if name in row.unread or (holds_something(value) and name not in IMAGE_COLUMNS)
    ]
    layout = fitting(present, preferred) or fitting(row.cells, preferred, present)
    if layout is None:
        names = tuple(str(name) for name in row.cells)
        picture = next((name for name in row.unread if is_picture(_first(row.cells[name]))), "")
        nearest, missing, known = _nearest(tuple("image" if name == picture else name for name in names))
        left = [name for name in row.unread if name != picture and name not in known]
        own = left[0] if len(left) == 1 else "NAME"
        given = [f"image={picture}"] if picture and picture not in IMAGE_COLUMNS else []
        given += [f"{name}={own if name != 'image' else 'NAME'}" for name in missing]
        remedy = f"other names for these are given with --columns {','.join(given)}"
        if {*row.unread} == {picture}:
            remedy = (
                "beside an image has to stand what is learned of it; a file that says it is named with --dataset, and "
                "the folder of its images with --image_dir"
            )
        raise malformed(
            f"columns {cut(', '.join(names) or '(none)', 300)}", f"a known layout, such as {nearest}; {remedy}"
        )
    return layout


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


@functools.lru_cache(maxsize=64)  # comparing takes milliseconds, and what one row lacks, all of its data set do
def _nearest(names: tuple[str, ...]) -> tuple[str, list[str], set[str]]:
    """The three layouts that these names come nearest to, in words, what the first of them lacks, and what it knows."""
    common = [layout for layout in LAYOUTS if layout.is_common]
    nearest = sorted(common, key=lambda layout: layout.likeness(names or ("",)), reverse=True)[:3]
    missing = [family for family in nearest[0].needs if not set(family) & set(names)]
    lacks = ["image" if family is IMAGE_COLUMNS else family[0] for family in missing]
    known = {name for family in nearest[0].needs for name in family}.union(ID_COLUMNS)
    return "; ".join(layout.description for layout in nearest), lacks, known


def fitting(
    names: Collection[str], preferred: Collection[str], present: Collection[str] | None = None
) -> Layout | None:
    """
    The first layout that fits these names, of those with a `preferred` one where there is one.

    Where only some of them are `present`, it is the one of which most is there.
    """
    fit = [layout for layout in LAYOUTS if layout.fits(names)]
    if present is not None:
        fit.sort(key=lambda layout: -sum(not {*present}.isdisjoint(family) for family in layout.needs))
    return next((layout for layout in fit if layout.is_named(preferred)), fit[0] if fit else None)


def relatives(names: Iterable[str]) -> set[str]:
    """These names and all that mean the same as one of them."""
    names = set(names)
    return names.union(*(family for family in _FAMILIES if not names.isdisjoint(family)))


def with_numbered_images(cells: dict[str, Any]) -> dict[str, Any]:
    """The cells whose names number or pair them as images as one list, where no other image column has one."""
    numbered = _numbered_columns(tuple(cells))
    if not numbered or any(not is_nothing(cells.get(name)) for name in IMAGE_COLUMNS):
        return cells
    kept = {name: value for name, value in cells.items() if name not in numbered}
    return {**kept, "images": [cells[name] for name in numbered if not is_nothing(cells[name])]}


def is_numbered_image(name: str) -> bool:
    """Whether a column is called image_1 or the like."""
    match = _NUMBERED_IMAGE.fullmatch(name)
    return match is not None and match[1] is not None


@functools.lru_cache(maxsize=64)
def _numbered_columns(names: tuple[str, ...]) -> list[str]:
    """Columns named image_1, image_2, ..., else two that are named as a pair; in order."""
    matches = {name: match for name in names if (match := _NUMBERED_IMAGE.fullmatch(name))}
    if numbered := [name for name, match in matches.items() if match[1]]:
        return sorted(numbered, key=lambda name: int(matches[name][1]))
    worded = {(match[2] or match[3]).lower(): name for name, match in matches.items()}
    pair = next((pair for pair in _PAIRED_IMAGES if worded.keys() >= {*pair}), ())
    return [worded[word] for word in pair]
