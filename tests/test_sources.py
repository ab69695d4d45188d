"""A name gives rows with undecoded images, from this machine or a Hub; a wrong name or file gives one line."""

import csv
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from processing.data_error_vlm import DuetError
from processing.image_files_vlm import ImagePolicy, load_image
from processing.reading.cells import MalformedRow
from processing.reading.conversations import ODD, ROW, conversations_from_row
from processing.reading.rows import hold_out
from processing.reading.sources import open_source, split_names
from tests import fake_hub


def load_rows(*arguments, **options):
    return open_source(*arguments, **options).rows


def one_line(caught) -> str:
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


def conversations_of(source) -> list[dict]:
    images = ImagePolicy(source.image_dir, caches=source.caches)
    return [
        conversation
        for index, row in enumerate(source.rows)
        for conversation in conversations_from_row(row, source=source.name, index=index, images=images)
    ]


def images_of(source) -> list:
    return [image for conversation in conversations_of(source) for image in conversation["images"]]


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
    source = open_source(tmp_path / "coco" if named == "folder" else file)
    rows = source.rows
    assert rows["caption"][:] == [["A meal. "], ["A giraffe.", "Two giraffes."]]
    assert rows["image_id"][:] == [9, 25]
    assert rows[0]["image"] == "train2017/000000000009.jpg"
    assert [load_image(image).size for image in images_of(source)] == [(6, 4), (6, 4), (6, 4)]
    assert [conversation["row"] for conversation in conversations_of(source)] == [0, 1, 1]


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
    elsewhere = open_source(file, image_dir=tmp_path / "pictures")
    assert elsewhere.rows[0]["image"] == "000000000009.jpg"
    assert [load_image(image).size for image in images_of(elsewhere)] == [(6, 4), (6, 4), (6, 4)]


def test_coco_rows_are_found_again_and_follow_a_changed_file(tmp_path):
    write_coco(tmp_path)
    first, again = load_rows(tmp_path), load_rows(tmp_path)
    assert first.cache_files == again.cache_files != []
    write_coco(tmp_path, annotations=[{"image_id": 9, "caption": "Another caption."}])
    assert load_rows(tmp_path)["caption"][:] == [["Another caption."]]


COCO_MISTAKES = [
    ({"annotations": {}}, "expected COCO captions (lists under images and annotations)"),
    ({"images": [{"id": 9}]}, "images[0] has the keys id; expected id and file_name"),
    ({"annotations": [{"image_id": 9, "bbox": []}]}, "annotations[0] has the keys image_id, bbox; expected image_id"),
    ({"annotations": [{"image_id": 1, "caption": "x"}]}, "annotations[0] has image_id 1; expected the id of an image"),
    ({"annotations": ["x"]}, "annotations[0] has 'x'; expected image_id and caption"),
    ({"annotations": []}, "no captions; expected at least one"),
    (
        {"annotations": [{"image_id": 9, "caption": "x"}], "images": [{"id": 9, "file_name": "../../secret.jpg"}]},
        "the image ../../secret.jpg lies outside",
    ),
]


@pytest.mark.parametrize(("changes", "message"), COCO_MISTAKES)
def test_a_captions_file_of_the_wrong_shape_is_one_line(tmp_path, changes, message):
    file = write_coco(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        load_rows(tmp_path)
    assert one_line(caught).startswith(str(file)) and message in one_line(caught)


BAD_ENTRIES = [
    ({}, {"annotations": [{"image_id": 1, "caption": "x"}]}, "annotations[3] has image_id 1; expected the id"),
    ({}, {"annotations": [{"image_id": 9}]}, "annotations[3] has the keys image_id; expected image_id and caption"),
    (
        {},
        {"annotations": [{"image_id": 9, "caption": ["x"]}]},
        "annotations[3] has ['x'] as its caption; expected image_id and caption",
    ),
    ({}, {"annotations": ["x"]}, "annotations[3] has 'x'; expected image_id and caption"),
    ({}, {"annotations": [{"image_id": 9, "caption": "caf\ud8e9"}]}, "annotations[3] has a caption that is no UTF-8"),
    (
        {"images": [{"id": 31}], "annotations": [{"image_id": 31, "caption": "x"}]},
        {},
        "annotations[3]: its image cannot be read: images[3] has the keys id; expected id and file_name",
    ),
    (
        {"images": [{"id": 31, "file_name": "../a.jpg"}], "annotations": [{"image_id": 31, "caption": "x"}]},
        {},
        "annotations[3]: its image cannot be read: images[3]: the image ../a.jpg lies outside",
    ),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("first", "second", "message"), BAD_ENTRIES)
def test_a_bad_entry_of_a_captions_file_costs_itself(tmp_path, first, second, message, streaming):
    content = json.loads(write_coco(tmp_path).read_text())
    more = {key: content[key] + first.get(key, []) + second.get(key, []) for key in ("images", "annotations")}
    write_coco(tmp_path, **more)
    rows = list(load_rows(tmp_path, streaming=streaming))
    assert [row["caption"] for row in rows] == [["A meal. "], ["A giraffe.", "Two giraffes."], None]
    assert rows[2][ODD].startswith(message) and [row[ROW] for row in rows] == [0, 1, 2]
    with pytest.raises(MalformedRow):
        conversations_from_row(rows[2])


def test_a_captions_file_whose_ids_are_texts_in_one_list_is_read(tmp_path):
    for kind in (str, float):
        captions = [{"image_id": kind(9), "caption": "A meal."}, {"image_id": kind(25), "caption": None}]
        write_coco(tmp_path, annotations=captions)
        assert load_rows(tmp_path)["image_id"][:] == [9, 25]
    images = [{"id": "a", "file_name": "000000000009.jpg"}, {"id": 25, "file_name": "000000000025.jpg"}]
    annotations = [{"image_id": "a", "caption": "A meal."}, {"image_id": "25", "caption": "A giraffe."}]
    write_coco(tmp_path, images=images, annotations=annotations)
    assert load_rows(tmp_path)["image_id"][:] == ["a", "25"]


@pytest.mark.parametrize("empty", [None, "", " "])
def test_an_empty_caption_of_coco_costs_itself(tmp_path, empty):
    captions = [{"image_id": 9, "caption": text} for text in ("A meal.", empty, "Food.")]
    write_coco(tmp_path, annotations=captions)
    items = conversations_of(open_source(tmp_path))
    assert ["dropped" in item for item in items] == [False, True, False]


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
    source = open_source(file)
    assert images_of(source) == [str(tmp_path / "pics/a.png"), str(tmp_path / "pics/b.png")]
    assert source.rows["caption"][:] == ["red", "blue"]


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
    for streaming in (False, True):
        source = open_source(file, image_dir=tmp_path / "pics", streaming=streaming)
        assert images_of(source) == [str(tmp_path / "pics/a.png"), str(tmp_path / "pics/b.png")]
        # Filtered, as `hold_out` does, rows are decoded and read again.
        for kept in (source.rows, source.rows.filter(lambda row: True)):
            conversations = conversations_of(source._replace(rows=kept))
            for conversation in conversations:
                assert conversation["messages"][1] == {**messages[1], "content": [{"type": "text", "text": answer}]}
            assert conversations[1]["messages"][0]["content"] == parts


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "pics/../../a.png", "https://example.org/a.png"])
def test_an_image_path_cannot_leave_its_folder(tmp_path, name):
    file = tmp_path / "data.jsonl"
    file.write_text(
        json.dumps({"image": "fine.png", "caption": "x"}) + "\n" + json.dumps({"image": name, "caption": "y"})
    )
    with pytest.raises(ValueError) as caught:
        conversations_of(open_source(file))
    assert one_line(caught).startswith(f"{file}, row 1") and f"the image {name} " in one_line(caught)
    assert "--image_dir" in one_line(caught)


def test_a_missing_image_folder_is_one_line_at_once(tmp_path):
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


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_of_images_with_metadata_is_read_undecoded(tmp_path, kind, linked):
    place = tmp_path / "data"
    folder_of_images(place, kind)
    if linked:  # `datasets` names the images in the folder behind the link
        (tmp_path / "link").symlink_to(place)
        place = tmp_path / "link"
    for streaming in (False, True):
        source = open_source(place, streaming=streaming)
        for row in source.rows:
            assert row["image"]["bytes"] is None and row["image"]["path"].endswith(".png")
        assert [load_image(image).getpixel((0, 0)) for image in images_of(source)] == [(255, 0, 0), (0, 0, 255)]
        texts = [conversation["messages"][1]["content"][0]["text"] for conversation in conversations_of(source)]
        assert texts == ["A red wall.", "A blue wall."]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_is_its_name_and_not_its_number(tmp_path, streaming):
    for kind, colour in (("cat", "red"), ("a dog", "blue")):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "photos" / kind / "1.png")
    rows = load_rows(tmp_path / "photos", streaming=streaming)
    assert [row["label"] for row in rows] == ["a dog", "cat"]
    kinds = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features(
        one=kinds, some=datasets.List(kinds), inner={"deep": kinds, "text": datasets.Value("string")}
    )
    stored = [
        {"one": 1, "some": [0, 1], "inner": {"deep": 0, "text": "x"}},
        {"one": -1, "some": None, "inner": {"deep": None, "text": None}},
    ]
    datasets.Dataset.from_list(stored, features).to_parquet(tmp_path / "a.parquet")
    found = [{name: row[name] for name in features} for row in load_rows(tmp_path / "a.parquet", streaming=streaming)]
    assert found == [
        {"one": "yes", "some": ["no", "yes"], "inner": {"deep": "no", "text": "x"}},
        {"one": None, "some": None, "inner": {"deep": None, "text": None}},
    ]


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


@pytest.mark.parametrize("form", ["file", "folder", "pattern"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_cell_of_a_csv_file_is_the_text_it_is(tmp_path, form, streaming):
    cells = ["None", "N/A", "null", "NA", "nan", "007", "1.50", "1e3", "True", "yes", "-", '"quoted"', ""]
    (tmp_path / "data").mkdir()
    with (tmp_path / "data/train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer", "nothing", "7"], *([cell, cell, "", 7] for cell in cells)])
    path = {"file": "data/train.csv", "folder": "data", "pattern": "data/*.csv"}[form]
    rows = load_rows(tmp_path / path, streaming=streaming)
    assert [row["answer"] for row in rows] == [row["question"] for row in rows] == [*cells[:-1], None]
    assert {row["nothing"] for row in rows} == {None} and {row["7"] for row in rows} == {"7"}


@pytest.mark.parametrize("streaming", [False, True])
def test_images_are_known_in_a_file_that_does_not_say_so(tmp_path, streaming):
    image, stored = datasets.Image(decode=False), pa.struct({"bytes": pa.binary(), "path": pa.string()})
    swapped = pa.struct({"path": pa.string(), "bytes": pa.binary()})
    long = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})
    kinds = {
        "image": (stored, image),
        "images": (pa.list_(stored), datasets.List(image)),
        "large list": (pa.large_list(stored), datasets.LargeList(image)),
        "in a struct": (pa.struct({"picture": stored}), {"picture": image}),
        "swapped": (swapped, {"path": datasets.Value("string"), "bytes": datasets.Value("binary")}),
        "long": (long, {"bytes": datasets.Value("large_binary"), "path": datasets.Value("large_string")}),
        "text": (pa.large_string(), datasets.Value("large_string")),
    }
    one = {"bytes": b"content" * 10_000, "path": "a.png"}
    values = dict.fromkeys(kinds, one) | {"images": [one], "large list": [one], "in a struct": {"picture": one}}
    values["text"] = "a"
    table = {name: pa.array([values[name], None], kind) for name, (kind, _) in kinds.items()}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    before = pa.total_allocated_bytes()
    rows = load_rows(tmp_path / "a.parquet", streaming=streaming)
    assert pa.total_allocated_bytes() - before < 10_000
    assert {name: rows.features[name] for name in kinds} == {name: feature for name, (_, feature) in kinds.items()}
    first = next(iter(rows))
    assert {name: first[name] for name in kinds} == values


UNREADABLE = {
    "data.foo": ("x", "a file of unknown kind; expected one of .parquet"),
    "data.xlsx": ("x", ".tar, or a folder; save a table as CSV, with the name .csv"),
    "data.txt": ("image,caption", "; save a table as CSV, with the name .csv"),
    "headless.csv": ("a/1.jpg,A dog.\n", "its first line is no header, as a/1.jpg stands in it"),
    "mapping.json": (json.dumps({f"{n}.jpg": "A dog." for n in range(1000)}), "...; expected COCO captions"),
    "data.jsonl": ("no JSON", "not readable as a data set (JSON parse error"),
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


@pytest.mark.parametrize(
    "path", ["../secret.jsonl", "/etc/hostname", "https://127.0.0.1:1/x.csv", "x/../../secret.jsonl"]
)
def test_a_data_set_may_name_no_data_outside_of_it(tmp_path, path):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}')
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": "a text"}')
    for settings in ({"data_files": path}, {"data_files": [{"split": "train", "path": path}]}, {"data_dir": path}):
        settings = json.dumps({"configs": [{"config_name": "default", **settings}]})
        (tmp_path / "data/README.md").write_text(f"---\n{settings}\n---\n")
        with pytest.raises(DuetError) as caught:
            load_rows(tmp_path / "data")
        assert f"its own settings name {path} as its data, which lies outside" in one_line(caught)
    (tmp_path / "data/README.md").write_text('---\n{"configs": [{"config_name": "a", "data_files": "*.jsonl"}]}\n---\n')
    assert len(load_rows(tmp_path / "data")) == 1


def test_a_saved_dataset_may_name_no_data_outside_of_it(tmp_path):
    saved(tmp_path / "saved")
    state = tmp_path / "saved/state.json"
    state.write_text(state.read_text().replace('"data-', '"../data-'))
    with pytest.raises(DuetError) as caught:
        load_rows(tmp_path / "saved")
    assert "which lies outside of it" in one_line(caught)


def test_saved_splits_may_be_no_folders_outside(tmp_path):
    saved(tmp_path / "elsewhere")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["../elsewhere"]}')
    with pytest.raises(DuetError) as caught:
        load_rows(tmp_path / "saved")
    assert "its own settings name ../elsewhere as its data, which lies outside of it" in one_line(caught)


# --- several files, and other forms


def test_a_pattern_or_a_list_names_several_files(tmp_path, monkeypatch):
    for number in range(3):
        rows = datasets.Dataset.from_dict({"image": [f"{number}.png"], "caption": [f"row {number}"]})
        (tmp_path / "deep/er").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(tmp_path / f"deep/er/part-{number}.parquet")
        rows.to_json(tmp_path / f"deep/part-{number}.jsonl")
    for path in (
        tmp_path / "deep/er/*.parquet",
        str(tmp_path / "**/*.parquet"),
        [tmp_path / f"deep/er/part-{number}.parquet" for number in range(3)],
        [str(tmp_path / "deep/er/part-0.parquet"), str(tmp_path / "deep/er/part-[12].parquet")],
        tmp_path / "deep/*.jsonl",
    ):
        source = open_source(path)
        assert source.rows["caption"][:] == ["row 0", "row 1", "row 2"]
        assert "," not in source.name and source.name.endswith(" more") == isinstance(path, list)
        folder = tmp_path / ("deep" if str(path).endswith("jsonl") else "deep/er")
        assert images_of(source) == [str(folder / f"{number}.png") for number in range(3)]
    for path, message in (
        (tmp_path / "*.tar", "no file has a name like this"),
        ([], "an empty list names no data set"),
        ([tmp_path / "gone.jsonl"], "no such file"),
        (tmp_path / "deep/**/part-0.*", "files of several kinds (json, parquet)"),
    ):
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            load_rows(path)
        assert message in one_line(caught)


LLAVA = [
    {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\n2"}] * 2},
    {"id": "b", "conversations": [{"from": "human", "value": "42"}, {"from": "gpt", "value": '{"a": 1}'}]},
    {"id": "c", "image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "[1]"}]},
]


def write_json(place: Path, rows: list[dict]) -> Path:
    """Rows as one list, as a line each, or the latter compressed, as the name says."""
    lines = not place.name.startswith("list")
    content = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
    with (gzip.open if place.suffix == ".gz" else open)(place, "wt") as file:
        file.write(content)
    return place


@pytest.mark.parametrize("name", ["list.json", "lines.json", "lines.jsonl", "lines.ndjson", "lines.jsonl.gz"])
@pytest.mark.parametrize("streaming", [False, True])
def test_llavas_rows_are_what_their_file_says(tmp_path, name, streaming):
    """An image that is a text, a list or not there; texts that are JSON."""
    rows = list(load_rows(write_json(tmp_path / name, LLAVA), streaming=streaming))
    assert [{key: value for key, value in row.items() if value is not None and key != ROW} for row in rows] == LLAVA


# --- streamed


def write_parquet(place: Path, column: str = "image", rows: int = 7) -> Path:
    picture = [pictures("red", "blue")[: 1 + number % 2] for number in range(rows)]
    feature = datasets.List(datasets.Image()) if column == "images" else datasets.Image()
    datasets.Dataset.from_dict(
        {column: picture if column == "images" else [each[0] for each in picture], "text": list(map(str, range(rows)))},
        features=datasets.Features({column: feature, "text": datasets.Value("string")}),
    ).to_parquet(place)
    return place


def folder_of_images(place: Path, kind: str = "jsonl") -> Path:
    (place / "train").mkdir(parents=True)
    texts = {"a.png": "A red wall.", "b.png": "A blue wall."}
    for name, picture in zip(texts, pictures("red", "blue")):
        picture.save(place / "train" / name)
    rows = datasets.Dataset.from_dict({"file_name": list(texts), "text": list(texts.values())})
    file = place / f"train/metadata.{kind}"
    rows.to_csv(file) if kind == "csv" else rows.to_json(file)
    return place


def web_dataset(place: Path) -> Path:
    """Three tar files of two rows each, an image and its caption."""
    place.mkdir()
    for number in range(3):
        with tarfile.open(place / f"{number:04}.tar", "w") as archive:
            for row, picture in enumerate(pictures("red", "blue")):
                content = io.BytesIO()
                picture.save(content, "PNG")
                for suffix, data in (("png", content.getvalue()), ("txt", f"row {number} {row}".encode())):
                    entry = tarfile.TarInfo(f"{number:04}{row:04}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return place


def saved(place: Path) -> Path:
    datasets.Dataset.from_dict({"images": [pictures("red", "blue")] * 4, "text": list("abcd")}).save_to_disk(place)
    return place


def text_table(place: Path) -> Path:
    datasets.Dataset.from_dict({"image": ["a.png", "b.png"], "caption": ["red", "7"]}).to_csv(place)
    return place


KINDS = {
    "parquet": lambda place: write_parquet(place / "a.parquet"),
    "parquet of lists": lambda place: write_parquet(place / "a.parquet", "images"),
    "parquet files": lambda place: [write_parquet(place / f"{n}.parquet", rows=n + 1) for n in range(3)],
    "jsonl": lambda place: write_json(place / "lines.jsonl", LLAVA),
    "jsonl.gz": lambda place: write_json(place / "lines.jsonl.gz", LLAVA),
    "json list": lambda place: write_json(place / "list.json", LLAVA),
    "csv": lambda place: text_table(place / "a.csv"),
    "folder of images": lambda place: folder_of_images(place / "images"),
    "webdataset folder": lambda place: web_dataset(place / "web"),
    "webdataset file": lambda place: web_dataset(place / "web") / "0001.tar",
    "webdataset pattern": lambda place: web_dataset(place / "web") / "*.tar",
    "save_to_disk": lambda place: saved(place / "saved"),
    "coco": lambda place: write_coco(place / "coco").parent.parent,
    "shapes": lambda place: "shapes",
}


def comparable(rows) -> list[dict]:
    """Rows with drawn images as their pixels, keys in one order, without numbers, which each reader counts anew."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(value[key]) for key in sorted(value) if key != ROW and (key != ODD or value[key])}
        return value.tobytes() if isinstance(value, Image.Image) else value

    return [plain(row) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_rows_are_the_rows(tmp_path, kind):
    """In their order, and in two workers each of them once."""
    path, split = KINDS[kind](tmp_path), "test[:20]" if kind == "shapes" else None
    # Streamed first, while nothing is prepared that it could fall back on.
    streamed, whole = (open_source(path, split=split, streaming=streaming) for streaming in (True, False))
    assert isinstance(streamed.rows, datasets.IterableDataset) and isinstance(whole.rows, datasets.Dataset)
    assert (streamed.name, streamed.image_dir) == (whole.name, whole.image_dir)
    expected = comparable(whole.rows)
    assert comparable(streamed.rows) == expected and len(expected) > 1
    assert comparable(streamed.rows) == expected, "in a second epoch"
    assert comparable(pickle.loads(pickle.dumps(streamed.rows))) == expected, "in a worker that is not forked"
    workers = min(2, streamed.rows.num_shards)
    loader = torch.utils.data.DataLoader(streamed.rows, batch_size=None, num_workers=workers)
    assert sorted(map(repr, comparable(loader))) == sorted(map(repr, expected))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("json list", "coco")])
def test_a_stream_converts_nothing(tmp_path, monkeypatch, kind):
    """But JSON that is one object or list, which can only be read as a whole."""
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", lambda *arguments: pytest.fail("prepared"))
    next(iter(load_rows(KINDS[kind](tmp_path), streaming=True)))


def test_a_part_of_a_split_cannot_be_streamed(tmp_path):
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet")
    assert len(list(load_rows(tmp_path, split="train+test", streaming=True))) == 14
    with pytest.raises(ValueError) as caught:
        load_rows(tmp_path, split="train[:90%]", streaming=True)
    assert one_line(caught).startswith(f"{tmp_path}: 'train[:90%]' is a part of a split") and "name whole" in one_line(
        caught
    )


@pytest.mark.parametrize("name", sorted({"data.jsonl", "data.parquet", "data.csv"}))
def test_an_unreadable_file_is_one_line_when_it_is_streamed(tmp_path, name):
    content, message = UNREADABLE[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        load_rows(tmp_path / name, streaming=True)
    assert one_line(caught).startswith(str(tmp_path / name)) and message in one_line(caught)


# --- numbers and names of rows


def test_a_row_keeps_the_number_it_is_stored_under(tmp_path):
    for name, count in (("train", 100), ("test", 10)):
        write_parquet(tmp_path / f"{name}.parquet", rows=count)
    rows = load_rows(tmp_path, split="test[5:7]+train[50%:]")
    assert rows[ROW][:] == [5, 6, *range(50, 100)]
    for part in hold_out(rows, 0.2):
        assert [str(number) for number in part[ROW]] == part["text"][:], "a text is its row's number"
    assert hold_out(rows.shuffle(seed=1), 0.2)[1].features[ROW] == datasets.Value("int64")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "webdataset folder", "save_to_disk", "coco", "shapes"])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_every_kind_have_their_number(tmp_path, monkeypatch, kind, streaming):
    monkeypatch.setattr("processing.reading.drawn.DRAWN_ROWS", {"train": 5})
    rows = load_rows({**KINDS, "coco": lambda place: write_coco(place)}[kind](tmp_path), streaming=streaming)
    assert rows.features is None or rows.features[ROW] == datasets.Value("int64")
    numbers = [row[ROW] for row in rows]
    assert numbers == list(range(len(numbers))) and len(numbers) > 1


def test_numbers_of_a_stream_count_what_is_held_out_too(tmp_path):
    rows = load_rows(write_parquet(tmp_path / "a.parquet", rows=30), streaming=True)
    parts = [list(part) for part in hold_out(rows, 0.3)]
    assert all(row["text"] == str(row[ROW]) for part in parts for row in part) and all(parts)
    unnumbered = [sorted(row["text"] for row in part) for part in hold_out(rows.remove_columns(ROW), 0.3)]
    assert [sorted(row["text"] for row in part) for part in parts] == unnumbered, "a number is no content"


def test_a_million_rows_are_numbered_at_once_and_without_a_copy(tmp_path):
    datasets.Dataset.from_dict({"text": ["a text"] * 1_000_000}).to_parquet(tmp_path / "a.parquet")
    stored = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train")
    before = time.perf_counter()
    rows = load_rows(tmp_path / "a.parquet")
    assert time.perf_counter() - before < 1
    assert rows.cache_files == stored.cache_files
    assert rows.data.nbytes == stored.data.nbytes + 8_000_000


def test_a_column_that_is_named_as_ours_is_overwritten(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"], ROW: ["x", "y"]}).to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        assert [row[ROW] for row in load_rows(tmp_path / "a.parquet", streaming=streaming)] == [0, 1]


def test_a_source_is_named_by_all_that_was_given(tmp_path):
    for name in ("train", "validation"):
        write_parquet(tmp_path / f"{name}.parquet")
    names = {split: open_source(tmp_path, split=split).name for split in (None, "validation", "train[:90%]")}
    assert names == {
        None: f"{tmp_path}",
        "validation": f"{tmp_path} (validation)",
        "train[:90%]": f"{tmp_path} (train[:90%])",
    }
    assert open_source("shapes", name="dialogues", split="test[:9]").name == "shapes (dialogues, test[:9])"
    assert open_source("shapes", name="dialogues").name == "shapes (dialogues)"


@pytest.mark.parametrize("kind", ["parquet", "parquet files", "jsonl", "webdataset pattern", "save_to_disk", "coco"])
def test_the_folder_of_the_images_is_absolute(tmp_path, monkeypatch, kind):
    """Else what is kept of one working directory's images would be taken for another's."""
    path = KINDS[kind](tmp_path)
    monkeypatch.chdir(tmp_path)
    relative = [os.path.relpath(each) for each in path] if isinstance(path, list) else os.path.relpath(path)
    assert open_source(relative).image_dir.is_absolute()
    (tmp_path / "pictures").mkdir()
    given = open_source(relative, image_dir="pictures" if kind != "coco" else "coco/train2017").image_dir
    assert given == tmp_path / ("pictures" if kind != "coco" else "coco/train2017")


# --- held out


def test_a_share_is_held_out_without_a_copy(tmp_path):
    rows = load_rows(write_parquet(tmp_path / "a.parquet", rows=100))
    learned, held_out = hold_out(rows, 0.21)
    assert (len(learned), len(held_out)) == (79, 21)
    assert sorted(learned["text"][:] + held_out["text"][:], key=int) == list(map(str, range(100)))
    assert hold_out(rows, 0.21)[1]["text"][:] == held_out["text"][:] != hold_out(rows, 0.21, seed=1)[1]["text"][:]
    assert held_out["text"][:] != list(map(str, range(79, 100))), "not just the end"
    assert learned.data.nbytes == rows.data.nbytes, "the same table behind another index"
    assert hold_out(rows, 0) == (rows, None) == hold_out(rows, 0.001)
    for share in (-0.1, 1, 5):
        with pytest.raises(ValueError, match="expected a number from 0 to below 1"):
            hold_out(rows, share)


def test_at_most_a_thousand_rows_are_held_out():
    rows = datasets.Dataset.from_dict({"text": list(map(str, range(5000)))})
    assert list(map(len, hold_out(rows, 0.5))) == [4000, 1000]
    learned, held_out = hold_out(rows.to_iterable_dataset(), 0.5)
    assert len(list(held_out)) == 1000 and 2300 < len(list(learned)) < 2700


@pytest.mark.parametrize("count", [2, 3, 40])
@pytest.mark.parametrize("share", [0.01, 0])
def test_of_few_rows_at_least_one_is_held_out_where_that_is_asked_for(count, share):
    rows = datasets.Dataset.from_dict({"text": list(map(str, range(count)))})
    learned, held_out = hold_out(rows, share, at_least=1)
    assert (len(learned), len(held_out)) == (count - 1, 1)
    learned, held_out = (list(part) for part in hold_out(rows.to_iterable_dataset(), share, at_least=1))
    assert learned and held_out and len(learned) + len(held_out) == count
    assert hold_out(rows.select([0]), share, at_least=1)[1] is None, "the only row is learned from"


def test_at_least_one_row_changes_nothing_where_the_share_makes_more():
    rows = datasets.Dataset.from_dict({"text": list(map(str, range(400)))})
    for kind in (rows, rows.to_iterable_dataset()):
        one, other = ([row["text"] for row in hold_out(kind, 0.05, at_least=least)[1]] for least in (0, 1))
        assert one == other


@pytest.mark.parametrize("kind", ["jsonl", "webdataset pattern", "shapes"])
def test_what_is_held_out_of_a_stream_is_never_learned(tmp_path, kind):
    """Whatever the order and in whatever worker; so it goes by content, not by number."""
    path, split = KINDS[kind](tmp_path), "test[:40]" if kind == "shapes" else None
    rows = load_rows(path, split=split, streaming=True)
    learned, held_out = hold_out(rows, 0.34)
    apart = [sorted(map(repr, comparable(part))) for part in (learned, held_out)]
    assert sorted(apart[0] + apart[1]) == sorted(map(repr, comparable(rows)))
    assert apart[0] and (apart[1] or len(apart[0]) < 10)
    assert sorted(map(repr, comparable(learned.shuffle(seed=1, buffer_size=10)))) == apart[0]
    loader = torch.utils.data.DataLoader(learned, batch_size=None, num_workers=min(2, rows.num_shards))
    assert sorted(map(repr, comparable(loader))) == apart[0]
    assert sorted(map(repr, comparable(hold_out(load_rows(path, split=split, streaming=True), 0.34)[1]))) == apart[1]
    assert hold_out(rows, 0) == (rows, None)


# --- the Hub


READ_FROM_HUB = """
import json, os
from pathlib import Path
from processing.image_files_vlm import load_image
from processing.reading.conversations import conversations_from_row
from processing.reading.sources import open_source
from torch.utils.data import DataLoader

def streamed(*arguments, **options):
    rows = open_source(*arguments, **options, streaming=True).rows
    here, there = (
        [[load_image(row["image"]).getpixel((0, 0)), row["caption"]] for row in each]
        # In a worker forked after a first reading, any threads that the library reads ahead with would be gone.
        for each in (rows, DataLoader(rows, batch_size=None, num_workers=1))
    )
    assert here == there
    return here

def outcome(*arguments, **options):
    try:
        return len(open_source(*arguments, **options).rows)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

converted = {"revision": "refs/convert/parquet"}
flickr = "nlphuji/flickr30k"
found = {
    # First, while there is nothing in the cache.
    "streamed": streamed(flickr, **converted),
    "streamed images": streamed("me/walls"),
    "stored": [str(file) for file in Path(os.environ["HF_HOME"]).rglob("*") if file.suffix in (".parquet", ".png")],
    "part of a stream": outcome(flickr, split="test[:50%]", streaming=True, **converted),
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
row = open_source(flickr, **converted).rows.shuffle(seed=42)[0]
found["columns"] = sorted(row)
found["conversations"] = len(conversations_from_row(row))
found["first"] = conversations_from_row(row, prompt="What?", caption_choice="first")[0]["messages"]
found["size"] = load_image(row["image"]).size
found["stored later"] = len(list(Path(os.environ["HF_HOME"]).rglob("*.parquet")))
print(json.dumps(found))
"""


def test_flickr30k_is_read_from_the_hub_as_it_is_there(tmp_path, monkeypatch):
    """The repository is a script; the Hub's parquet copy of it has one folder for its configuration, one split."""
    answer = fake_hub._Handler._answer

    def answer_parts(self, status, content, headers):
        """Parts of files, which is what a stream asks for."""
        if status == 200 and (asked := self.headers.get("Range")):
            start, end = (int(place) for place in asked.removeprefix("bytes=").split("-"))
            headers = headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            status, content = 206, content[start : end + 1]
        answer(self, status, content, headers)

    monkeypatch.setattr(fake_hub._Handler, "_answer", answer_parts)
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
    walls = folder_of_images(tmp_path / "hub/datasets/me/walls")
    metadata = walls / "train/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"text"', '"caption"'))
    with fake_hub.start_fake_hub(tmp_path / "hub") as url:
        environment = fake_hub.hub_environment(url, tmp_path / "home") | {"PYTHONPATH": os.pathsep.join(sys.path)}
        ran = subprocess.run(
            [sys.executable, "-c", READ_FROM_HUB], env=environment, capture_output=True, text=True, timeout=120
        )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])

    for key in ("script", "script again"):
        assert found[key].startswith("DuetError: nlphuji/flickr30k: a script repository"), found[key]
        assert "--dataset_revision refs/convert/parquet" in found[key] and "\n" not in found[key]
    assert "me/private: neither a file or folder here nor a dataset on the Hub" in found["unreachable"]
    assert (found["converted"], found["configuration"], found["part"]) == (count, count, count // 2)
    assert "no split 'train'; expected one of test" in found["no such split"]
    captions = [[f"Caption {i} of image {k}." for i in range(5)] for k in range(count)]
    assert found["streamed"] == [[[255, 0, 0], texts] for texts in captions]
    assert found["stored"] == [] and found["stored later"] == 1
    assert found["streamed images"] == [[[255, 0, 0], "A red wall."], [[0, 0, 255], "A blue wall."]]
    assert "'test[:50%]' is a part of a split" in found["part of a stream"]
    assert found["no such revision"].startswith("NotFound: nlphuji/flickr30k at revision nope: the Hub has no")
    assert found["columns"] == [ROW, "caption", "filename", "image", "img_id", "sentids", "split"]
    assert found["conversations"] == 5 and found["size"] == [3, 2]
    assert found["first"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
