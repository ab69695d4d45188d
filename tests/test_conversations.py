"""A row becomes the conversations it holds, or one line that says what is wrong."""

import pytest
from PIL import Image

from processing.image_files_vlm import ImagePolicy
from processing.reading.cells import MalformedRow
from processing.reading.conversations import caption_column, conversations_from_row
from processing.reading.layouts import LAYOUTS
from tests.rows import IMAGE, SHOWN, assistant, messages, spoken, text, turns, user


def test_a_row_with_captions_gives_adjacent_conversations_of_one_group():
    row = {"image": IMAGE, "caption": ["A dog.", " A brown dog. \n"], "sentids": ["1", "2"], "split": "train"}
    conversations = conversations_from_row(row, source="flickr", index=7)
    assert [spoken(conversation) for conversation in conversations] == [
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
    assert spoken(conversation) == {
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


# --- images


def test_an_image_is_looked_for_where_the_data_set_may_have_it(tmp_path):
    row = {"image": "train/1.jpg", "conversations": turns("<image>\nWhat?", "A dog.")}
    (conversation,) = conversations_from_row(row, images=ImagePolicy(tmp_path))
    assert conversation["images"] == [str(tmp_path / "train/1.jpg")]
    part = {"type": "image", "path": "train/2.jpg"}
    row = {"messages": [{"role": "user", "content": [part]}]}
    (conversation,) = conversations_from_row(row, images=ImagePolicy(tmp_path))
    assert conversation["images"] == [str(tmp_path / "train/2.jpg")]
    for options in ({}, {"images": ImagePolicy(tmp_path / "train")}):
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
    with pytest.raises(
        MalformedRow, match="found 2 captions in a row whose columns may be another layout, too; expected"
    ):
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
    ({"image": "", "caption": "A dog."}, "found no image; expected an image for the caption"),
    ({"image": {"bytes": None, "path": None}, "caption": "A dog."}, "found no image"),
    ({"image": 3, "caption": "A dog."}, "found 3 as image"),
    ({"image": "/a.jpg", "caption": None}, "found None as caption; expected a text, or a list of texts"),
    ({"image": "/a.jpg", "caption": []}, "found an empty list in caption"),
    ({"image": "/a.jpg", "caption": ["", None]}, "found '' as caption"),
    ({"image": "/a.jpg", "caption": " \n"}, r"found ' \n' as caption"),
    ({"image": "/a.jpg", "text": True}, "found True as text; expected a text, or a list of texts"),
    ({"image": "/a.jpg", "text": float("nan")}, "found nan as text"),
    ({"messages": None}, "found None as messages; expected a list of messages"),
    (chat(), "found [] as messages"),
    (chat("Hello."), "found 'Hello.' as message 0; expected a message with role and content"),
    (
        chat({"role": "tool", "content": "Hi."}),
        "found role 'tool' in message 0; expected one of system, human, user, ",
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
    (chat(user("Hi."), image=[3]), "found 3 as image"),
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
    ({"question": "What?", "answers": [{"answer": None}, {"answer": None}]}, "found None as answers; expected a text"),
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


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"image": "/a.jpg", "query": "What?", "verdict": ["x"]}, "--columns answer=verdict"),
        ({"image_url": "/a.jpg", "description": "A dog."}, "--columns caption=description"),
        ({"image": "/a.jpg", "tags": "x", "title": "A dog."}, "--columns caption=NAME"),
        ({"photo": "/a.jpg", "shows": "A dog."}, "--columns image=photo,caption=shows"),
        ({"pictures": [b"\x89PNG\r\n\x1a\n"], "q": "What?", "a": "x"}, "--columns image=pictures,caption=NAME"),
        ({"photo": "/a.jpg", "question": "What?", "reply": "x"}, "--columns image=photo,answer=reply"),
        ({"image": "/a.jpg", "label": "cat", "id": 3}, "--columns caption=label"),
        ({"image": "/a.jpg"}, "the folder of its images with --image_dir"),
        ({"shot": "/a.jpg", "caption": "A dog."}, "--columns image=shot"),
        ({"prompt": "What?", "chosen": "x", "rejected": "y"}, "--columns completion=NAME"),
    ],
)
def test_an_unknown_layout_says_what_to_name(row, remedy):
    with pytest.raises(MalformedRow, match=f"{remedy}$"):
        conversations_from_row(row)


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"question": "What?", "answer": None}, "found None as answer"),
        ({"image": "/a.jpg", "question": "What?", "answer": []}, "found an empty list in answer"),
        ({"prompt": "What?", "completion": None}, "found None as completion"),
        ({"image": None, "caption": "A dog."}, "found no image"),
    ],
)
def test_what_a_row_lacks_is_named_whatever_other_columns_its_file_has(row, missing):
    others = dict.fromkeys(("messages", "conversations", "question", "answer", "caption", "prompt", "completion"))
    for beside in ({}, others):
        with pytest.raises(MalformedRow, match=f"row 0: {missing}"):
            conversations_from_row({**beside, **row})


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
