"""A name gives rows with undecoded images, from this machine or a Hub; a wrong name or file gives one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from processing.conversations import conversations_from_row
from processing.images import check_image, load_image
from processing.sources import load_rows, split_names
from tests.fake_hub import hub_environment, start_fake_hub


def one_line(caught) -> str:
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


# --- COCO


def write_coco(root: Path, split: str = "train2017", **changes) -> Path:
    """Two captioned images, one without captions and one that no file is there for, in COCO's own layout."""
    content = {
        "info": {"year": 2017},
        "images": [{"id": key, "file_name": f"{key:012}.jpg", "height": 4, "width": 6} for key in (9, 25, 30)],
        "annotations": [
            {"id": 1, "image_id": 25, "caption": "A giraffe."},
            {"id": 2, "image_id": 9, "caption": "A meal. "},
            {"id": 3, "image_id": 25, "caption": "Two giraffes."},
        ],
        "licenses": [],
    }
    file = root / "annotations" / f"captions_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content | changes))
    (root / split).mkdir(exist_ok=True)
    for key in (9, 25):
        Image.new("RGB", (6, 4), (key, 0, 0)).save(root / split / f"{key:012}.jpg")
    return file


@pytest.mark.parametrize("named", ["folder", "file"])
def test_coco_is_one_row_for_each_captioned_image(tmp_path, named):
    file = write_coco(tmp_path / "coco")
    rows = load_rows(tmp_path / "coco" if named == "folder" else file)
    assert rows["caption"][:] == [["A meal. "], ["A giraffe.", "Two giraffes."]]
    assert rows["image_id"][:] == [9, 25]
    assert rows[0]["image"] == {"bytes": None, "path": str(tmp_path / "coco/train2017/000000000009.jpg")}
    assert [load_image(row["image"]).size for row in rows] == [(6, 4), (6, 4)]
    assert len(conversations_from_row(rows[1])) == 2


def test_coco_splits_are_the_captions_files_of_the_folder(tmp_path):
    write_coco(tmp_path, "val2017")
    write_coco(tmp_path, "train2017", annotations=[{"image_id": 9, "caption": "A meal."}])
    found = {split: len(load_rows(tmp_path, split=split)) for split in (None, "train2017", "val2017", "val2017[:1]")}
    assert found == {None: 1, "train2017": 1, "val2017": 2, "val2017[:1]": 1}
    with pytest.raises(ValueError) as caught:
        load_rows(tmp_path, split="test2017")
    assert "no split 'test2017'; expected one of train2017, val2017" in one_line(caught)


def test_coco_images_may_lie_elsewhere(tmp_path):
    file = write_coco(tmp_path / "coco")
    (tmp_path / "coco/train2017").rename(tmp_path / "pictures")
    with pytest.raises(FileNotFoundError) as caught:
        load_rows(file)
    assert "images are not in" in one_line(caught) and "--image_dir" in one_line(caught)
    assert load_rows(file, image_dir=tmp_path / "pictures")[0]["image"]["path"].startswith(str(tmp_path / "pictures"))


def test_coco_rows_are_found_again_and_follow_a_changed_file(tmp_path):
    write_coco(tmp_path)
    first, again = load_rows(tmp_path), load_rows(tmp_path)
    assert first.cache_files == again.cache_files != []
    write_coco(tmp_path, annotations=[{"image_id": 9, "caption": "Another caption."}])
    assert load_rows(tmp_path)["caption"][:] == [["Another caption."]]


COCO_MISTAKES = [
    ({"annotations": {}}, "expected COCO captions (lists under images and annotations)"),
    ({"images": [{"id": 9}]}, "images[0] has the keys id; expected id (int) and file_name (str)"),
    ({"annotations": [{"image_id": 9, "bbox": []}]}, "annotations[0] has the keys image_id, bbox; expected image_id"),
    ({"annotations": [{"image_id": 1, "caption": "x"}]}, "annotations[0] has image_id 1; expected the id of an image"),
    ({"annotations": ["x"]}, "annotations[0] has 'x'; expected image_id (int) and caption (str)"),
    ({"annotations": []}, "no captions; expected at least one"),
    ({"images": [{"id": 9, "file_name": "../../secret.jpg"}]}, "the image ../../secret.jpg lies outside"),
]


@pytest.mark.parametrize(("changes", "message"), COCO_MISTAKES)
def test_a_captions_file_of_the_wrong_shape_is_one_line(tmp_path, changes, message):
    file = write_coco(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        load_rows(tmp_path)
    assert one_line(caught).startswith(str(file)) and message in one_line(caught)


def test_a_captions_file_cut_short_is_one_line(tmp_path):
    file = write_coco(tmp_path)
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError) as caught:
        load_rows(file)
    assert "not valid JSON" in one_line(caught)


# --- files and folders that the datasets library reads


def pictures(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (3, 2), colour) for colour in colours]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_image_paths_in_a_text_file_are_relative_to_its_folder(tmp_path, suffix):
    rows = datasets.Dataset.from_dict({"image": ["pics/a.png", "pics/b.png"], "caption": ["red", "blue"]})
    file = tmp_path / f"data{suffix}"
    rows.to_csv(file) if suffix == ".csv" else rows.to_json(file, lines=suffix == ".jsonl")
    found = load_rows(file)
    assert found["image"][:] == [str(tmp_path / "pics/a.png"), str(tmp_path / "pics/b.png")]
    assert found["caption"][:] == ["red", "blue"]


@pytest.mark.parametrize("answer", ["42", "true", '{"a": 1}', "[1, 2]", '"quoted"', "1e3", "null", "plain"])
@pytest.mark.parametrize("extra", [{}, {"train": True}])
def test_texts_beside_lists_of_parts_stay_exactly_what_they_are(tmp_path, answer, extra):
    """Content as text in one row and as parts in another; a text that is itself JSON is still a text."""
    file = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer, **extra}]
    parts = [{"type": "text", "text": "So?"}]
    rows = [
        {"messages": messages, "images": ["a.png", "b.png"]},
        {"messages": [{"role": "user", "content": parts}, messages[1]], "images": None},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pics").mkdir()
    one, other = load_rows(file, image_dir=tmp_path / "pics")
    assert one["images"] == [str(tmp_path / "pics/a.png"), str(tmp_path / "pics/b.png")] and not other["images"]
    for row in (one, other):
        (conversation,) = conversations_from_row(row)
        assert conversation["messages"][1] == {**messages[1], "content": [{"type": "text", "text": answer}]}
    assert conversation["messages"][0]["content"] == parts


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "pics/../../a.png", "https://example.org/a.png"])
def test_an_image_path_cannot_leave_its_folder(tmp_path, name):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"image": "fine.png", "caption": "x"}) + "\n" + json.dumps({"image": name}))
    with pytest.raises(ValueError) as caught:
        load_rows(file)
    assert f"{file}, row 1, image: the image {name} " in one_line(caught) and "--image_dir" in one_line(caught)


def test_a_missing_image_folder_is_one_line(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"image": "a.png", "caption": "x"}))
    with pytest.raises(FileNotFoundError) as caught:
        load_rows(file, image_dir=tmp_path / "nowhere")
    assert one_line(caught) == f"{file}: no image folder {tmp_path / 'nowhere'}; check --image_dir"


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("form", ["parquet", "parquet folder", "save_to_disk"])
def test_stored_images_are_not_decoded(tmp_path, form, column):
    images = pictures("red", "blue")
    if column == "images":
        rows = datasets.Dataset.from_dict({"images": [images, images[:1]], "text": ["x", "y"]})
    else:
        feature = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
        rows = datasets.Dataset.from_dict({"image": images, "text": ["x", "y"]}, features=feature)
    place = tmp_path / "data"
    if form == "save_to_disk":
        rows.save_to_disk(place)
    else:
        place.mkdir()
        rows.to_parquet(place / "train.parquet")
    found = load_rows(place / "train.parquet" if form == "parquet" else place)
    reference = found[0]["image"] if column == "image" else found[0]["images"][0]
    assert isinstance(reference, dict) and load_image(reference).getpixel((0, 0)) == (255, 0, 0)
    assert found["text"][:] == ["x", "y"]


def test_reading_undecoded_copies_nothing_and_keeps_later_caches(tmp_path):
    datasets.Dataset.from_dict({"images": [pictures("red")]}).to_parquet(tmp_path / "a.parquet")
    stored = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train").cache_files
    one, other = (load_rows(tmp_path / "a.parquet").map(lambda row: {"more": 1}) for _ in range(2))
    assert load_rows(tmp_path / "a.parquet").cache_files == stored
    assert one.cache_files == other.cache_files


def test_a_folder_of_images_with_metadata_is_read(tmp_path):
    place = tmp_path / "data"
    (place / "train").mkdir(parents=True)
    pictures("red")[0].save(place / "train/a.png")
    (place / "train/metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "A red wall."}))
    (row,) = load_rows(place)
    (conversation,) = conversations_from_row(row)
    assert load_image(conversation["images"][0]).size == (3, 2)
    assert conversation["messages"][1]["content"][0]["text"] == "A red wall."


def test_a_saved_dataset_has_its_splits_and_parts_of_them(tmp_path):
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {k}" for k in range(10)]})
        for name in ("train", "validation")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert len(load_rows(tmp_path / "saved")) == 10
    mixed = load_rows(tmp_path / "saved", split="validation[20%:40%]+train[:1]")
    assert mixed["text"][:] == ["validation 2", "validation 3", "train 0"]
    assert split_names("validation[:20%]+train[:1]") == ["validation", "train"]
    for split, message in (("test", "no split 'test'; expected one of train, validation"), ("train[:x]", "[:90%]")):
        with pytest.raises(ValueError) as caught:
            load_rows(tmp_path / "saved", split=split)
        assert message in one_line(caught)


def test_several_splits_without_a_train_split_must_be_chosen_from(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("dev", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError) as caught:
        load_rows(tmp_path / "saved")
    assert "found the splits dev, test; choose one with --train_split" in one_line(caught)


UNREADABLE = {
    "data.foo": ("x", "a file of unknown kind; expected one of .parquet"),
    "data.jsonl": ('{"a": 1}\n{"a": ', "not readable as a data set (JSON parse error"),
    "data.parquet": ("x", "not readable as a data set (Parquet file size"),
    "data.csv": ("", "an empty file"),
    "data.json": ('{"data": []}', "one JSON object with the keys data; expected COCO captions"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_one_line(tmp_path, name):
    content, message = UNREADABLE[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        load_rows(tmp_path / name)
    assert one_line(caught).startswith(str(tmp_path / name)) and message in one_line(caught)


@pytest.mark.parametrize("name", ["./missing", "missing/data.jsonl", "missing.json", "/missing", "a/b/c"])
def test_a_missing_file_or_folder_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load_rows(name)
    assert one_line(caught).startswith(f"{name}: no such file or folder")


def test_an_empty_folder_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        load_rows(tmp_path / "empty")
    assert "not readable as a data set" in one_line(caught)


def test_a_hub_name_when_offline_is_one_line():
    with pytest.raises(ConnectionError) as caught:
        load_rows("nlphuji/flickr30k")
    assert "nlphuji/flickr30k: no such file or folder here, and the Hub cannot be reached" in one_line(caught)


# --- the Hub


READ_FROM_HUB = """
import json
from processing.conversations import conversations_from_row
from processing.images import load_image
from processing.sources import load_rows

def outcome(*arguments, **options):
    try:
        return len(load_rows(*arguments, **options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"

converted = {"revision": "refs/convert/parquet"}
flickr = "nlphuji/flickr30k"
found = {
    # Before anything is cached, and again after it: an older copy must not hide a mistake.
    "script": outcome(flickr),
    "unreachable": outcome("me/private"),
    "converted": outcome(flickr, split="test", **converted),
    "configuration": outcome(flickr, name="TEST", **converted),
    "part": outcome(flickr, split="test[:50%]", **converted),
    "no such split": outcome(flickr, split="train", **converted),
    "no such revision": outcome(flickr, revision="nope"),
    "script again": outcome(flickr),
}
row = load_rows(flickr, **converted).shuffle(seed=42)[0]
found["columns"] = sorted(row)
found["conversations"] = len(conversations_from_row(row))
found["first"] = conversations_from_row(row, prompt="What?", caption_choice="first")[0]["messages"]
found["size"] = load_image(row["image"]).size
print(json.dumps(found))
"""


def test_flickr30k_is_read_from_the_hub_as_it_is_there(tmp_path):
    """The repository is a script; the Hub's parquet copy of it has one folder for its configuration, one split."""
    count = 6
    script = tmp_path / "hub/datasets/nlphuji/flickr30k"
    script.mkdir(parents=True)
    (script / "flickr30k.py").write_text("raise RuntimeError('never run')")
    (script / "README.md").write_text("# Flickr30k\n")
    copy = tmp_path / "hub/datasets/nlphuji/flickr30k@refs_convert_parquet/TEST/test/0000.parquet"
    copy.parent.mkdir(parents=True)
    strings = datasets.List(datasets.Value("string"))
    features = {"image": datasets.Image(), "caption": strings, "sentids": strings}
    features |= {key: datasets.Value("string") for key in ("split", "img_id", "filename")}
    datasets.Dataset.from_dict(
        {
            "image": pictures(*["red"] * count),
            "caption": [[f"Caption {i} of image {k}." for i in range(5)] for k in range(count)],
            "sentids": [[str(5 * k + i) for i in range(5)] for k in range(count)],
            "split": ["train", "val", "test"] * (count // 3),
            "img_id": [str(k) for k in range(count)],
            "filename": [f"{k}.jpg" for k in range(count)],
        },
        features=datasets.Features(features),
    ).to_parquet(copy)
    with start_fake_hub(tmp_path / "hub") as url:
        environment = hub_environment(url, tmp_path / "home") | {"PYTHONPATH": os.pathsep.join(sys.path)}
        ran = subprocess.run(
            [sys.executable, "-c", READ_FROM_HUB], env=environment, capture_output=True, text=True, timeout=120
        )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])

    for key in ("script", "script again"):
        assert found[key].startswith("ValueError: nlphuji/flickr30k: a script repository"), found[key]
        assert "--dataset_revision refs/convert/parquet" in found[key] and "\n" not in found[key]
    assert "me/private: neither a file or folder here nor a dataset on the Hub" in found["unreachable"]
    assert (found["converted"], found["configuration"], found["part"]) == (count, count, count // 2)
    assert "no split 'train'; expected one of test" in found["no such split"]
    assert found["no such revision"].startswith("FileNotFoundError: nlphuji/flickr30k at revision nope: the Hub has no")
    assert found["columns"] == ["caption", "filename", "image", "img_id", "sentids", "split"]
    assert found["conversations"] == 5 and found["size"] == [3, 2]
    assert found["first"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


# --- images


def test_every_kind_of_reference_loads_the_same_image(tmp_path):
    image, path = pictures("red")[0], tmp_path / "a.png"
    image.save(path)
    stored = {"bytes": path.read_bytes(), "path": "gone.png"}
    for reference in (image, str(path), path, stored, {"bytes": None, "path": str(path)}):
        check_image(reference)
        loaded = load_image(reference)
        assert (loaded.mode, loaded.size, loaded.getpixel((0, 0))) == ("RGB", (3, 2), (255, 0, 0))
    assert image.getpixel((0, 0)) == (255, 0, 0), "the caller's image is still open"


def test_an_image_is_upright_opaque_rgb_of_its_first_frame(tmp_path):
    def loaded(name: str, image: Image.Image, **options) -> Image.Image:
        image.save(tmp_path / name, **options)
        return load_image(tmp_path / name)

    exif = Image.Exif()
    exif[274] = 6  # stored lying on its side
    assert loaded("turned.jpg", Image.new("RGB", (30, 20)), exif=exif).size == (20, 30)
    assert loaded("clear.png", Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert loaded("half.png", Image.new("LA", (2, 2), (0, 128))).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    assert loaded("palette.png", palette, transparency=0).getpixel((0, 0)) == (255, 255, 255)
    moving = loaded("moving.gif", pictures("red")[0], save_all=True, append_images=pictures("blue"))
    assert moving.getpixel((0, 0)) == (255, 0, 0)
    assert loaded("deep.png", Image.new("I;16", (2, 2), 256 * 100)).getpixel((0, 0)) == (100, 100, 100)
    assert loaded("print.jpg", Image.new("CMYK", (2, 2), (0, 255, 255, 0)), quality=95).getpixel((0, 0))[0] > 240


def test_a_missing_or_broken_image_is_one_line_with_its_name(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(FileNotFoundError) as caught:
        load_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    assert one_line(caught).startswith(f"{tmp_path / 'gone.jpg'}: no such image file")
    for name in ("text.jpg", "empty.jpg", "cut.jpg"):
        with pytest.raises(ValueError) as caught:
            load_image(tmp_path / name)
        assert one_line(caught).startswith(f"{tmp_path / name}: not a readable image (")
    for name in ("gone.jpg", "text.jpg", "empty.jpg"):
        with pytest.raises((FileNotFoundError, ValueError)):
            check_image(tmp_path / name)
    check_image(tmp_path / "cut.jpg")  # the header is whole
    with pytest.raises(ValueError) as caught:
        load_image({"bytes": b"no image", "path": None})
    assert "an image stored in its row (8 bytes): not a readable image" in one_line(caught)
    with pytest.raises(ValueError) as caught:
        load_image(None)
    assert "found NoneType where an image was expected" in one_line(caught)


def test_a_huge_image_is_refused_by_its_size(tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (load_image, check_image):
        with pytest.raises(ValueError) as caught:
            read(tmp_path / "bomb.png")
        assert "decompression bomb" in one_line(caught)
