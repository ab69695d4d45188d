"""Rows of every known layout become the conversations they hold; anything else is one line that says what is wrong."""

import pytest
from PIL import Image

from processing.conversations import LAYOUTS, conversations_from_row


IMAGE = {"bytes": b"...", "path": "a.jpg"}


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
    (conversation,) = conversations_from_row({image_column: "a.jpg", column: "A dog."})
    assert conversation["images"] == ["a.jpg"]
    assert conversation["messages"] == [user("image"), assistant("A dog.")]


def test_a_caption_answers_the_prompt_and_the_image_stands_before_it():
    prompt = "[用户] 请描述这张图片。\n[助手] "
    (conversation,) = conversations_from_row({"image": "a.jpg", "caption": ["A dog."]}, prompt=prompt)
    assert conversation["messages"][0] == user("image", prompt)


def test_caption_choice_keeps_the_first_or_all_captions():
    row = {"image": "a.jpg", "caption": ["one", "two", "three"]}
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
    (conversation,) = conversations_from_row({"messages": messages, "images": ["a.jpg", "b.jpg"]})
    assert conversation["messages"][1] == user("image", "image", "What?")
    assert messages[1]["content"] == "What?", "the row itself is left as it is"


@pytest.mark.parametrize("images", [{}, {"image": None}, {"images": []}, {"images": None, "image": None}])
def test_a_dialogue_without_image_is_read(images):
    (conversation,) = conversations_from_row({"messages": [user("Hello."), assistant("Hi.")], **images})
    assert conversation["images"] == [] and conversation["messages"] == [user("Hello."), assistant("Hi.")]


def test_a_null_cell_is_an_absent_one():
    (conversation,) = conversations_from_row({"messages": None, "image": "a.jpg", "images": None, "text": "A dog."})
    assert conversation["images"] == ["a.jpg"] and conversation["messages"][1] == assistant("A dog.")


def test_an_image_object_stays_the_object_it_is():
    image = Image.new("RGB", (2, 2))
    (conversation,) = conversations_from_row({"image": image, "text": "A dot."})
    assert conversation["images"][0] is image


def test_a_typed_image_token_stays_text():
    (conversation,) = conversations_from_row({"messages": [user("What is <image>?"), assistant("A word.")]})
    assert conversation["messages"][0] == user("What is <image>?")


def chat(*messages, **columns):
    return {"messages": list(messages), **columns}


MALFORMED = [
    ({"foo": 1, "bar": 2}, "found columns foo, bar; expected one of the known layouts: messages [+ images or image]; "),
    ({}, "found columns (none)"),
    ({"image": "a.jpg"}, "found columns image; expected one of the known layouts"),
    ({"caption": "A dog."}, "found columns caption; expected one of the known layouts"),
    ({"image": None, "caption": "A dog."}, "found no image"),
    ({"image": [], "caption": "A dog."}, "found no image"),
    ({"image": "", "caption": "A dog."}, "found '' as image; expected an image: its path, or its bytes"),
    ({"image": {"bytes": None, "path": None}, "caption": "A dog."}, "as image; expected an image"),
    ({"image": 3, "caption": "A dog."}, "found 3 as image"),
    ({"image": "a.jpg", "caption": None}, "found None as caption; expected a text, or a list of texts"),
    ({"image": "a.jpg", "caption": []}, "found an empty list in caption"),
    ({"image": "a.jpg", "caption": ["A dog.", None]}, "found None as caption"),
    ({"image": "a.jpg", "caption": " \n"}, r"found ' \n' as caption"),
    ({"image": "a.jpg", "text": 5}, "found 5 as text"),
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
    (chat({"role": "user", "content": [{"type": "image", "image": "a.jpg"}]}), "the image itself in the images column"),
    (chat({"role": "user", "content": "Hi.", "train": "yes"}), "found 'yes' as train of message 0; expected true or f"),
    (chat(user("image", "image"), images=["a.jpg"]), "found 2 image part(s) in the messages but 1 image(s) in the row"),
    (chat(user("image")), "found 1 image part(s) in the messages but 0 image(s)"),
    (chat(assistant("Hi."), image="a.jpg"), "found 1 image(s) and no user message"),
    (chat({"role": "user", "content": [{"type": "image", "index": 1}]}, image="a.jpg"), "image part 0 with index 1"),
    (chat(user("Hi."), image=[None]), "found None as image"),
]


@pytest.mark.parametrize(("row", "message"), MALFORMED)
def test_a_malformed_row_is_one_line_with_its_place(row, message):
    with pytest.raises(ValueError) as caught:
        conversations_from_row(row, source="data.jsonl", index=12)
    line = str(caught.value)
    assert line.startswith("data.jsonl, row 12: found ") and message in line
    assert "; expected " in line and "\n" not in line and len(line) < 300


def test_an_unknown_layout_names_every_known_one():
    with pytest.raises(ValueError) as caught:
        conversations_from_row({"foo": 1})
    assert all(layout.description in str(caught.value) for layout in LAYOUTS)
