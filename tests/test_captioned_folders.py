"""A folder of images with a text of the same name beside each is read as images and their captions."""

import pytest
from PIL import Image

from processing.image_files_vlm import ImagePolicy, load_image
from processing.reading.conversations import ROW
from processing.reading.items import Reading
from processing.reading.sources import open_source


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_beside_each_image_is_its_caption(tmp_path, streaming, linked):
    folder = tmp_path / "photos"
    for name, text in (("train/a", "A red wall.\n"), ("train/more/b.1", "قطة"), ("test/c", "Blue."), ("train/d", None)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / f"{name}.JPG", "JPEG")
        if text is not None:
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "LICENSE.txt").write_text("Free.")
    if linked:
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    source = open_source(folder, streaming=streaming)
    items = items_of(source)
    assert [item["dropped"][1] for item in items if "dropped" in item] == ["photos, row 1: no d.txt beside d.JPG"]
    found = [(load_image(item["images"][0]).size, said) for item in items for said in texts_of(item)]
    assert found == [((8, 8), "A red wall."), ((8, 8), "قطة")]
    assert len(list(open_source(folder, split="test", streaming=streaming).rows)) == 1


def items_of(source):
    reading = Reading(source="photos", images=ImagePolicy(source.image_dir))
    return [item for number, row in enumerate(source.rows) for item in reading.items(row, number)]


def texts_of(item):
    return [item["messages"][-1]["content"][-1]["text"]] if "messages" in item else []


def test_a_table_of_metadata_is_read_and_a_text_beside_no_image_is_not(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("x")
    assert [*open_source(tmp_path).rows.features] == ["image", ROW]
    (tmp_path / "notes.txt").rename(tmp_path / "a.txt")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,A wall.\nb.png,A roof.\n")
    assert open_source(tmp_path).rows["text"][:] == ["A wall.", "A roof."]


def test_a_text_that_is_none_costs_its_own_image(tmp_path):
    for name, content in (("a", b"caf\xe9"), ("b", b""), ("c", b"\xef\xbb\xbfa caf\xc3\xa9")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(content)
    found = items_of(open_source(tmp_path))
    assert "row 0: a.txt: a text that is no UTF-8" in found[0]["dropped"][1]
    assert "row 1: found '' as caption" in found[1]["dropped"][1] and texts_of(found[2]) == ["a café"]
