"""Rows of every known layout become the conversations they hold."""

import copy
import io
import json
import tarfile

import datasets
import pytest
from PIL import Image

from processing.image_files_vlm import ImagePolicy
from processing.reading.conversations import conversations_from_row
from tests.rows import DIALOGUE, FORMATS, SHOWN, assistant, messages, spoken, turns


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
        (conversation,) = conversations_from_row(row, source="s", index=index, images=ImagePolicy(allow_urls=True))
        assert spoken(conversation) == {"images": images, "messages": said, "group": index, "source": "s", "row": index}
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
