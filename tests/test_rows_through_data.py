"""Files as people have them go through every way of reading: map-style or streamed, encoded before or in the batch."""

import csv
import json

import datasets
import pytest
from PIL import Image

from processing import VLMDataCollator
from processing.batching.account import Account
from processing.batching.dataset import ConversationDataset, StreamedDataset
from processing.batching.encoding import Encoder, encode_caption, encode_dialogue
from processing.image_files_vlm import ImagePolicy
from processing.reading.items import Reading
from processing.reading.sources import open_source
from tests import tiny
from training_vlm.data import load_data
from training_vlm.settings import parse_arguments
from training_vlm.stages import SFT


@pytest.fixture(scope="module")
def processor():
    return tiny.processor_of(tiny.with_chatml(tiny.byte_level_tokenizer()))


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def flickr(folder):
    captions = ['["two dogs.", "a dog."]', "['one', '', 'three']", "alone"]
    rows = [{"raw": caption, "sentids": "[1]", "filename": f"{n}.png"} for n, caption in enumerate(captions)]
    return write_csv(folder / "flickr.csv", rows), 6, 5, {"malformed row": 1}, "the column sentids is not read"


def choices(folder):
    row = {
        "question": "Which?",
        "choices": "['water', 'a rock']",
        "answer": "1",
        "image_path": "['0.png']",
        "task": "x",
    }
    return write_csv(folder / "choices.csv", [row, {**row, "answer": "7"}]), 2, 1, {"malformed row": 1}, "task"


def plain_bytes(folder):
    pictures = [(folder / f"{number}.png").read_bytes() for number in range(3)]
    rows = {"images": [pictures[:2], pictures[2:], []], "question": ["Both?"] * 3, "answer": ["Yes."] * 3, "x": [1] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "bytes.parquet")
    return folder / "bytes.parquet", 3, 3, {}, "the column x is not read"


def dialogues(folder):
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    rows = [
        {"image": "0.png", "conversations": said},
        {"image": "", "conversations": said},
        {"conversations": said[1:]},
    ]
    rows += [{"photo": "0.png", "conversations": [{**said[0], "value": "What?"}, said[1]]}]
    (folder / "dialogues.jsonl").write_text("".join(json.dumps({**row, "origin": "web"}) + "\n" for row in rows))
    return folder / "dialogues.jsonl", 4, 2, {"malformed row": 2}, "the column origin is not read"


@pytest.mark.parametrize("make", [flickr, choices, plain_bytes, dialogues])
def test_whatever_way_rows_are_read_the_same_is_learned_and_the_same_counted(processor, folder, make):
    file, samples, learned, dropped, note = make(folder)
    encoder = Encoder(processor, encode_dialogue)
    collate = VLMDataCollator(encoder, account=True)
    batches = []
    for way in ("later", "ahead", "streamed"):
        source = open_source(file, streaming=way == "streamed")
        reading = Reading(source="s", prompt="Describe.", images=ImagePolicy(folder))
        account = Account()
        if way == "streamed":
            stream = StreamedDataset([(source.rows, reading)], shuffle_buffer=1)
            items = [item for item, _ in zip(stream, range(samples))]
        else:
            dataset = ConversationDataset(source.rows, reading)
            if way == "ahead":
                dataset.encode_ahead(encoder)
                account = dataset.account
            items = [dataset[index] for index in range(len(dataset))]
            assert len(items) == (learned if way == "ahead" else samples)
        batch = collate(items)
        if way != "ahead":
            account.add_batch(batch["account"])
        report = account.report()["total"]
        assert (report["samples"], report["learned from"], report["dropped"]) == (samples, learned, dropped)
        assert note in str(account.report())
        batches.append(batch)
    for batch in batches[1:]:
        for name in ("input_ids", "labels", "pixel_values"):
            assert batch[name].equal(batches[0][name])


def test_stage_one_learns_an_answer_whatever_system_text_its_row_has(processor, folder):
    row = {"image": "0.png", "question": "What?", "answer": "A square."}
    reading = Reading(images=ImagePolicy(folder))
    plain, told = (reading.items({**row, **system}, 0)[0] for system in ({}, {"system": "Be brief."}))
    assert len(told["messages"]) == 3
    assert (
        Encoder(processor, encode_caption)(told)["input_ids"] == Encoder(processor, encode_caption)(plain)["input_ids"]
    )


def test_a_run_asks_for_the_answers_and_leaves_out_the_columns_that_it_is_told(folder):
    row = {"question": "Which?", "choices": ["water", "a rock"], "answer": 1, "thumbnail": "0.png"}
    (folder / "choices.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    told = [
        "--dataset",
        str(folder / "choices.jsonl"),
        "--columns",
        "thumbnail=ignore",
        "--use_cpu",
        "--eval_share",
        "0",
    ]
    for option, answer in ([], "B"), (["--choice_answer", "text"], "a rock"):
        _, _, data_args, *_, training_args = parse_arguments(SFT, [*told, *option])
        ((rows, reading),) = load_data(SFT, data_args, training_args).train
        (item,) = reading.items(rows[0], 0)
        assert item["messages"][1]["content"][0]["text"] == answer
