"""One bad row, entry, sample or file costs itself alone: it is a dropped item in its place, its neighbours are read."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from processing.batching.account import Account, Record
from processing.batching.dataset import ConversationDataset, StreamedDataset
from processing.batching.encode_ahead import without_image_bytes
from processing.batching.encoding import Encoder, encode_dialogue, encode_item
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import ImagePolicy, load_image
from processing.reading import json_reader
from processing.reading.items import Reading
from processing.reading.rows import hold_out
from processing.reading.sources import open_source
from tests import tiny


WAYS = pytest.mark.parametrize("streaming", [False, True])


def items_of(path, streaming: bool, **options) -> list:
    """What is said in each conversation; of a dropped item its row and why."""
    source = open_source(path, streaming=streaming, **options)
    reading = Reading(source="data", images=ImagePolicy(folder=str(source.image_dir)))
    items = [item for index, row in enumerate(source.rows) for item in reading.items(row, index)]
    if not streaming:
        dataset = ConversationDataset(source.rows, reading)
        assert [dataset[index] for index in range(len(dataset))] == items
    return list(map(said, items))


def said(item):
    if "dropped" in item:
        assert item["dropped"][0] == "malformed row" and item["source"] == "data"
        assert item["dropped"][1].startswith(f"data, row {item['row']}: ")
        return item["row"], item["dropped"][1].partition(": ")[2]
    return item["messages"][-1]["content"][-1]["text"]


def line(text, **more) -> bytes:
    return json.dumps({"image": "a.png", "caption": text, **more}).encode()


def good(number: int) -> bytes:
    return line(f"row {number}")


# --- JSON


BAD_LINES = {
    "Latin-1": (b'{"image": "a.png", "caption": "caf\xe9"}', "the byte 0xe9 at 34 is no UTF-8"),
    "garbage": (b"hello", "not readable as JSON"),
    "half a line": (b'{"image": "a.png", "cap', "not readable as JSON"),
    "a NUL byte": (b'{"image": "a.png", "caption": "a\0b"}', "not readable as JSON"),
    "zeros": (b"\0" * 50, "not readable as JSON"),
    "a list": (b'["a.png", "x"]', 'found \'["a.png", "x"]\'; expected an object'),
    "a text": (b'"a"', "found '\"a\"'; expected an object"),
    "half a character": (b'{"image": "a.png", "caption": "\\ud83d"}', "a text that is no UTF-8"),
    "nested deep": (b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 100 deep"),
}


@WAYS
@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_of_json_costs_its_own_row(tmp_path, bad, place, streaming):
    content, why = BAD_LINES[bad]
    lines = [content if number == place else good(number) for number in range(5)]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    found = items_of(tmp_path / "data.jsonl", streaming)
    row, reason = found.pop(place)
    assert row == place and reason.startswith(f"line {place + 1} of data.jsonl: ") and why in reason
    assert found == [f"row {number}" for number in range(5) if number != place]


@WAYS
def test_an_empty_line_is_no_row(tmp_path, streaming):
    (tmp_path / "data.jsonl").write_bytes(b"\n".join([good(0), b"", b"  ", b"x", b"", good(1), b""]))
    found = items_of(tmp_path / "data.jsonl", streaming)
    assert (found[0], found[1][0], found[2]) == ("row 0", 1, "row 1") and "line 4 of" in found[1][1]


@WAYS
def test_a_byte_order_mark_is_no_content(tmp_path, streaming):
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([good(0), b"x", good(2)]))
    assert [found for found in items_of(tmp_path / "data.jsonl", streaming)][::2] == ["row 0", "row 2"]


@WAYS
@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
def test_a_file_in_utf_16_is_named_with_the_remedy(tmp_path, name, streaming):
    (tmp_path / name).write_text("image,caption\na.png,x\n", encoding="utf-16")
    with pytest.raises(ValueError) as caught:
        items_of(tmp_path / name, streaming)
    assert str(caught.value).startswith(f"{tmp_path / name}: text in UTF-16; expected UTF-8, convert it with")


@WAYS
def test_a_compressed_file_that_breaks_off_gives_what_comes_before(tmp_path, streaming):
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(b"\n".join(map(good, range(2_000))))[:-40])
    found = items_of(tmp_path / "data.jsonl.gz", streaming)
    assert found[1_900] == "row 1900" and "the rest of it is not readable" in found[-1][1]


@WAYS
def test_a_bad_entry_of_a_list_costs_itself(tmp_path, streaming):
    entries = [good(0), b'{"image": "a.png", "caption": "caf\xe9"}', b"5", b"null", b'"a"', good(5)]
    (tmp_path / "data.json").write_bytes(b"[\n" + b",\n".join(entries) + b"\n]")
    found = items_of(tmp_path / "data.json", streaming)
    assert (found[0], found[-1]) == ("row 0", "row 5") and [row for row, _ in found[1:-1]] == [1, 2, 3, 4]
    assert "entry 1 of data.json: a text that is no UTF-8" == found[1][1]


@WAYS
@pytest.mark.parametrize("depth", [300, 100_000])
def test_an_entry_of_a_list_that_breaks_off_or_is_nested_deep_costs_itself(tmp_path, streaming, depth):
    deep = b'{"image": "a.png", "caption": ' + b"[" * depth + b"]" * depth + b"}"
    entries = [good(0), deep, b'{"image": "a.png", "caption": "x",}', b'{"caption": "}]", no}', good(4)]
    (tmp_path / "data.json").write_bytes(b"[\n" + b",\n".join(entries) + b"\n]")
    found = items_of(tmp_path / "data.json", streaming)
    assert (found[0], found[-1]) == ("row 0", "row 4") and [row for row, _ in found[1:-1]] == [1, 2, 3]
    assert all(detail.startswith(f"entry {row} of data.json: ") for row, detail in found[1:-1])
    # Where nobody can tell where the next one begins, it is not guessed.
    (tmp_path / "data.json").write_bytes(b"[" + b",".join([good(0), b"no", good(2)]) + b"]")
    assert "entry 1 of data.json and all behind it" in items_of(tmp_path / "data.json", streaming)[-1][1]


@WAYS
@pytest.mark.parametrize("levels", [40, 70, 99, 120, 900])
def test_what_a_row_nests_costs_at_most_itself(tmp_path, streaming, levels):
    for inside, nested in (("", "[" * levels + "]" * levels), ("1", '{"a":' * levels + "1" + "}" * levels)):
        deep = f'{{"image": "a.png", "caption": "row 0", "meta": {nested}}}'.encode()
        for name, content in (
            ("d.jsonl", b"\n".join([deep, good(1)])),
            ("d.json", b"[" + deep + b"," + good(1) + b"]"),
        ):
            path = tmp_path / f"{inside}{name}"
            path.write_bytes(content)
            first, second = items_of(path, streaming)
            assert second == "row 1" and (first == "row 0" if levels < 100 else "nested more than 100 deep" in first[1])


@WAYS
def test_a_list_that_is_cut_short_gives_what_comes_before(tmp_path, streaming):
    (tmp_path / "data.json").write_bytes(b"[" + b",".join([good(0), good(1), b'{"image": "a.']))
    found = items_of(tmp_path / "data.json", streaming)
    assert found[:2] == ["row 0", "row 1"] and "entry 2 of data.json and all behind it" in found[2][1]


@pytest.fixture
def small_blocks(monkeypatch):
    """A few lines go to Arrow at once, so that a file has more than one block."""
    monkeypatch.setattr(json_reader, "BLOCK", 150)


@WAYS
def test_a_row_that_fits_no_column_of_the_first_block_is_read_all_the_same(tmp_path, streaming, small_blocks):
    """Another key, a list where there were texts, a text that looks like a number or a date."""
    rows = [{"image": "a.png", "caption": f"row {number}"} for number in range(6)]
    rows += [
        {"image": "a.png", "caption": ["007", "", "1e3"]},
        {"image": "a.png", "caption": "2020-01-01", "source": {"year": 2020}},
        {"image": "a.png", "caption": ["true", "null"], "weight": None},
        {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]},
        {"image": "a.png", "caption": 5},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = items_of(tmp_path / "data.jsonl", streaming)
    assert found[:6] == [f"row {number}" for number in range(6)]
    assert found[7][0] == 6, "the empty caption, in its place"
    assert found[6:7] + found[8:] == ["007", "1e3", "2020-01-01", "true", "null", "Hi.", "5"]


@WAYS
def test_texts_that_look_like_dates_stay_texts(tmp_path, streaming, small_blocks):
    texts = ["2020-01-01", "2021-12-31T10:00:00", *(f"2020-01-{day:02}" for day in range(1, 9)), "no date"]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(map(line, texts)))
    assert items_of(tmp_path / "data.jsonl", streaming) == texts


def test_a_bad_row_may_be_held_out_of_a_stream_and_is_never_in_both_parts(tmp_path):
    lines = [b"x" if number % 7 == 3 else good(number) for number in range(40)]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    source = open_source(tmp_path / "data.jsonl", streaming=True)
    reading = Reading(source="data", images=ImagePolicy(folder=str(tmp_path)))
    parts = [
        sorted(str(said(item)) for index, row in enumerate(part) for item in reading.items(row, index))
        for part in hold_out(source.rows, 0.3)
    ]
    assert sorted(parts[0] + parts[1]) == sorted(map(str, items_of(tmp_path / "data.jsonl", True)))


# --- CSV


BAD_CSV = {
    "Latin-1": (b"a.png,caf\xe9", "a text that is no UTF-8; save the file as UTF-8"),
    "too many cells": (b"a.png,x,y", "3 cells where the header names 2 columns"),
    "an open quote": (b'a.png,"x', "a quote that is opened is not closed"),
    "a NUL byte": (b"a.png,x\0y", "a NUL byte"),
}


@WAYS
@pytest.mark.parametrize("place", [0, 2, 3])
@pytest.mark.parametrize("bad", BAD_CSV)
def test_a_bad_line_of_csv_costs_its_own_row(tmp_path, bad, place, streaming):
    content, why = BAD_CSV[bad]
    lines = [content if number == place else f"a.png,row {number}".encode() for number in range(4)]
    (tmp_path / "data.csv").write_bytes(b"image,caption\n" + b"\n".join(lines) + b"\n")
    found = items_of(tmp_path / "data.csv", streaming)
    assert found.pop(place) == (place, f"line {place + 2} of data.csv: {why}")
    assert found == [f"row {number}" for number in range(4) if number != place]


@WAYS
def test_csv_is_read_as_it_is_written(tmp_path, streaming):
    content = '\ufeffimage,caption\na.png,"two\nlines"\r\n\n  \na.png,"a ""word"""\na.png,"x",\n'
    (tmp_path / "data.csv").write_text(content, newline="")
    assert items_of(tmp_path / "data.csv", streaming) == ["two\nlines", 'a "word"', "x"]


@WAYS
@pytest.mark.parametrize(("name", "mark"), [("data.csv", ";"), ("data.csv", "\t"), ("data.tsv", "\t")])
def test_a_table_is_read_as_spreadsheets_write_it(tmp_path, name, mark, streaming):
    table = f'\ufeffimage{mark}caption\r\na.png{mark}"one, and{mark}more"\r\nb.png{mark}two\r\n'
    (tmp_path / name).write_text(table, newline="", encoding="utf-8")
    assert items_of(tmp_path / name, streaming) == [f"one, and{mark}more", "two"]


@WAYS
def test_one_column_and_marks_in_a_name_are_no_separator(tmp_path, streaming):
    (tmp_path / "one.csv").write_text("caption\none; and two\n")
    (tmp_path / "two.csv").write_text('image,"caption; of it"\na.png,one\n')
    rows = [list(open_source(tmp_path / name, streaming=streaming).rows) for name in ("one.csv", "two.csv")]
    assert rows[0][0]["caption"] == "one; and two" and rows[1][0]["caption; of it"] == "one"


@WAYS
@pytest.mark.parametrize("columns", [None, {"image": "filename", "caption": "raw"}])
def test_flickr30ks_own_table_is_read(tmp_path, columns, streaming):
    """Its captions are a list that is written as a text."""
    header = "raw,sentids,split,filename,img_id\n"
    table = [header]
    for k in range(3):
        table.append(f'"[""Dog {k}, a."", ""It is {k}.""]","[{2 * k}, {2 * k + 1}]",train,{k}.jpg,{k}\n')
    (tmp_path / "flickr_annotations_30k.csv").write_text("".join(table))
    source = open_source(tmp_path / "flickr_annotations_30k.csv", streaming=streaming)
    reading = Reading(source="data", columns=columns, images=ImagePolicy(folder=str(tmp_path)))
    items = [item for index, row in enumerate(source.rows) for item in reading.items(row, index)]
    assert list(map(said, items)) == [text for k in range(3) for text in (f"Dog {k}, a.", f"It is {k}.")]
    assert [Path(item["images"][0]).name for item in items] == [f"{k}.jpg" for k in range(3) for _ in range(2)]


@WAYS
def test_csv_files_may_have_columns_of_their_own(tmp_path, streaming):
    (tmp_path / "a.csv").write_text("image,caption\na.png,one\n")
    (tmp_path / "b.csv").write_text("caption,more,image\ntwo,x,b.png\nthree,,b.png\n")
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe\0")
    found = items_of(tmp_path / "*.csv", streaming)
    assert found[:3] == ["one", "two", "three"] and found[3][0] == 3 and "c.csv: not readable" in found[3][1]


# --- parquet


def captions(place: Path, texts: list, **columns) -> Path:
    datasets.Dataset.from_dict({"image": ["a.png"] * len(texts), "caption": texts, **columns}).to_parquet(place)
    return place


@WAYS
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_parquet_file_of_several_that_is_cut_short_costs_itself(tmp_path, broken, streaming):
    for number in range(3):
        file = captions(tmp_path / f"{number}.parquet", [f"{number} a", f"{number} b"])
    file = tmp_path / f"{broken}.parquet"
    file.write_bytes(file.read_bytes()[:300])
    found = items_of(tmp_path / "*.parquet", streaming)
    row, why = found.pop(2 * broken)
    assert row == 2 * broken and why.startswith(f"{broken}.parquet: not readable (Parquet magic bytes")
    assert found == [f"{number} {letter}" for number in range(3) if number != broken for letter in "ab"]


@WAYS
def test_a_broken_part_of_a_parquet_file_costs_its_rows(tmp_path, streaming):
    texts = [f"{number:040}" for number in range(40)]
    file = tmp_path / "data.parquet"
    table = pa.table({"image": ["a.png"] * 40, "caption": texts})
    pq.write_table(table, file, row_group_size=10, use_dictionary=False)
    content, start = bytearray(file.read_bytes()), pq.read_metadata(file).row_group(1).column(1).data_page_offset
    content[start : start + 60] = b"\xff" * 60
    file.write_bytes(content)
    found = items_of(file, streaming)
    assert found[:10] + found[20:] == texts[:10] + texts[20:]
    assert [row for row, _ in found[10:20]] == list(range(10, 20)) and "row group 1 of data.parquet" in found[10][1]


@WAYS
def test_parquet_files_may_have_columns_of_their_own(tmp_path, streaming):
    captions(tmp_path / "a.parquet", ["one"])
    captions(tmp_path / "b.parquet", [2], more=["x"])
    assert items_of(tmp_path / "*.parquet", streaming) == ["one", "2"]


@WAYS
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.list_(pa.binary())])
@pytest.mark.parametrize("ahead", [False, True])
def test_plain_bytes_are_images(tmp_path, kind, streaming, ahead, folders):
    images = [picture(colour) for colour in ("red", "blue")]
    several = pa.types.is_list(kind)
    name = "images" if several else "jpg"
    column = pa.array([images if several else images[0], images[:1] if several else images[1]], kind)
    texts = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}] for text in ("x", "y")]
    pq.write_table(pa.table({name: column, "messages": texts}), tmp_path / "data.parquet")
    source = open_source(tmp_path / "data.parquet", streaming=streaming)
    reading = Reading(source="data", images=ImagePolicy(folder=str(tmp_path)))
    if streaming:
        dataset = StreamedDataset([(source.rows, reading)], shuffle_buffer=1)
        items = [item for item, _ in zip(dataset, range(2))]
    else:
        dataset = ConversationDataset(source.rows, reading)
        if ahead:
            _, processor = tiny.compose(*folders("vit-gpt2"), tiny.PAIRS["vit-gpt2"][2])
            dataset.encode_ahead(Encoder(processor, encode_dialogue))
        items = [dataset[index] for index in range(len(dataset))]
    colours = [[load_image(image).getpixel((0, 0)) for image in item["images"]] for item in items]
    red, blue = (255, 0, 0), (0, 0, 255)
    assert colours == ([[red, blue], [red]] if several else [[red], [blue]])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_bytes_are_not_loaded_to_encode_texts(kind):
    columns = {
        "image": pa.array([b"x" * 1_000, None], kind),
        "images": pa.array([[b"y" * 1_000, None], None], pa.list_(kind)),
    }
    table = pa.table({**columns, "text": ["a", "b"]})
    light = without_image_bytes(table, datasets.Features.from_arrow_schema(table.schema))
    assert light == {"image": [b"x" * 16, None], "images": [[b"y" * 16, None], None], "text": ["a", "b"]}


# --- archives of samples


def picture(colour: str = "red") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(content, "PNG")
    return content.getvalue()


def archive(place: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(place, "w") as file:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
            else:
                entry.size = len(content)
            file.addfile(entry, io.BytesIO(content or b""))
    return place


def samples(changes: dict[int, tuple[str, bytes]], count: int = 4) -> list[tuple[str, bytes]]:
    """Files of as many samples; a change is another second file, or a file more."""
    members = []
    for number in range(count):
        suffix, content = changes.get(number, ("txt", f"row {number}".encode()))
        members += [(f"{number}.png", picture()), (f"{number}.{suffix}", content)]
    return members


BAD_SAMPLES = {
    "no UTF-8": (("txt", b"caf\xe9"), "its .txt is not readable"),
    "no JSON": (("json", b"{no"), "its .json is not readable"),
    "two images": (("png", b"another"), "two files .png"),
}


@WAYS
@pytest.mark.parametrize("place", [0, 2, 3])
@pytest.mark.parametrize("bad", BAD_SAMPLES)
def test_a_bad_sample_of_an_archive_costs_itself(tmp_path, bad, place, streaming):
    change, why = BAD_SAMPLES[bad]
    found = items_of(archive(tmp_path / "data.tar", samples({place: change})), streaming)
    row, reason = found.pop(place)
    assert row == place and reason.startswith(f"sample {place} of data.tar: {why}")
    assert found == [f"row {number}" for number in range(4) if number != place]


@WAYS
def test_an_archive_that_breaks_off_gives_what_comes_before(tmp_path, streaming):
    file = archive(tmp_path / "data.tar", samples({2: ("txt", b"x" * 600)}))
    file.write_bytes(file.read_bytes()[: 512 * 11 + 100])  # in the middle of that text
    found = items_of(file, streaming)
    assert found[:2] == ["row 0", "row 1"] and len(found) == 4
    assert "sample 2 of data.tar: not readable" in found[2][1] and "not to its end" in found[3][1]


@WAYS
@pytest.mark.parametrize("broken", [0, 1])
def test_an_archive_of_several_that_is_none_costs_itself(tmp_path, broken, streaming):
    for number in range(2):
        archive(tmp_path / f"{number}.tar", samples({}, 2))
    (tmp_path / f"{broken}.tar").write_bytes(b"no archive" * 100)
    found = items_of(tmp_path / "*.tar", streaming)
    row, why = found.pop(2 * broken)
    assert row == 2 * broken and why.startswith(f"{broken}.tar: not readable") and found == ["row 0", "row 1"]


@WAYS
def test_a_link_in_an_archive_leads_nowhere(tmp_path, streaming):
    members = [("0.png", picture()), ("0.txt", b"row 0"), ("1.png", None), ("1.txt", b"row 1")]
    found = items_of(archive(tmp_path / "data.tar", members), streaming)
    assert found[0] == "row 0" and found[1][0] == 1 and len(found) == 2


@WAYS
def test_an_image_of_another_format_than_the_first_ones_is_read(tmp_path, streaming):
    members = [(name.replace("6.png", "6.webp"), content) for name, content in samples({}, 8)]
    assert items_of(archive(tmp_path / "data.tar", members), streaming) == [f"row {number}" for number in range(8)]


@WAYS
def test_a_sample_with_a_file_that_none_of_the_first_has_is_dropped(tmp_path, streaming):
    found = items_of(archive(tmp_path / "data.tar", samples({6: ("json", b"{}")}, 8)), streaming)
    assert found[6] == (6, "sample 6 of data.tar: a file .json, which none of the first samples has")
    assert len(found) == 8


# --- folders of images


def folder(place: Path, content: bytes, kind: str = "jsonl") -> Path:
    place.mkdir()
    for name in ("a.png", "b.png"):
        (place / name).write_bytes(picture())
    (place / f"metadata.{kind}").write_bytes(content)
    return place


def named(name, text: str = "text") -> bytes:
    return json.dumps({"file_name": name, "text": text}).encode()


@WAYS
@pytest.mark.parametrize("name", ["../a.png", "/etc/hostname", "file:///etc/hostname", "x/../../a.png", "..\\a.png"])
def test_metadata_that_lead_out_of_their_folder_cost_their_row(tmp_path, name, streaming):
    place = folder(tmp_path / "images", b"\n".join([named("a.png", "first"), named(name), named("b.png", "last")]))
    assert items_of(place, streaming) == ["first", (1, f"the image {name} lies outside the data set's folder"), "last"]


@WAYS
def test_lists_of_names_may_not_lead_out_either(tmp_path, streaming):
    rows = [{"file_names": names, "text": "x"} for names in (["a.png", "b.png"], ["b.png", "../a.png"], ["b.png"])]
    place = folder(tmp_path / "images", "\n".join(map(json.dumps, rows)).encode())
    assert items_of(place, streaming) == ["x", (1, "the image ../a.png lies outside the data set's folder"), "x"]


@WAYS
def test_what_looks_like_an_image_in_metadata_opens_no_file(tmp_path, streaming):
    with zipfile.ZipFile(tmp_path / "private.zip", "w") as archive:
        archive.writestr("a.png", "secret")
    elsewhere = {"bytes": None, "path": f"zip://a.png::{tmp_path / 'private.zip'}"}
    metadata = json.dumps({"file_name": "a.png", "text": "x", "other": elsewhere, "others": [elsewhere]}).encode()
    (row,) = open_source(folder(tmp_path / "images", metadata), streaming=streaming).rows
    assert row["other"] == elsewhere and row["others"] == [elsewhere]


@pytest.mark.parametrize("kind", ["file_name", "file_names"])
def test_images_in_an_archive_of_a_folder_are_streamed_with_their_content(tmp_path, kind):
    content, names = picture(), "a.png" if kind == "file_name" else ["a.png"]
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("a.png", content)
        archive.writestr("metadata.jsonl", json.dumps({kind: names, "text": "x"}))
    (row,) = open_source(tmp_path, streaming=True).rows
    assert (row["image"] if kind == "file_name" else row["images"][0])["bytes"] == content


@WAYS
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_bad_lines_of_metadata_cost_themselves(tmp_path, kind, streaming):
    lines = {
        "jsonl": [named("a.png", "first"), b"x", named(None), b'{"text": "caf\xe9"}', named("b.png", "last")],
        "csv": [b"file_name,text", b"a.png,first", b"b.png,x,y", b",z", b"b.png,caf\xe9", b"b.png,last"],
    }[kind]
    found = items_of(folder(tmp_path / "images", b"\n".join(lines), kind), streaming)
    assert (found[0], found[-1]) == ("first", "last") and [row for row, _ in found[1:-1]] == [1, 2, 3]


@WAYS
def test_an_image_of_a_folder_that_is_missing_or_broken_is_known_when_it_is_looked_at(tmp_path, streaming):
    place = folder(tmp_path / "images", b"\n".join([named("a.png"), named("gone.png"), named("b.png")]))
    (place / "b.png").write_bytes(b"no image")
    assert items_of(place, streaming) == ["text"] * 3


# --- the account


WILD = "x\x1b[2J\u202e\ud800"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "answer": "b", WILD: "c"},
        {"messages": [{"role": "user", "content": "a", WILD: "c"}, {"role": "assistant", "content": "b"}]},
        {"question": "a", "answer": "b", f"image {WILD}": "a.png"},
        {"json": {"question": "a", "answer": "b", "hint": "c"}, WILD: "d"},
        {WILD: "a"},
        {"__odd": WILD},
        {"__odd": 5},
        {"image": WILD, "caption": "a"},
    ],
)
def test_a_name_that_data_chose_steers_no_terminal(row):
    account = Account()
    for item in Reading(source="data").items(row, 0):
        notes = tuple(item.get("notes", ()))
        account.add([Record("data", 0, *item.get("dropped", (None, "")), notes=notes)])
    lines = account.table().splitlines()
    assert any("x\\x1b[2J\\u202e\\ud800" in line or ": 5)" in line for line in lines) and all(
        map(str.isprintable, lines)
    )


def test_a_data_set_steers_no_terminal_by_its_settings(tmp_path):
    (tmp_path / "README.md").write_text('---\nconfigs:\n- config_name: default\n  data_files: "/x\\e[2J"\n---\n')
    (tmp_path / "a.jsonl").write_bytes(good(1))
    with pytest.raises(DuetError, match=r"name /x\\x1b\[2J as its data") as caught:
        open_source(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_behind_a_bad_row_in_every_worker(tmp_path, workers):
    for file in "ab":
        lines = [b"caf\xe9" if number == 3 else line(f"{file} {number}") for number in range(6)]
        (tmp_path / f"{file}.jsonl").write_bytes(b"\n".join(lines))
    source = open_source(tmp_path / "*.jsonl", streaming=True)
    dataset = StreamedDataset([(source.rows, Reading(source="data", images=ImagePolicy(folder=str(tmp_path))))])
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)
    epoch = [item for item, _ in zip(loader, range(12))]
    dropped = [item["dropped"][1] for item in epoch if "dropped" in item]
    assert sorted(said(item) for item in epoch if "dropped" not in item) == sorted(
        f"{file} {number}" for file in "ab" for number in range(6) if number != 3
    )
    assert sorted(why.partition("line ")[2] for why in dropped) == [
        f"4 of {file}.jsonl: the byte 0xe9 at 3 is no UTF-8" for file in "ab"
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_bad_row_is_in_the_account_with_file_and_line(tmp_path, ahead, folders):
    lines = [b'{"caption": "caf\xe9"}' if number == 150 else good(number) for number in range(200)]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    _, processor = tiny.compose(*folders("vit-gpt2"), tiny.PAIRS["vit-gpt2"][2])
    source = open_source(tmp_path / "data.jsonl")
    dataset = ConversationDataset(source.rows, Reading(source="data", images=ImagePolicy(folder=str(tmp_path))))
    encoder = Encoder(processor, encode_dialogue)
    if ahead:
        dataset.encode_ahead(encoder)
        account = dataset.account
    else:
        account = type(dataset.account)()
        account.add(encode_item(dataset[index], encoder)[1] for index in range(len(dataset)))
    assert account.total["samples"] == 200 and account.total["learned from"] == 199
    (((_, row), (reason, detail)),) = account.named.items()
    assert (row, reason) == ("150", "malformed row") and "line 151 of data.jsonl: the byte 0xe9" in detail


@WAYS
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "tar"])
def test_an_empty_file_among_several_is_named(tmp_path, suffix, streaming):
    content = {"jsonl": good(0), "csv": b"image,caption\na.png,row 0\n"}.get(suffix)
    for name in ("a", "c"):
        file = tmp_path / f"{name}.{suffix}"
        if content:
            file.write_bytes(content)
        elif suffix == "parquet":
            captions(file, ["row 0"])
        else:
            archive(file, samples({}, 1))
    (tmp_path / f"b.{suffix}").touch()
    found = items_of(tmp_path / f"*.{suffix}", streaming)
    assert found[::2] == ["row 0", "row 0"] and found[1][0] == 1 and found[1][1].startswith(f"b.{suffix}: ")
