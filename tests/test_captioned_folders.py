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
    (folder / "README.md").write_text("# Walls")
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


NO_CAPTIONS = {
    "Latin-1": (b"caf\xe9", "a.txt: a text that is no UTF-8"),
    "UTF-16": ("a wall".encode("utf-16"), "a.txt: a text that is no UTF-8"),
    "boxes": (b"0 0.5 0.5 0.25 1e-1\n12 0.1 0.2 0.3 0.4\n", "a.txt holds numbers of boxes; expected a caption"),
    "nothing": (b"\n", "found '' as caption"),
}


@pytest.mark.parametrize("kind", NO_CAPTIONS)
def test_a_text_that_is_no_caption_costs_its_own_image(tmp_path, kind):
    content, why = NO_CAPTIONS[kind]
    for name, written in (("a", content), ("b", b"\xef\xbb\xbfa caf\xc3\xa9, 1 of 5")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(written)
    bad, good = items_of(open_source(tmp_path))
    assert f"photos, row 0: {why}" in bad["dropped"][1] and texts_of(good) == ["a café, 1 of 5"]


def test_a_text_that_is_a_link_out_of_the_folder_is_not_read(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "secret").write_text("a word")
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "a.txt").symlink_to(tmp_path / "secret")
    (folder / "b.txt").symlink_to(folder / "own.text")
    (folder / "own.text").write_text("A wall.")
    bad, good = items_of(open_source(folder))
    assert "a.txt is a link that leads out of the folder" in bad["dropped"][1] and texts_of(good) == ["A wall."]
