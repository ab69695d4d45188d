"""What in a row speaks of an image is read as one in its place, or the row is refused; it is never passed over."""

import pytest
from PIL import Image

from processing.image_files_vlm import ImagePolicy
from processing.reading.cells import MalformedRow
from processing.reading.conversations import conversations_from_row
from processing.reading.messages import MAX_WEIGHT
from tests.rows import IMAGE, OTHER, assistant, messages, spoken, text, turns, user


FOLDER = ImagePolicy("/d", allow_urls=True)
PICTURE = b"\x89PNG\r\n\x1a\n..."
STORED = {"bytes": PICTURE, "path": None}
ENCODED = "iVBORw0KGgo" + "A" * 60


def read(row, **options):
    (conversation,) = conversations_from_row(row, images=FOLDER, **options)
    return conversation


def asked(row):
    """What the user says in a row, the images by their numbers."""
    conversation = read(row)
    images = iter(conversation["images"])
    return [
        "".join(f"[{next(images)}]" if part["type"] == "image" else part["text"] for part in message["content"])
        for message in conversation["messages"]
        if message["role"] == "user"
    ]


# --- tags


TWO = {"images": ["a.png", "b.png"]}
PLACED = "Now look at [/d/a.png] and [/d/b.png]."
TAGGED = "Now look at <image> and <image>."


@pytest.mark.parametrize(
    "said",
    [
        {"messages": messages(TAGGED, "two cats")},
        {"messages": [{"role": "user", "content": [text(TAGGED)]}, assistant("two cats")]},
        {"prompt": TAGGED, "completion": "two cats"},
        {"prompt": messages(TAGGED), "completion": [assistant("two cats")]},
        {"conversations": turns(TAGGED, "two cats")},
        {"question": TAGGED, "answer": "two cats"},
        {"query": TAGGED, "response": "two cats"},
        {"texts": [{"user": TAGGED, "assistant": "two cats"}]},
    ],
    ids=lambda said: next(iter(said)),
)
def test_as_many_tags_as_images_are_their_places_and_another_number_is_refused(said):
    assert asked({**said, **TWO}) == [PLACED]
    for images in (["a.png"], ["a.png", "b.png", "c.png"]):
        with pytest.raises(MalformedRow, match=r"found 2 <image> in the turns but \d image\(s\) in the row; "):
            read({**said, "images": images})


def test_tags_of_a_row_without_images_are_text_and_noted():
    for said in ({"messages": messages(TAGGED, "<image>")}, {"prompt": TAGGED, "completion": "<image>"}):
        conversation = read(said)
        assert conversation["messages"] == [user(TAGGED), assistant("<image>")] and conversation["images"] == []
        assert conversation["notes"] == ["<image> stands as text"]


def test_tags_of_several_turns_are_counted_together():
    row = {"texts": [{"user": "<image>a", "assistant": "<image>"}, {"user": "b<image>", "assistant": ""}], **TWO}
    assert asked(row) == ["[/d/a.png]a", "b[/d/b.png]"]
    row = {"query": "<image>Q", "response": "R", "history": [["q <image>", "r"]], **TWO}
    assert asked(row) == ["q [/d/a.png]", "[/d/b.png]Q"]


def test_numbered_tags_say_which_image_and_may_speak_of_one_again():
    row = {"question": "<image 2> or <image 1>, not as <image 2>?", "answer": "x", **TWO}
    assert asked(row) == ["[/d/b.png] or [/d/a.png], not as <image 2>?"]
    assert read(row)["notes"] == ["<image 1> stands as text"]
    for tags in ("<|image_1|>\n<|image_2|>\n", "<image_1><image_2>", "<image1>\n<image2>", "<|image|><|image|>\n"):
        assert asked({"messages": messages(f"{tags}What?", "x"), **TWO}) == ["[/d/a.png][/d/b.png]What?"]
    with pytest.raises(MalformedRow, match="found 1 <image 1> in the turns but 2 image"):
        read({"question": "<image 1> or <image 1>?", "answer": "x", **TWO})


def test_a_tag_that_holds_its_path_is_the_image():
    said = "Picture 1: <img>a/b.jpg</img>\nWhat?"
    assert asked({"conversations": turns(said, "x", speakers=("user", "assistant"))}) == [
        "Picture 1: [/d/a/b.jpg]\nWhat?"
    ]
    assert asked({"query": "<img>a.jpg</img> and <img>b.png</img>", "response": "x"}) == ["[/d/a.jpg] and [/d/b.png]"]
    assert read({"query": "<img>no</img>", "response": "x"})["notes"] == ["<img> stands as text"]


def test_a_tag_where_the_layout_places_images_is_refused_without_one():
    for said in ("<image>\nWhat is it?", "What is it?\n<image>", "<image> What?", "<|image_1|>\nWhat?"):
        for image in ({}, {"image": None}, {"image": ""}):
            row = {"conversations": turns(said, "a cat"), **image}
            line = r"found <\S+> in the turns but no image in the row; expected .* or --columns image=ignore"
            with pytest.raises(MalformedRow, match=line):
                read(row)
            conversation = read(row, columns={"image": "ignore"})
            assert conversation["messages"][0] == user(said) and len(conversation["notes"]) == 1
    assert read({"conversations": turns("What is <image>?", "A tag.")})["notes"] == ["<image> stands as text"]


# --- columns of images


@pytest.mark.parametrize(
    "name",
    ["img", "image_path", "image_paths", "image_file", "image_url", "img_path", "filename", "file_name", "url", "URL"],
)
def test_an_image_is_read_from_columns_that_are_called_otherwise(name):
    assert asked({name: "a.png", "conversations": turns("<image>\nWhat?", "a cat")}) == ["[/d/a.png]What?"]
    assert asked({name: ["a.png"], "question": "What?", "answer": "a cat"}) == ["[/d/a.png]What?"]


def test_a_file_is_an_image_only_where_it_is_called_one():
    for name in ("filename", "url"):
        conversation = read({name: "doc.txt", "messages": messages("Hi.", "Hello.")})
        assert conversation["images"] == [] and conversation["notes"] == [f"the column {name} is not read"]


def test_numbered_columns_are_images_in_their_order():
    names = [f"image_{number}" for number in (10, 2, 1, 3)]
    row = {**{name: f"{name}.png" for name in names}, "image_3": None, "question": "What?", "answer": "x"}
    assert read(row)["images"] == ["/d/image_1.png", "/d/image_2.png", "/d/image_10.png"]
    tagged = {"image_1": STORED, "image_2": "b.png", "image_3": None, "q": "<image 2> <image 1>", "answer": "x"}
    assert read(tagged, columns={"question": "q"})["images"] == ["/d/b.png", STORED]
    assert read(row, columns={"image_10": "ignore"})["images"] == ["/d/image_1.png", "/d/image_2.png"]


@pytest.mark.parametrize(
    "names",
    [("left_image", "right_image"), ("Image_Left", "Image_Right"), ("image_before", "image_after"), ("img_a", "img_b")],
)
def test_a_pair_of_columns_is_two_images_in_their_order(names):
    row = {names[1]: "b.png", names[0]: "a.png", "question": "Same?", "answer": "no"}
    assert read(row)["images"] == ["/d/a.png", "/d/b.png"] and "notes" not in read(row)
    assert asked({**row, "question": "<image> as <image>?"}) == ["[/d/a.png] as [/d/b.png]?"]
    with pytest.raises(MalformedRow, match=f"--columns image={names[1]}, or --columns {names[1]}=ignore"):
        read({names[1]: "b.png", "question": "Same?", "answer": "no"})


def test_several_columns_of_other_names_are_images_in_the_order_that_is_given():
    row = {"near": "b.png", "far": "a.png", "image": "c.png", "question": "Same?", "answer": "no"}
    conversation = read(row, columns={"image_1": "far", "image_2": "near"})
    assert conversation["images"] == ["/d/a.png", "/d/b.png"]
    assert conversation["notes"] == ["the column image is not read"]
    with pytest.raises(MalformedRow, match="expected the column 'nearer' that was given"):
        read(row, columns={"image_1": "far", "image_2": "nearer"})


def test_what_a_part_says_beside_its_image_costs_no_image():
    for settings in ({"min_pixels": 3136, "max_pixels": 50176}, {"detail": "low"}, {"resized_height": 280.0}):
        for row, part in (({}, {"image": "a.png"}), ({"images": ["a.png"]}, {})):
            content = [{"type": "image", **part, **settings}, {"type": "text", "text": "What?"}]
            conversation = read({**row, "messages": [{"role": "user", "content": content}, assistant("x")]})
            assert conversation["images"] == ["/d/a.png"] and conversation["messages"][0] == user("image", "What?")
            assert conversation["notes"] == [f"the key {key} of an image part is not read" for key in settings]
    for other in ({"text": "a caption"}, {"image_url": "b.png"}, {"source": {"data": "AAAA"}}):
        content = [{"type": "image", "image": "a.png", **other}]
        with pytest.raises(MalformedRow, match="found a part {'type': 'image', 'image': 'a.png', "):
            read({"messages": [{"role": "user", "content": content}, assistant("x")]})


UNREAD = [
    ({"photo": "a.png"}, "photo", True),
    ({"picture": "no ending"}, "picture", True),
    ({"thumbnail": STORED}, "thumbnail", True),
    ({"near_image": "a.png", "far_image": "b.png"}, "near_image", True),
    ({"x": "https://x.org/a.jpeg?size=3"}, "x", True),
    ({"x": "deep/down/A.JPG"}, "x", True),
    ({"x": PICTURE}, "x", True),
    ({"x": [None, PICTURE]}, "x", True),
    ({"x": ["a.png"]}, "x", True),
    ({"x": Image.new("RGB", (2, 2))}, "x", True),
    ({"x": "data:image/png;base64,AAAA"}, "x", True),
    ({"x": ENCODED}, "x", True),
    ({"imgid": "n161313"}, "imgid", False),
    ({"image_id": 458752}, "image_id", False),
    ({"has_image": True}, "has_image", False),
    ({"video": "a.mp4"}, "video", False),
]
SAID = [
    {"conversations": turns("What?", "a cat")},
    {"messages": messages("What?", "a cat")},
    {"prompt": "What?", "completion": "a cat"},
    {"texts": [{"user": "What?", "assistant": "a cat"}]},
    {"question": "What?", "answer": "a cat"},
]


@pytest.mark.parametrize(("cells", "name", "may_be_read"), UNREAD, ids=[next(iter(cells)) for cells, *_ in UNREAD])
def test_a_row_that_speaks_of_an_image_of_which_none_is_read_is_refused_by_name(cells, name, may_be_read):
    for said in SAID:
        with pytest.raises(
            MalformedRow, match=f"^row 0: found no image that can be read, but .* as {name}, "
        ) as caught:
            read({**said, **cells})
        line = str(caught.value)
        assert f"--columns {name}=ignore" in line and (f"--columns image={name}" in line) == may_be_read
        assert "\n" not in line and len(line) < 330
    # Told that they are none, or which is, the row is read.
    assert read({**said, **cells}, columns=dict.fromkeys(cells, "ignore"))["images"] == []
    if may_be_read and not isinstance(cells[name], list):
        assert len(read({**said, **cells}, columns={"image": name})["images"]) == 1


def test_a_column_that_may_be_an_image_is_but_noted_beside_one_that_is():
    conversation = read({"image": "a.png", "thumbnail": "b.png", "image_id": 3, "question": "What?", "answer": "x"})
    assert conversation["images"] == ["/d/a.png"]
    assert conversation["notes"] == ["the column thumbnail is not read", "the column image_id is not read"]


def test_a_row_of_text_is_no_row_of_images_for_what_its_table_has_beside():
    nothing = {"photo": None, "thumbnail": "", "pictures": [], "frames": [None], "image_id": 0, "has_image": False}
    measures = {"image_width": 3, "image_correspondence_ratings": [5], "image_size": "3 x 3", "score": 2}
    for said in SAID:
        assert read({**said, **nothing, **measures})["images"] == []


def test_a_key_of_a_message_that_speaks_of_an_image_is_refused_too():
    for message in (
        {"role": "user", "content": "What?", "images": ["a.png"]},
        {"role": "user", "content": [{"type": "text", "text": "What?", "path": "a.png"}]},
    ):
        with pytest.raises(MalformedRow, match="found no image that can be read, but .* which speaks of one; expected"):
            read({"messages": [message, assistant("x")]})
    row = {"conversations": [{"from": "human", "value": "What?", "image": "a.png"}, *turns("", "x")[1:]]}
    with pytest.raises(MalformedRow, match="but 'a.png' as the key image of a turn, which speaks of one"):
        read(row)
    assert read(row, columns={"image": "ignore"})["images"] == []


def test_captions_of_an_image_that_is_not_recognised_say_how_to_name_it():
    for cells in ({}, {"image": None}):
        with pytest.raises(MalformedRow, match="--columns image=photo"):
            read({"photo": "a.png", "caption": "A cat.", **cells})
    assert read({"photo": "a.png", "caption": "A cat."}, columns={"image": "photo"})["images"] == ["/d/a.png"]


# --- what an image is given as


NOTHING = ["", " ", None, [], [""], [None], ["", None], b"", float("nan")]
NOTHING += [{"bytes": None, "path": None}, {"bytes": None, "path": ""}, [{"bytes": None, "path": None}]]


@pytest.mark.parametrize("nothing", NOTHING, ids=repr)
@pytest.mark.parametrize("column", ["image", "images", "image_path"])
def test_what_is_empty_is_no_image(column, nothing):
    for said in SAID:
        conversation = read({**said, column: nothing})
        assert conversation["images"] == [] and conversation["messages"] == read(said)["messages"]
        assert "notes" not in conversation
    with pytest.raises(MalformedRow, match="found no image; expected an image for the caption"):
        read({column: nothing, "caption": "A cat."})
    given = {"images": nothing, "image": "a.png"} if column != "image" else {"image": nothing, "img": "a.png"}
    assert read({**given, "caption": "A cat."})["images"] == ["/d/a.png"]


@pytest.mark.parametrize("column", ["image", "jpg", "images", "png"])
def test_plain_bytes_are_an_image_alone_or_in_a_list(column):
    for given, images in ((PICTURE, [STORED]), ([PICTURE, b"x"], [STORED, {"bytes": b"x", "path": None}])):
        assert read({column: given, "question": "What?", "answer": "x"})["images"] == images
        assert read({column: given, "txt": "A cat."})["images"] == images


def test_bytes_in_base_64_are_an_image():
    assert read({"image": ENCODED, "caption": "A cat."})["images"] == [f"data:image/*;base64,{ENCODED}"]


def test_images_by_name_or_written_as_text_are_read():
    for given in ("['a.png', 'b.png']", '["a.png", "b.png"]', {"<image_00>": "a.png", "<image_01>": "b.png"}):
        assert read({"image": given, "question": "What?", "answer": "x"})["images"] == ["/d/a.png", "/d/b.png"]
    for given in ("{'bytes': None, 'path': 'a.png'}", "['a.png']", '[{"path": "a.png"}]'):
        (image,) = read({"image": given, "caption": "A cat."})["images"]
        assert image == "/d/a.png"
    stored = f"{{'bytes': {PICTURE!r}, 'path': None}}"
    assert read({"image": stored, "caption": "A cat."})["images"] == [STORED]


def test_an_image_that_is_decoded_goes_before_its_path():
    row = {"image": "images/1.jpg", "decoded_image": IMAGE, "question": "What?", "answer": "x"}
    assert read(row)["images"] == [IMAGE]


def test_a_part_without_a_type_is_what_its_key_says():
    content = [{"image": OTHER}, {"text": "What?"}]
    conversation = read({"messages": [{"role": "user", "content": content}, assistant("x")]})
    assert conversation["images"] == [OTHER] and conversation["messages"][0] == user("image", "What?")


# --- messages


@pytest.mark.parametrize(
    ("user_name", "assistant_name"),
    [("Human", "GPT"), ("USER", "ASSISTANT"), ("human", "gpt"), (" User ", "Model"), ("prompter", "bot")],
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_who_speaks_is_known_in_any_case_of_letters_and_a_number_is_a_text(user_name, assistant_name, column, keys):
    said = [dict(zip(keys, pair)) for pair in ((user_name, 7), (assistant_name, 2.5))]
    assert read({column: said})["messages"] == [user("7"), assistant("2.5")]


def test_a_developer_is_the_system():
    said = [{"role": "Developer", "content": "Be brief."}, *messages("Hi.", "Hello.")]
    assert [message["role"] for message in read({"messages": said})["messages"]] == ["system", "user", "assistant"]


def test_loss_on_a_message_says_whether_it_is_learned():
    answers = [{"role": "assistant", "content": "x", "loss": loss} for loss in (False, True, 0, 1.0, None)]
    for column in ("messages", "conversations"):
        conversation = read({column: [*messages("Hi."), *answers]})
        assert [m.get("train") for m in conversation["messages"][1:]] == [False, True, False, True, None]
        assert "notes" not in conversation
    with pytest.raises(MalformedRow, match="found 0.5 as loss of message 0; expected true or false"):
        read({"messages": [{"role": "assistant", "content": "x", "loss": 0.5}]})


def test_a_weight_has_a_bound():
    row = {"messages": [*messages("Hi."), {"role": "assistant", "content": "x", "weight": 2 * MAX_WEIGHT}]}
    with pytest.raises(MalformedRow, match="as weight of message 1; expected a number, at least 0 and at most"):
        read(row)


@pytest.mark.parametrize("said", SAID, ids=lambda said: next(iter(said)))
def test_a_system_column_opens_every_kind_of_dialogue(said):
    for column in ("system", "system_prompt"):
        conversation = read({**said, column: "Be very brief."})
        assert conversation["messages"][0] == {"role": "system", "content": [text("Be very brief.")]}
        assert conversation["messages"][1:] == read(said)["messages"] and "notes" not in conversation


def test_a_system_column_beside_a_system_message_is_noted():
    said = [{"role": "system", "content": "Own."}, *messages("Hi.", "Hello.")]
    conversation = read({"messages": said, "system": "Column."})
    assert len(conversation["messages"]) == 3 and conversation["notes"] == ["the column system is not read"]


def test_columns_and_keys_that_are_not_read_are_noted_once():
    said = [{"from": who, "value": "x", "score": 3, "ids": None} for who in ("human", "gpt", "human", "gpt")]
    conversation = read({"conversations": said, "origin": "web", "meta": {"a": None}, "split": "train", "empty": []})
    assert conversation["notes"] == [
        "the key score of a turn is not read",
        "the column origin is not read",
        "the column split is not read",
    ]
    row = {"messages": [{"role": "user", "content": [{**text("x"), "cache": 1}]}, {**assistant("x"), "name": "n"}]}
    assert read(row)["notes"] == [
        "the key cache of a part is not read",
        "the key name of a message is left to the chat template",
    ]
    assert read({"texts": [{"user": "x", "assistant": "y", "source": "z"}]})["notes"] == [
        "the key source of texts is not read"
    ]
    row = {"jpg": IMAGE, "txt": "A cat.", "json": {"caption": "no", "url": "https://x.org/a.jpg", "width": 3}}
    assert read(row)["notes"] == [
        "the key caption of json is not read",
        "the key url of json is not read",
        "the column width is not read",
    ]
    assert read({"image": "a.png", "text": "x", "photo": "b.png"}, columns={"image": "photo"})["notes"] == [
        "the column image is not read"
    ]
    assert "notes" not in read({"messages": messages("Hi.", "Hello."), "origin": "web"}, columns={"origin": "ignore"})


def test_a_list_of_structs_that_is_stored_as_a_struct_of_lists_is_read():
    row = {"conversations": {"from": ["human", "gpt"], "value": ["Hi.", "Hello."]}}
    assert spoken(read(row)) == spoken(read({"conversations": turns("Hi.", "Hello.")}))


def test_what_a_row_says_of_itself_stays_with_its_conversation():
    row = {"image": "a.png", "caption": "A cat.", "kind": 3, "subset": None, "id": 7}
    conversation = read(row)
    assert (conversation["kind"], conversation["id"]) == ("3", "7") and "subset" not in conversation
    for name in ("question_id", "questionId", "qid", "sample_id", "uid"):
        assert read({"question": "What?", "answer": "x", name: 12, "subset": "a"})["id"] == "12"
