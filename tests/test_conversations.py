"""Rows of every known layout become the conversations they hold; anything else is one line that says what is wrong."""

import copy
import io
import json
import os
import tarfile

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from processing.reading.conversations import (
    IMAGE_COLUMNS,
    LAYOUTS,
    MalformedRow,
    caption_column,
    conversations_from_row,
)


IMAGE = {"bytes": b"...", "path": "/a.jpg"}
OTHER = {"bytes": b"other", "path": None}


def user(*content):
    return {"role": "user", "content": [{"type": "image"} if part == "image" else text(part) for part in content]}


def assistant(answer):
    return {"role": "assistant", "content": [text(answer)]}


def text(words):
    return {"type": "text", "text": words}


def test_a_row_with_captions_gives_adjacent_conversations_of_one_group():
    row = {"image": IMAGE, "caption": ["A dog.", " A brown dog. \n"], "sentids": ["1", "2"], "split": "train"}
    conversations = conversations_from_row(row, source="flickr", index=7)
    assert conversations == [
        {"images": [IMAGE], "messages": [user("image"), assistant(answer)], "group": 7, "source": "flickr", "row": 7}
        for answer in ("A dog.", "A brown dog.")
    ]


def test_conversations_of_one_row_share_nothing_that_can_be_changed():
    one, other = conversations_from_row({"image": IMAGE, "caption": ["a", "b"]}, prompt="What?")
    one["messages"][0]["content"].clear()
    one["images"].clear()
    assert other["images"] == [IMAGE] and other["messages"][0] == user("image", "What?")


@pytest.mark.parametrize("column", ["caption", "captions", "text"])
@pytest.mark.parametrize("image_column", ["image", "images"])
def test_a_caption_is_read_from_any_of_its_columns(column, image_column):
    (conversation,) = conversations_from_row({image_column: "/a.jpg", column: "A dog."})
    assert conversation["images"] == ["/a.jpg"]
    assert conversation["messages"] == [user("image"), assistant("A dog.")]


def test_a_caption_answers_the_prompt_and_the_image_stands_before_it():
    prompt = "[用户] 请描述这张图片。\n[助手] "
    (conversation,) = conversations_from_row({"image": "/a.jpg", "caption": ["A dog."]}, prompt=prompt)
    assert conversation["messages"][0] == user("image", prompt)


def test_caption_choice_keeps_the_first_or_all_captions():
    row = {"image": "/a.jpg", "caption": ["one", "two", "three"]}
    kept = {choice: len(conversations_from_row(row, caption_choice=choice)) for choice in ("all", "first", "random")}
    assert kept == {"all": 3, "first": 1, "random": 3}
    assert conversations_from_row(row, caption_choice="first")[0]["messages"][1] == assistant("one")
    with pytest.raises(ValueError, match="caption_choice is 'last'; expected one of all, first, random"):
        conversations_from_row(row, caption_choice="last")


def test_messages_are_read_as_datasets_returns_them():
    """Struct columns give every part all keys, null where a part has none."""
    parts = [
        {"type": "text", "text": "Look at ", "index": None},
        {"type": "image", "text": None, "index": 0},
        {"type": "text", "text": " please.", "index": None},
    ]
    row = {
        "messages": [
            {"role": "system", "content": "Be brief.", "train": None},
            {"role": "user", "content": parts, "train": None},
            {"role": "assistant", "content": "42", "train": False, "weight": 0.5},
        ],
        "images": [IMAGE],
        "caption": None,
    }
    (conversation,) = conversations_from_row(row, source="s", index=3)
    assert conversation == {
        "images": [IMAGE],
        "messages": [
            {"role": "system", "content": [text("Be brief.")]},
            user("Look at ", "image", " please."),
            {**assistant("42"), "train": False, "weight": 0.5},
        ],
        "group": 3,
        "source": "s",
        "row": 3,
    }


def test_images_without_a_place_open_the_first_user_message():
    messages = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "What?"}, assistant("That.")]
    (conversation,) = conversations_from_row({"messages": messages, "images": ["/a.jpg", "/b.jpg"]})
    assert conversation["messages"][1] == user("image", "image", "What?")
    assert messages[1]["content"] == "What?", "the row itself is left as it is"


@pytest.mark.parametrize("images", [{}, {"image": None}, {"images": []}, {"images": None, "image": None}])
def test_a_dialogue_without_image_is_read(images):
    (conversation,) = conversations_from_row({"messages": [user("Hello."), assistant("Hi.")], **images})
    assert conversation["images"] == [] and conversation["messages"] == [user("Hello."), assistant("Hi.")]


def test_a_null_cell_is_an_absent_one():
    (conversation,) = conversations_from_row({"messages": None, "image": "/a.jpg", "images": None, "text": "A dog."})
    assert conversation["images"] == ["/a.jpg"] and conversation["messages"][1] == assistant("A dog.")


@pytest.mark.parametrize(
    ("row", "images", "said"),
    [
        ({"messages": [user("Hi.")], "images": [], "image": IMAGE}, [IMAGE], [user("image", "Hi.")]),
        ({"messages": [], "prompt": "Hi.", "completion": "Hello."}, [], [user("Hi."), assistant("Hello.")]),
        ({"question": "Hi.", "answer": [], "answers": ["Hello."]}, [], [user("Hi."), assistant("Hello.")]),
        (
            {"conversations": [{"from": "user", "value": "Hi."}], "system": "", "system_prompt": "Be kind."},
            [],
            [{"role": "system", "content": [text("Be kind.")]}, user("Hi.")],
        ),
        (
            {"image": [], "json": {"image": IMAGE, "caption": "A dog."}},
            [IMAGE],
            [user("image"), assistant("A dog.")],
        ),
    ],
)
def test_what_is_empty_gives_way_to_another_column_for_the_same(row, images, said):
    (conversation,) = conversations_from_row(row)
    assert conversation["images"] == images and conversation["messages"] == said


def test_an_empty_list_gives_way_to_another_column():
    row = {"messages": [], "images": [], "image": "/a.jpg", "caption": [], "text": "A dog."}
    (conversation,) = conversations_from_row(row)
    assert conversation["images"] == ["/a.jpg"] and conversation["messages"][1] == assistant("A dog.")


@pytest.mark.parametrize(("number", "words"), [(3, "3"), (0, "0"), (-2.5, "-2.5"), (3.0, "3.0"), (10**9, "1000000000")])
def test_a_number_where_a_text_is_expected_is_its_text(number, words):
    for row, said in [
        ({"question": "How many?", "answer": number}, [user("How many?"), assistant(words)]),
        ({"question": number, "answers": ["A", number, words]}, [user(words), assistant(words)]),
        ({"texts": [{"user": number, "assistant": number}]}, [user(words), assistant(words)]),
        ({"prompt": "How many?", "completion": number}, [user("How many?"), assistant(words)]),
        ({"image": "/a.jpg", "caption": number}, [user("image"), assistant(words)]),
        ({"image": "/a.jpg", "caption": [number]}, [user("image"), assistant(words)]),
    ]:
        (conversation,) = conversations_from_row(row)
        assert conversation["messages"] == said


def test_an_image_object_stays_the_object_it_is():
    image = Image.new("RGB", (2, 2))
    (conversation,) = conversations_from_row({"image": image, "text": "A dot."})
    assert conversation["images"][0] is image


def test_a_typed_image_token_stays_text():
    (conversation,) = conversations_from_row({"messages": [user("What is <image>?"), assistant("A word.")]})
    assert conversation["messages"][0] == user("What is <image>?")


# --- real layouts


def turns(*said, speakers=("human", "gpt")):
    return [{"from": speakers[number % 2], "value": text} for number, text in enumerate(said)]


def messages(*said):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]


DIALOGUE = [user("What?"), assistant("A dog."), user("Sure?"), assistant("Yes.")]
CAPTIONED = [user("image"), assistant("A dog.")]
SHOWN = [user("image", "What?"), *DIALOGUE[1:]]

# Rows of a data set, each with the images and the messages that it holds. Where rows differ, `datasets` adds nulls.
FORMATS = {
    "TRL messages, content as text": [
        ({"messages": messages("What?", "A dog.", "Sure?", "Yes."), "images": [IMAGE]}, [IMAGE], SHOWN),
        ({"messages": messages("Hi.", "Hello."), "images": []}, [], [user("Hi."), assistant("Hello.")]),
        (
            {"messages": [{**user("Hi."), "content": "Hi."}, {**messages("", "")[1], "train": False, "weight": 0.5}]},
            [],
            [user("Hi."), {**assistant(""), "train": False, "weight": 0.5}],
        ),
    ],
    "TRL messages, content as parts": [
        (
            {"images": [IMAGE, OTHER], "messages": [user("image", "and", "image"), assistant("Dogs.")]},
            [IMAGE, OTHER],
            [user("image", "and", "image"), assistant("Dogs.")],
        ),
        ({"images": None, "messages": [user("Hi."), assistant("Hello.")]}, [], [user("Hi."), assistant("Hello.")]),
        # llava-instruct-mix-vsft numbers its image parts.
        (
            {
                "images": [IMAGE],
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image", "index": 0}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
                ],
            },
            [IMAGE],
            [user("Look", "image"), assistant("Yes.")],
        ),
    ],
    "messages with their images in the parts": [
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "path": "/a.jpg"}, text("What?")]},
                    assistant("A dog."),
                    {"role": "user", "content": [text("And"), {"type": "image", "image": OTHER}]},
                    assistant("Another."),
                ]
            },
            ["/a.jpg", OTHER],
            [user("image", "What?"), assistant("A dog."), user("And", "image"), assistant("Another.")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "url": "https://x.org/a.jpg"}, text("What?")]},
                    {"role": "user", "content": [{"type": "image", "base64": "AAAA"}]},
                ]
            },
            ["https://x.org/a.jpg", "data:image/*;base64,AAAA"],
            [user("image", "What?"), user("image")],
        ),
        ({"messages": [user("Hi."), assistant("Hello.")]}, [], [user("Hi."), assistant("Hello.")]),
    ],
    "OpenAI messages": [
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            text("What?"),
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
                            {"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}},
                        ],
                    },
                    assistant("A dog."),
                ]
            },
            ["data:image/png;base64,AA", "https://x.org/a.jpg"],
            [user("What?", "image", "image"), assistant("A dog.")],
        )
    ],
    "messages as JSON": [
        ({"messages": json.dumps(messages("What?", "A dog.")), "image": IMAGE}, [IMAGE], SHOWN[:2]),
    ],
    "TRL prompt and completion, texts": [
        ({"prompt": "What?", "completion": "A dog.", "image": IMAGE}, [IMAGE], SHOWN[:2]),
        ({"prompt": "Hi.", "completion": ""}, [], [user("Hi."), assistant("")]),
    ],
    "TRL prompt and completion, messages": [
        (
            {
                "prompt": [{"role": "system", "content": "Be brief."}, *messages("What?", "A dog.", "Sure?")],
                "completion": [{"role": "assistant", "content": "Yes."}],
                "images": [IMAGE],
            },
            [IMAGE],
            [
                {"role": "system", "content": [text("Be brief.")]},
                user("image", "What?"),
                {**assistant("A dog."), "train": False},
                user("Sure?"),
                assistant("Yes."),
            ],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Hi."}],
                "completion": [{"role": "assistant", "content": "Hello.", "weight": 2.0}],
            },
            [],
            [user("Hi."), {**assistant("Hello."), "weight": 2.0}],
        ),
    ],
    "LLaVA": [
        (
            {"id": "1", "image": "/coco/1.jpg", "conversations": turns("<image>\nWhat?", "A dog.", "Sure?", "Yes.")},
            ["/coco/1.jpg"],
            SHOWN,
        ),
        (
            {"image": "/coco/2.jpg", "conversations": turns("What?\n<image>", "A")},
            ["/coco/2.jpg"],
            [user("What?", "image"), assistant("A")],
        ),
        ({"image": "/coco/3.jpg", "conversations": turns("What?", "A dog.")}, ["/coco/3.jpg"], SHOWN[:2]),
        # mix665k's dialogues without image
        (
            {"id": "4", "model": "", "conversations": turns("What is <image>?", "A tag.")},
            [],
            [user("What is <image>?"), assistant("A tag.")],
        ),
    ],
    "LLaVA with several images": [
        (
            {
                "image": [IMAGE, OTHER, IMAGE],
                "conversations": turns("<image>\n<image>\n\nBoth", "<image> is said.", " then <image>now", "Yes."),
            },
            [IMAGE, OTHER, IMAGE],
            [
                user("image", "image", "\nBoth"),
                assistant("<image> is said."),
                user(" then ", "image", "now"),
                assistant("Yes."),
            ],
        ),
        ({"image": [], "conversations": turns("Hi.", "Hello.")}, [], [user("Hi."), assistant("Hello.")]),
        (
            {"image": [IMAGE], "conversations": turns("<image>", "A dog.")},
            [IMAGE],
            [user("image"), assistant("A dog.")],
        ),
        ({"image": [IMAGE], "conversations": turns("", "A dog.")}, [IMAGE], [user("image", ""), assistant("A dog.")]),
    ],
    "LLaVA-OneVision": [
        (
            {"id": "1", "image": IMAGE, "conversations": turns("<image>\nWhat?", "A dog."), "data_source": "x"},
            [IMAGE],
            SHOWN[:2],
        ),
        (
            {"id": "2", "image": None, "conversations": turns("Hi.", "Hello."), "data_source": "y"},
            [],
            [user("Hi."), assistant("Hello.")],
        ),
    ],
    "MiniCPM": [
        ({"image": "/a.jpg", "conversations": messages("<image>\nWhat?", "A dog.")}, ["/a.jpg"], SHOWN[:2]),
    ],
    "ShareGPT": [
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, *turns("What?", "A dog.")], "system": ""},
            [],
            [{"role": "system", "content": [text("Be brief.")]}, *DIALOGUE[:2]],
        ),
        (
            {
                "conversations": [
                    {**turn, "weight": 1.0} for turn in turns("What?", "A dog.", speakers=("user", "model"))
                ],
                "system": "Be kind.",
            },
            [],
            [{"role": "system", "content": [text("Be kind.")]}, *[{**m, "weight": 1.0} for m in DIALOGUE[:2]]],
        ),
        ({"conversations": turns("What?", "A dog.", "Sure?", "Yes.", speakers=("user", "chatgpt"))}, [], DIALOGUE),
    ],
    "ShareGPT in the singular": [
        (
            {"conversation": turns("What?", "A dog.", "Sure?", speakers=("human", "bot")), "system_prompt": None},
            [],
            DIALOGUE[:3],
        ),
        (
            {"conversation": turns("What?", speakers=("human", "assistant")), "system_prompt": "Hm."},
            [],
            [{"role": "system", "content": [text("Hm.")]}, *DIALOGUE[:1]],
        ),
    ],
    "the_cauldron": [
        (
            {
                "images": [IMAGE],
                "texts": [
                    {"user": "What?", "assistant": "A dog.", "source": "AI2D"},
                    {"user": "Sure?", "assistant": "Yes.", "source": "AI2D"},
                ],
            },
            [IMAGE],
            SHOWN,
        ),
        (
            {"images": [IMAGE, OTHER], "texts": [{"user": "Hm", "assistant": ""}]},
            [IMAGE, OTHER],
            [user("image", "image", "Hm"), assistant("")],
        ),
    ],
    "FineVision": [
        (
            {
                "images": [IMAGE],
                "texts": [{"user": "What?", "assistant": "A dog."}],
                "source": "a",
                "relevance_ratings": [5],
                "relevance_min": 5,
            },
            [IMAGE],
            SHOWN[:2],
        ),
        (
            {"images": [], "texts": [{"user": "Hi.", "assistant": "Hello."}], "source": "b"},
            [],
            [user("Hi."), assistant("Hello.")],
        ),
    ],
    "VQA-RAD": [
        ({"image": IMAGE, "question": "What?", "answer": "A dog."}, [IMAGE], SHOWN[:2]),
        ({"image": None, "question": "Hi.", "answer": ""}, [], [user("Hi."), assistant("")]),
    ],
    "TextVQA": [
        ({"image": IMAGE, "question": "What?", "answers": ["cat", "A dog.", "bird", "A dog."]}, [IMAGE], SHOWN[:2]),
        ({"image": IMAGE, "question": "What?", "answers": ["A dog.", "cat"]}, [IMAGE], SHOWN[:2]),
    ],
    "VQAv2": [
        (
            {
                "question_type": "what is",
                "multiple_choice_answer": "A dog.",
                "answers": [
                    {"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(["cat", "A dog."])
                ],
                "image": IMAGE,
                "question": "What?",
            },
            [IMAGE],
            SHOWN[:2],
        ),
        (
            {"answers": [{"answer": a} for a in ("cat", "A dog.", "A dog.")], "image": IMAGE, "question": "What?"},
            [IMAGE],
            SHOWN[:2],
        ),
    ],
    "VQAv2 with a sequence of structs": [
        (
            {
                "answers": {"answer": ["cat", "A dog.", "A dog."], "answer_id": [1, 2, 3]},
                "image": IMAGE,
                "question": "What?",
            },
            [IMAGE],
            SHOWN[:2],
        ),
    ],
    "WebDataset of captions": [
        (
            {
                "__key__": "0",
                "__url__": "x.tar",
                "jpg": IMAGE,
                "png": None,
                "txt": "A dog.\n",
                "json": {"caption": "no", "width": 3},
            },
            [IMAGE],
            CAPTIONED,
        ),
        ({"__key__": "1", "__url__": "x.tar", "jpg": None, "png": OTHER, "txt": "A dog.\n"}, [OTHER], CAPTIONED),
    ],
    "WebDataset of dialogues": [
        (
            {
                "__key__": "0",
                "__url__": "x.tar",
                "jpeg": IMAGE,
                "json": {"image": "0.jpg", "__x__": 1, "conversations": turns("<image>\nWhat?", "A dog.")},
            },
            [IMAGE],
            SHOWN[:2],
        ),
        (
            {"__key__": "1", "__url__": "x.tar", "jpeg": IMAGE, "json": {"question": "What?", "answer": "A dog."}},
            [IMAGE],
            SHOWN[:2],
        ),
    ],
    "Flickr30k": [
        (
            {
                "image": IMAGE,
                "caption": ["A dog."],
                "sentids": ["1"],
                "split": "train",
                "img_id": "0",
                "filename": "0.jpg",
            },
            [IMAGE],
            CAPTIONED,
        ),
    ],
}
ROWS = [(name, row) for name, rows in FORMATS.items() for row, _, _ in rows]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stored", [False, True], ids=["plain", "through datasets"])
def test_a_real_row_becomes_the_conversation_it_holds(name, stored):
    rows = [row for row, _, _ in FORMATS[name]]
    if stored:
        names = {column: None for row in rows for column in row}
        rows = list(datasets.Dataset.from_list([{**names, **row} for row in rows]))
        assert all(row.keys() == names.keys() for row in rows), "as in a data set, every row has every column"
    for index, (row, (_, images, said)) in enumerate(zip(rows, FORMATS[name])):
        before = copy.deepcopy(row)
        (conversation,) = conversations_from_row(row, source="s", index=index, allow_urls=True)
        assert conversation == {"images": images, "messages": said, "group": index, "source": "s", "row": index}
        assert row == before, "the row itself is left as it is"


def test_a_json_column_gives_every_message_its_own_kind_of_content():
    """Text in one message and parts in the next: Arrow has no type for it, and `datasets` stores JSON."""
    said = [messages("What?")[0], assistant("A dog."), {**messages("Sure?")[0], "weight": 1}, assistant("Yes.")]
    features = datasets.Features({"messages": datasets.Json(), "image": datasets.Value("string")})
    rows = datasets.Dataset.from_list([{"messages": said, "image": "/a.jpg"}], features=features)
    (conversation,) = conversations_from_row(rows[0])
    assert conversation["images"] == ["/a.jpg"]
    assert conversation["messages"] == [*SHOWN[:2], {**DIALOGUE[2], "weight": 1}, DIALOGUE[3]]


def test_a_webdataset_is_read_as_datasets_reads_it(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (2, 2)).save(picture, "png")
    members = {
        "0.png": picture.getvalue(),
        "0.json": json.dumps({"image": "0.png", "conversations": turns("<image>\nWhat?", "A dog.")}).encode(),
        "1.png": picture.getvalue(),
        "1.json": json.dumps({"image": "1.png", "conversations": turns("What?", "A dog.")}).encode(),
    }
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    rows = datasets.load_dataset("webdataset", data_files=str(tmp_path / "train.tar"), split="train")
    for row in rows.cast_column("png", datasets.Image(decode=False)):
        (conversation,) = conversations_from_row(row)
        assert conversation["images"][0]["bytes"] == picture.getvalue() and conversation["messages"] == SHOWN[:2]


# --- images


def test_an_image_is_looked_for_where_the_data_set_may_have_it(tmp_path):
    row = {"image": "train/1.jpg", "conversations": turns("<image>\nWhat?", "A dog.")}
    (conversation,) = conversations_from_row(row, image_dir=tmp_path)
    assert conversation["images"] == [str(tmp_path / "train/1.jpg")]
    part = {"type": "image", "path": "train/2.jpg"}
    (conversation,) = conversations_from_row({"messages": [{"role": "user", "content": [part]}]}, image_dir=tmp_path)
    assert conversation["images"] == [str(tmp_path / "train/2.jpg")]
    for options in ({}, {"image_dir": tmp_path / "train"}):
        outside = {"image": ["/a.jpg", "../1.jpg"], "text": "A dog."}
        with pytest.raises(MalformedRow, match="^s, row 3: the image .*--image_dir$") as caught:
            conversations_from_row(outside, source="s", index=3, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(MalformedRow, match="^row 0: the image https://x.org/a.jpg is a URL"):
        conversations_from_row({"image": "https://x.org/a.jpg", "text": "A dog."})


# --- columns of other names


def test_a_column_of_another_name_is_read_where_it_is_given():
    row = {"query": "What?", "label": ["A dog."], "image": "no", "photo": "/a.jpg", "text": "no"}
    columns = {"question": "query", "answer": "label", "image": "photo"}
    (conversation,) = conversations_from_row(row, columns=columns)
    assert conversation["images"] == ["/a.jpg"] and conversation["messages"] == SHOWN[:2]


def test_a_given_column_goes_before_what_is_recognised():
    row = {"messages": messages("Hi.", "Hello."), "caption": "no", "long": ["A dog.", "Dogs."], "image": "/a.jpg"}
    found = conversations_from_row(row, columns={"text": "long"})
    assert [conversation["messages"][1] for conversation in found] == [assistant("A dog."), assistant("Dogs.")]
    # An image belongs to any layout, so its name says nothing of which.
    (conversation,) = conversations_from_row(row, columns={"images": "image"})
    assert conversation["messages"] == [user("image", "Hi."), assistant("Hello.")]


def test_a_given_column_goes_by_that_name_alone():
    with pytest.raises(MalformedRow, match="found columns image, question; expected a known layout"):
        conversations_from_row({"image": "/a.jpg", "text": "A dog."}, columns={"question": "text"})


def test_a_conversation_has_the_system_text_of_its_own_turn_or_of_the_column():
    own = {"from": "system", "value": "Own."}
    for said, column, expected in [
        ([own], "Column.", ["Own."]),
        ([own], "", ["Own."]),
        ([], "Column.", ["Column."]),
        ([], "", []),
        ([], None, []),
    ]:
        (conversation,) = conversations_from_row({"conversations": said + turns("Hi.", "Hello."), "system": column})
        system = [{"role": "system", "content": [text(words)]} for words in expected]
        assert conversation["messages"] == [*system, user("Hi."), assistant("Hello.")]


def test_what_json_holds_can_be_given_too():
    row = {"jpg": IMAGE, "json": {"query": "What?", "label": "A dog."}}
    columns = {"question": "query", "answer": "label"}
    (conversation,) = conversations_from_row(row, columns=columns)
    assert conversation["messages"] == SHOWN[:2]
    assert caption_column(row, columns) is None


def test_a_wrong_column_is_one_line():
    row = {"photo": "/a.jpg", "text": "A dog."}
    expected = "found columns photo, text; expected the column 'picture' that was given$"
    with pytest.raises(MalformedRow, match="^s, row 2: " + expected):
        conversations_from_row(row, columns={"image": "picture"}, source="s", index=2)
    with pytest.raises(MalformedRow, match="^" + expected):
        caption_column(list(row), {"image": "picture"})
    with pytest.raises(ValueError, match="columns has 'picture'; expected one of .*images.*question") as caught:
        conversations_from_row(row, columns={"picture": "photo"})
    assert not isinstance(caught.value, MalformedRow), "no row is to blame"


def test_the_column_that_says_how_many_conversations_a_row_gives():
    assert caption_column(["image", "caption", "sentids"]) == "caption"
    assert caption_column(["jpg", "txt", "__key__"]) == "txt"
    assert caption_column(["photo", "legend"], {"image": "photo", "captions": "legend"}) == "legend"
    assert caption_column(["image", "question", "answer", "text"]) is None
    assert caption_column(["messages", "image", "text"]) is None
    assert caption_column(["messages", "image", "text"], {"caption": "text"}) == "text"
    assert caption_column(["foo"]) is None


@pytest.mark.parametrize(
    "row",
    [
        {"messages": None, "image": "/a.jpg", "caption": ["one", "two"]},
        {"image": "/a.jpg", "caption": None, "text": ["one", "two"]},
        {"image": "/a.jpg", "json": {"caption": ["one", "two"]}},
    ],
)
def test_captions_that_no_column_name_promises_are_refused(row):
    """Else the number of conversations would be known only after reading every row."""
    with pytest.raises(MalformedRow, match="found 2 conversation.* where the columns promise 1; expected"):
        conversations_from_row(row)


# --- what is wrong with a row


def chat(*messages, **columns):
    return {"messages": list(messages), **columns}


def parts(*content):
    return chat({"role": "user", "content": list(content)})


MALFORMED = [
    ({"foo": 1, "bar": 2}, "found columns foo, bar; expected a known layout, such as "),
    ({}, "found columns (none)"),
    ({"image": "/a.jpg"}, "found columns image; expected a known layout, such as image + caption, captions or text"),
    ({"caption": "A dog."}, "found columns caption; expected a known layout, such as image + caption, captions or"),
    ({"image": None, "caption": "A dog."}, "found no image"),
    ({"image": [], "caption": "A dog."}, "found no image"),
    ({"image": "", "caption": "A dog."}, "found '' as image; expected an image: its path, or its bytes"),
    ({"image": {"bytes": None, "path": None}, "caption": "A dog."}, "as image; expected an image"),
    ({"image": 3, "caption": "A dog."}, "found 3 as image"),
    ({"image": "/a.jpg", "caption": None}, "found None as caption; expected a text, or a list of texts"),
    ({"image": "/a.jpg", "caption": []}, "found an empty list in caption"),
    ({"image": "/a.jpg", "caption": ["A dog.", None]}, "found None as caption"),
    ({"image": "/a.jpg", "caption": " \n"}, r"found ' \n' as caption"),
    ({"image": "/a.jpg", "text": True}, "found True as text; expected a text, or a list of texts"),
    ({"image": "/a.jpg", "text": float("nan")}, "found nan as text"),
    ({"messages": None}, "found None as messages; expected a list of messages"),
    (chat(), "found [] as messages"),
    (chat("Hello."), "found 'Hello.' as message 0; expected a message with role and content"),
    (
        chat({"role": "human", "content": "Hi."}),
        "found role 'human' in message 0; expected one of system, user, assist",
    ),
    (chat({"content": "Hi."}), "found role None in message 0"),
    (chat(user("Hi."), {"role": "assistant", "content": None}), "found None as content of message 1"),
    (chat({"role": "user", "content": ["Hi."]}), "found a part 'Hi.' in message 0"),
    (chat({"role": "user", "content": [{"type": "video"}]}), "found a part {'type': 'video'} in message 0"),
    (chat({"role": "user", "content": "Hi.", "train": "yes"}), "found 'yes' as train of message 0; expected true or f"),
    (chat({"role": "user", "content": "Hi.", "weight": -1}), "found -1 as weight of message 0; expected a number, at"),
    (chat({"role": "user", "content": "Hi.", "weight": True}), "found True as weight of message 0"),
    (chat({"role": "user", "content": "Hi.", "weight": float("nan")}), "found nan as weight of message 0"),
    (chat({"role": "user", "content": "Hi.", "weight": float("inf")}), "found inf as weight of message 0"),
    ({"messages": "Hi."}, "found 'Hi.' as messages; expected a list of messages"),
    ({"messages": "{}"}, "found '{}' as messages; expected a list of messages"),
    (
        chat(user("image", "image"), images=["/a.jpg"]),
        "found 2 image part(s) in the messages but 1 image(s) in the row",
    ),
    (chat(user("image")), "found 1 image part(s) in the messages but 0 image(s)"),
    (chat(assistant("Hi."), image="/a.jpg"), "found 1 image(s) and no user message"),
    (chat({"role": "user", "content": [{"type": "image", "index": 1}]}, image="/a.jpg"), "image part 0 with index 1"),
    (chat(user("Hi."), image=[None]), "found None as image"),
    (parts({"type": "image", "image": "/a.jpg", "url": "/b.jpg"}), "found a part {'type': 'image', 'image': '/a.jpg'"),
    (parts({"type": "image", "image": 3}), "found 3 as image in message 0; expected an image: its path, or its bytes"),
    (parts({"type": "image_url", "image_url": {"url": None}}), "found None as image in message 0; expected an image"),
    (parts({"type": "image_url"}), "found None as image in message 0; expected an image"),
    (
        parts({"type": "image", "image": "/a.jpg"}, {"type": "image"}),
        "found 1 image part(s) with an image, 1 without, and 0 image(s) in a column; expected all images in the ",
    ),
    (
        {**parts({"type": "image", "image": "/a.jpg"}), "images": [IMAGE]},
        "found 1 image part(s) with an image, 0 without, and 1 image(s) in a column; expected all images in the ",
    ),
    ({"prompt": None, "completion": "A dog."}, "found None as prompt; expected a text or a list of messages"),
    ({"prompt": "What?", "completion": []}, "found [] as completion; expected a text or a list of messages"),
    ({"prompt": messages("What?"), "completion": ["A dog."]}, "found 'A dog.' as completion message 0"),
    ({"conversations": []}, "found [] as conversations; expected a list of turns"),
    ({"conversation": ["Hi."]}, "found 'Hi.' as turn 0; expected a turn with from and value"),
    ({"conversations": [{"from": "human"}]}, "found None as content of turn 0"),
    (
        {"conversations": [{"from": "tool", "value": "1"}]},
        "found role 'tool' in turn 0; expected one of system, human,",
    ),
    ({"conversations": [{"from": ["gpt"], "value": "1"}]}, "found role ['gpt'] in turn 0"),
    ({"conversations": turns("Hi."), "system": True}, "found True as system; expected a text"),
    (
        {"conversations": turns("<image>\n<image>\nWhat?", "A"), "image": "/a.jpg"},
        "found 2 <image> in the turns but 1 image(s) in the row; expected one <image> for each image, or none at all",
    ),
    (
        {"conversations": turns("<image>\nWhat?", "A"), "image": ["/a.jpg", "/b.jpg"]},
        "found 1 <image> in the turns but 2 image(s) in the row",
    ),
    ({"texts": [], "images": [IMAGE]}, "found [] as texts; expected a list of pairs of user and assistant"),
    ({"texts": ["A dog."], "image": IMAGE}, "found 'A dog.' as texts 0; expected a pair of user and assistant"),
    ({"texts": [{"user": "What?", "assistant": None}]}, "found None as assistant of texts 0; expected a text"),
    ({"question": None, "answer": "A"}, "found None as question; expected a text"),
    ({"question": "What?", "answer": True}, "found True as answer; expected a text"),
    ({"question": "What?", "answer": float("nan")}, "found nan as answer; expected a text"),
    ({"prompt": "What?", "completion": False}, "found False as completion; expected a text"),
    ({"question": "What?", "answers": []}, "found an empty list in answers; expected at least one answer"),
    ({"question": "What?", "answers": ["A", {"answer": None}]}, "found None as answers; expected a text"),
    ({"question": "What?", "answers": {"text": ["A"]}}, "found None as answers; expected a text"),
]


@pytest.mark.parametrize(("row", "message"), MALFORMED)
def test_a_malformed_row_is_one_line_with_its_place(row, message):
    with pytest.raises(MalformedRow) as caught:
        conversations_from_row(row, source="data.jsonl", index=12)
    line = str(caught.value)
    assert line.startswith("data.jsonl, row 12: found ") and message in line
    assert "; expected " in line and "\n" not in line and len(line) < 330


@pytest.mark.parametrize(
    ("names", "nearest"),
    [
        (["photo", "capton", "img"], "image + caption"),
        (["Messages"], "messages"),
        (["conversation_history", "id"], "conversations"),
        (["Question", "Answer"], "question + answer"),
        (["prompt", "completions"], "prompt + completion"),
        (["text_list", "images"], "image + caption"),
    ],
)
def test_an_unknown_layout_names_its_columns_and_the_nearest_known_ones(names, nearest):
    with pytest.raises(MalformedRow) as caught:
        conversations_from_row(dict.fromkeys(names, 1))
    line = str(caught.value)
    assert f"columns {', '.join(names)}; expected a known layout, such as {nearest}" in line
    assert sum(layout.description in line for layout in LAYOUTS) == 3


def test_columns_for_the_program_are_not_named():
    """WebDataset's own, and the number that a row has where it is stored."""
    row = {"__key__": "0", "__url__": "x.tar", "jpg": IMAGE, "__row": 3}
    for columns in (None, {"caption": "text"}):
        with pytest.raises(MalformedRow, match="found columns jpg; expected"):
            conversations_from_row(row, columns=columns)


def test_what_python_cannot_write_out_is_still_one_line():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for value in (nested, 10**10_000):
        with pytest.raises(MalformedRow, match=f"found a {type(value).__name__} as question"):
            conversations_from_row({"question": value, "answer": ""})
    with pytest.raises(MalformedRow, match=r"found '\[\[\["):
        conversations_from_row({"messages": "[" * 100_000})


# --- any row at all


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
            row, source="s", index=5, columns=columns, image_dir=image_dir, allow_urls=allow_urls
        )
    except MalformedRow as error:
        line = str(error)
        assert line.startswith("s, row 5: ") and len(line.splitlines()) == 1 and len(line) < 700
    else:
        cell = row.get(caption_column(row, columns))
        assert len(found) == (len(cell) if isinstance(cell, list) and cell else 1)
        for conversation in found:
            check_conversation(conversation, allow_urls)
    assert repr(row) == before


def check_conversation(conversation, allow_urls):
    assert {key: conversation[key] for key in ("group", "source", "row")} == {"group": 5, "source": "s", "row": 5}
    assert conversation.keys() == {"images", "messages", "group", "source", "row"}
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
