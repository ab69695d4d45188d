"""Any row at all becomes valid conversations or one line."""

import copy
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from processing.image_files_vlm import ImagePolicy
from processing.reading.cells import MalformedRow
from processing.reading.conversations import caption_column, caption_count, conversations_from_row
from processing.reading.layouts import IMAGE_COLUMNS, LAYOUTS
from tests.rows import IMAGE, OTHER, ROWS


WORDS = st.text(max_size=8) | st.sampled_from(["<image>\nHi.", "[{}]", "[1]"])
ROLES = st.sampled_from(["system", "user", "assistant", "human", "gpt"])
REFERENCES = st.sampled_from(["/a.jpg", "../a.jpg", "https://x.org/a.jpg", "data:image/png;base64,AA", IMAGE, OTHER])
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=4) | WORDS | ROLES | REFERENCES
) | st.sampled_from(["image", "text", "image_url"])
PART_KEYS = ["type", "text", "image", "image_url", "path", "url", "bytes", "base64", "index"]
KEYS = st.sampled_from(
    ["role", "content", "from", "value", "user", "assistant", "answer", "train", "weight", *PART_KEYS]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)
NAMES = sorted({name for layout in LAYOUTS for family in layout.needs for name in family} | {"system", "system_prompt"})


def listed(**keys):
    return st.lists(st.fixed_dictionaries(keys), max_size=3)


# What a column should hold, often enough to come to the end of every reader.
IMAGES = REFERENCES | st.lists(REFERENCES, max_size=3)
PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": WORDS}) | st.fixed_dictionaries(
    {"type": st.just("image")}, optional={"url": st.none() | REFERENCES, "index": st.integers(0, 2)}
)
CONTENT = WORDS | st.lists(PARTS, max_size=3)
MESSAGES = listed(role=ROLES, content=CONTENT, train=st.none() | st.booleans(), weight=st.none() | st.floats())
TURNS = listed(**{"from": ROLES, "value": CONTENT}) | MESSAGES
RIGHT = {
    **dict.fromkeys(IMAGE_COLUMNS, IMAGES),
    "messages": MESSAGES,
    **dict.fromkeys(("prompt", "completion"), WORDS | MESSAGES),
    **dict.fromkeys(("conversation", "conversations"), TURNS),
    "texts": listed(user=WORDS, assistant=WORDS),
    "answers": st.lists(WORDS | st.fixed_dictionaries({"answer": WORDS})),
}


@st.composite
def any_rows(draw):
    """The columns of a layout and some more, each with what it should hold or with anything."""
    layout = draw(st.sampled_from(LAYOUTS))
    names = [draw(st.sampled_from(family)) for family in layout.needs]
    names += draw(st.lists(st.sampled_from([*NAMES, "foo", "__key__"]), max_size=3))
    row = {name: draw(RIGHT.get(name, WORDS | st.lists(WORDS)) | VALUES) for name in names}
    inside = draw(st.lists(st.sampled_from(list(row)), max_size=2, unique=True))
    if inside:
        row["json"] = {name: row.pop(name) for name in inside}
    return row


@st.composite
def mutated_rows(draw):
    """A real row in which up to three random nodes are deleted, replaced or put into another type."""
    row = copy.deepcopy(draw(st.sampled_from([row for _, row in ROWS])))
    for _ in range(draw(st.integers(1, 3))):
        nodes = list(places(row))
        if not nodes:
            break
        holder, key = draw(st.sampled_from(nodes))
        change = draw(st.sampled_from(["delete", "replace", "wrap", "unwrap", "write", "repeat"]))
        value = holder[key]
        if change == "delete":
            del holder[key]
        elif change == "replace":
            holder[key] = copy.deepcopy(draw(VALUES))
        elif change == "wrap":
            holder[key] = [value]
        elif change == "unwrap" and isinstance(value, (list, dict)) and value:
            holder[key] = draw(st.sampled_from(list(value.values()) if isinstance(value, dict) else value))
        elif change == "write":
            holder[key] = json.dumps(value, default=str)
        elif change == "repeat":
            holder[key] = [copy.deepcopy(value), value]
    return row


def places(node):
    """Every (holder, key) below a node."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def check_row(row, columns, image_dir, allow_urls):
    before = repr(row)
    try:
        found = conversations_from_row(
            row, source="s", index=5, columns=columns, images=ImagePolicy(image_dir, allow_urls)
        )
    except MalformedRow as error:
        line = str(error)
        assert line.startswith("s, row 5: ") and len(line.splitlines()) == 1 and len(line) < 700
    else:
        column = caption_column(row, columns)
        assert len(found) == (1 if column is None else caption_count(row.get(column)))
        for item in found:
            if "dropped" not in item:
                check_conversation(item, allow_urls)
        assert any("dropped" not in item for item in found)
    assert repr(row) == before


def check_conversation(conversation, allow_urls):
    assert {key: conversation[key] for key in ("group", "source", "row")} == {"group": 5, "source": "s", "row": 5}
    told = {"notes", "answers", "choices", "kind", "subset", "id"}
    assert conversation.keys() - told == {"images", "messages", "group", "source", "row"}
    assert all(isinstance(conversation.get(key, ""), str) for key in ("kind", "subset", "id"))
    assert all(isinstance(line, str) for key in ("notes", "answers", "choices") for line in conversation.get(key, ()))
    shown = 0
    assert conversation["messages"]
    for message in conversation["messages"]:
        assert message["role"] in ("system", "user", "assistant")
        assert message.get("train", True) in (True, False) and float(message.get("weight", 1)) >= 0
        assert None not in message.values()
        for part in message["content"]:
            assert part == {"type": "image"} or part.keys() == {"type", "text"} and part["type"] == "text"
            assert isinstance(part.get("text", ""), str)
            shown += part["type"] == "image"
    assert shown == len(conversation["images"])
    for image in conversation["images"]:
        if isinstance(image, dict):
            assert isinstance(image["bytes"], bytes)
        else:
            starts = ("data:image/", "https://") if allow_urls else ("data:image/",)
            assert os.path.isabs(image) or image.startswith(starts)


FUZZED = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
READING = {
    "columns": st.none() | st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NAMES), max_size=2),
    "image_dir": st.sampled_from([None, "/data"]),
    "allow_urls": st.booleans(),
}


@settings(max_examples=200, **FUZZED)
@given(row=any_rows(), **READING)
def test_any_row_is_a_valid_conversation_or_one_line(row, columns, image_dir, allow_urls):
    check_row(row, columns, image_dir, allow_urls)


@settings(max_examples=200, **FUZZED)
@given(row=mutated_rows(), **READING)
def test_a_real_row_with_anything_changed_is_a_valid_conversation_or_one_line(row, columns, image_dir, allow_urls):
    check_row(row, columns, image_dir, allow_urls)


@pytest.mark.slow
@settings(max_examples=20_000, **FUZZED)
@given(row=any_rows() | mutated_rows(), **READING)
def test_very_many_rows_are_valid_conversations_or_one_line(row, columns, image_dir, allow_urls):
    check_row(row, columns, image_dir, allow_urls)
