"""Data sets of conversations: encoded ahead or later they are the same, mixed and streamed they lose nothing."""

import base64
import itertools
import json
import re
import weakref
from collections import Counter
from functools import partial

import datasets
import pyarrow as pa
import pytest
import torch
from datasets.fingerprint import Hasher
from PIL import Image
from torch.utils.data import DataLoader

from processing import VLMDataCollator
from processing.batching.account import Account
from processing.batching.dataset import (
    ConversationDataset,
    MixedDataset,
    StreamedDataset,
)
from processing.batching.encode_ahead import _RowEncoder, imported_texts, without_image_bytes
from processing.batching.encoding import KEPT, Encoder, SampleDropped, encode_caption, encode_dialogue
from processing.image_files_vlm import ImagePolicy, load_image
from processing.reading.items import Reading
from tests import tiny


@pytest.fixture(scope="module")
def processor():
    return tiny.processor_of("byte-level", "default")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with eight small pictures."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        Image.new("RGB", (20, 20), (number * 20, 100, 50)).save(root / f"{number}.png")
    return root


def dialogue_rows(count=12, start=0):
    return datasets.Dataset.from_list(
        [
            {
                "image": f"{n % 8}.png" if n % 3 else None,
                "messages": [
                    {"role": "user", "content": f"question {n}"},
                    {"role": "assistant", "content": "answer " * (n % 4) + str(n)},
                ],
            }
            for n in range(start, start + count)
        ]
    )


def reading_of(folder, **kwargs):
    return Reading(source="pictures", images=ImagePolicy(str(folder)), **kwargs)


def texts(dataset):
    """What the items of a data set say, whether they are encoded or not."""
    return [json.dumps(item["messages"]) for item in dataset]


def assert_same_batch(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        same = found[name] == expected[name]
        assert same if name == "account" else bool(torch.as_tensor(same).all()), name


@pytest.mark.parametrize("stored", [False, True], ids=["paths", "bytes"])
@pytest.mark.parametrize("choice", ["all", "first", "random"])
def test_encoded_ahead_or_when_asked_for_is_the_same(processor, folder, stored, choice):
    rows = datasets.Dataset.from_list(
        [{"image": f"{n}.png", "caption": [f"caption {n} number {k}" for k in range(n % 3 + 1)]} for n in range(8)]
    )
    if stored:
        features = datasets.Features(
            image=datasets.Image(decode=False), caption=datasets.List(datasets.Value("string"))
        )
        rows = datasets.Dataset.from_list(
            [{**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}} for row in rows], features
        )
    reading = reading_of(folder, caption_choice=choice)
    later, ahead = ConversationDataset(rows, reading, seed=3), ConversationDataset(rows, reading, seed=3)
    ahead.encode_ahead(Encoder(processor, encode_caption, 9))
    assert len(later) == len(ahead) == {"all": 8 + 8 - 1, "first": 8, "random": 8}[choice]
    collate = VLMDataCollator(processor, max_length=9, encode=encode_caption, account=True)
    for epoch in range(3):
        later.set_epoch(epoch)
        ahead.set_epoch(epoch)
        for begin in range(0, len(later), 4):
            items = [range(begin, min(begin + 4, len(later)))] * 2
            assert_same_batch(collate([later[i] for i in items[0]]), collate([ahead[i] for i in items[1]]))
    with pytest.raises(IndexError):
        later[len(later)]


def test_encoding_ahead_reads_no_image(processor, folder):
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image(decode=False)),
            "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
        }
    )
    image = {"bytes": b"no image at all" * 1000, "path": None}
    pair = {"user": "what is it?", "assistant": "a cat"}
    rows = datasets.Dataset.from_list(
        [{"images": [image] * n, "texts": [pair]} for n in range(3)] + [{"images": None, "texts": [pair]}], features
    )
    light = without_image_bytes(rows.with_format("arrow")[:], rows.features)
    assert light["images"] == [[], [{"bytes": b"stored", "path": None}], [{"bytes": b"stored", "path": None}] * 2, None]
    assert light["texts"] == rows["texts"][:]
    dataset = ConversationDataset(rows, Reading(source="rows"))
    dataset.encode_ahead(Encoder(processor))
    assert [item["input_ids"].count(processor.image_token_id) for item in map(dataset.__getitem__, range(4))] == [
        0, 1, 2, 0,
    ]  # fmt: skip
    assert dataset[2]["images"] == [image] * 2


def test_a_caption_that_is_none_costs_itself_alone_and_a_row_without_any_counts_once(processor, folder):
    captions = (["a", None, "b"], [])
    rows = datasets.Dataset.from_list([{"image": f"{n}.png", "caption": caption} for n, caption in enumerate(captions)])
    later, ahead = ConversationDataset(rows, reading_of(folder)), ConversationDataset(rows, reading_of(folder))
    with pytest.raises(ValueError, match="malformed|caption"):
        ahead.encode_ahead(Encoder(processor, encode_caption), on_bad_sample="error")
    collator = VLMDataCollator(processor, encode=encode_caption)
    collator([later[index] for index in range(len(later))])
    assert collator.dropped == {"malformed row": 2} and len(later) == 4
    ahead.encode_ahead(Encoder(processor, encode_caption))
    assert len(ahead) == 2 and ahead.account.total["learned from"] == 2 and ahead.account.total["samples"] == 4


def test_an_image_written_out_in_its_row_is_in_no_cache(processor, folder):
    uri = "data:image/png;base64," + base64.b64encode((folder / "0.png").read_bytes()).decode()
    rows = datasets.Dataset.from_list([{"image": uri, "caption": "a"}, {"image": "0.png", "caption": "a"}])
    dataset = ConversationDataset(rows, reading_of(folder))
    dataset.encode_ahead(Encoder(processor, encode_caption))
    assert dataset.encodings["references"][:] == [[None], [str(folder / "0.png")]]
    assert [item["images"] for item in dataset] == [[uri], [str(folder / "0.png")]]
    batch = VLMDataCollator(processor)([*dataset])
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def test_rows_that_cannot_be_read_are_counted_and_named(processor, folder):
    rows = datasets.Dataset.from_list(
        [{"image": "0.png", "caption": "fine"}, {"image": "1.png", "caption": None}, {"image": None, "caption": "a"}]
    )
    dataset = ConversationDataset(rows, reading_of(folder))
    dataset.encode_ahead(Encoder(processor, encode_caption))
    assert len(dataset) == 1 and dataset.account.total["samples"] == 3
    assert dataset.account.report()["total"]["dropped"] == {"malformed row": 2}
    assert all("pictures, row" in entry["detail"] for entry in dataset.account.report()["dropped samples"])
    with pytest.raises(ValueError, match="pictures, row 1: "):
        ConversationDataset(rows, reading_of(folder)).encode_ahead(Encoder(processor, encode_caption), "error")
    later = ConversationDataset(rows, reading_of(folder))
    batch = VLMDataCollator(processor, encode=encode_caption, account=True)([later[i] for i in range(3)])
    account = Account()
    account.add_batch(batch["account"])
    assert account.dropped_only().report() == dataset.account.dropped_only().report()
    with pytest.raises(ValueError, match="pictures, row 1: "):
        VLMDataCollator(processor, encode=encode_caption, on_bad_sample="error")([later[i] for i in range(3)])


def test_a_mix_without_weights_holds_everything_once(folder):
    parts = [ConversationDataset(dialogue_rows(n, 100 * n), reading_of(folder)) for n in (3, 7, 2)]
    mixed = MixedDataset(parts)
    assert texts(mixed) == [text for part in parts for text in texts(part)]


def test_a_mix_gives_each_source_its_weight(folder):
    small, large = (ConversationDataset(dialogue_rows(n, 100 * n), reading_of(folder)) for n in (4, 36))
    mixed = MixedDataset([small, large], weights=[3, 1], seed=1)
    assert len(mixed) == 40
    shown, epochs = Counter(), 4
    for epoch in range(epochs):
        mixed.set_epoch(epoch)
        found = texts(mixed)
        assert sum(text in texts(small) for text in found) == 30
        shown.update(found)
    # The small source comes in whole rounds, and four epochs of ten have shown all 36 of the large one.
    assert {shown[text] for text in texts(small)} == {30 * epochs // 4}
    assert all(1 <= shown[text] <= 2 for text in texts(large))
    again = MixedDataset([small, large], weights=[3, 1], seed=1)
    again.set_epoch(epochs - 1)
    assert texts(again) == found


def stream_of(folder, count=40, shards=4, **kwargs):
    rows = dialogue_rows(count).to_iterable_dataset(num_shards=shards)
    return StreamedDataset([(rows, reading_of(folder))], **kwargs)


def first_words(dataset, number, workers=0):
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    return [item["messages"][0]["content"][-1]["text"] for _, item in zip(range(number), loader)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer", [1, 5, 1000])
def test_a_stream_gives_every_item_once_a_round_whatever_the_workers(folder, workers, buffer):
    found = first_words(stream_of(folder, shuffle_buffer=buffer), 80, workers)
    assert Counter(found) == Counter({f"question {n}": 2 for n in range(40)})
    assert set(found[:40]) == {f"question {n}" for n in range(40)}
    assert found == first_words(stream_of(folder, shuffle_buffer=buffer), 80, workers)
    if buffer > 1:
        assert found[:40] != found[40:]


def test_a_stream_mixes_by_weight(folder):
    parts = [(dialogue_rows(30, start).to_iterable_dataset(), reading_of(folder)) for start in (0, 1000)]
    found = first_words(StreamedDataset(parts, weights=[3, 1], seed=2), 2000)
    share = sum(int(text.split()[1]) < 1000 for text in found) / len(found)
    assert 0.7 < share < 0.8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer", [1, 6, 1000])
def test_a_stream_can_keep_the_items_of_a_row_together(folder, workers, buffer):
    rows = [{"image": "0.png", "caption": [f"{row} {n}" for n in range(1 + row % 3)]} for row in range(30)]
    rows = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    number = sum(1 + row % 3 for row in range(30))

    def read(whole_rows):
        stream = StreamedDataset([(rows, reading_of(folder))], shuffle_buffer=buffer)
        stream.keeps_rows = whole_rows
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        return [item["messages"][-1]["content"][-1]["text"] for _, item in zip(range(2 * number), loader)]

    found = read(True)
    assert all(count == 2 for count in Counter(found).values())
    if not workers:
        runs = [row for row, _ in itertools.groupby(text.split()[0] for text in found[:number])]
        assert len(runs) == len(set(runs)) == 30 and (runs != sorted(runs, key=int)) == (buffer > 1)
        apart = [row for row, _ in itertools.groupby(text.split()[0] for text in read(False)[:number])]
        assert (len(apart) > 30) == (buffer > 1)


def test_a_stream_of_whole_rows_mixes_items_by_weight(folder):
    """A source with more texts an image has no more items for it."""
    many = [{"image": "0.png", "caption": [f"{row} {n}" for n in range(5)]} for row in range(1000, 1030)]
    few = [{"image": "0.png", "caption": f"{row} 0"} for row in range(30)]
    parts = [(datasets.Dataset.from_list(r).to_iterable_dataset(), reading_of(folder)) for r in (many, few)]
    stream = StreamedDataset(parts, weights=[1, 3], seed=2)
    stream.keeps_rows = True
    found = [item["messages"][-1]["content"][-1]["text"] for _, item in zip(range(3000), stream)]
    share = sum(int(text.split()[0]) >= 1000 for text in found) / len(found)
    assert 0.21 < share < 0.29


def test_a_resumed_stream_goes_on_with_the_next_sample_and_makes_no_batch_in_vain(processor, folder):
    made = []

    def encode(processor, conversation, max_length):
        made.append(conversation["row"])
        return encode_dialogue(processor, conversation, max_length)

    def batches(skip):
        collate = VLMDataCollator(processor, encode=encode)
        collate.skip_batches = skip
        return [batch for _, batch in zip(range(8), DataLoader(stream_of(folder), batch_size=4, collate_fn=collate))]

    whole = batches(0)
    made.clear()
    resumed = batches(5)
    assert resumed[:5] == [{}] * 5 and len(made) == 3 * 4
    for expected, found in zip(whole[5:], resumed[5:]):
        assert_same_batch(found, expected)


@pytest.mark.parametrize("skip", [0, 3])
def test_skipped_batches_are_the_first_also_with_workers(processor, folder, skip):
    collate = VLMDataCollator(processor)
    collate.skip_batches = skip
    loader = DataLoader(stream_of(folder), batch_size=4, collate_fn=collate, num_workers=2)
    assert [not batch for _, batch in zip(range(8), loader)] == [n < skip for n in range(8)]


# --- what is too long


def long_dialogue(images=1):
    content = [{"type": "image"}] * images + [{"type": "text", "text": "the first question"}]
    turns = [("assistant", "the first answer"), ("user", "the second question"), ("assistant", "the second answer")]
    turns += [("user", "a third one"), ("assistant", "the third answer")]
    say = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    system = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    return {"images": [None] * images, "messages": [system, {"role": "user", "content": content}, *say]}


def kept(processor, conversation, max_length, **kwargs):
    encoding = encode_dialogue(processor, conversation, max_length, **kwargs)
    return encoding, processor.tokenizer.decode(encoding["input_ids"])


def test_the_last_turns_are_kept_with_the_system_message_and_every_image(processor):
    whole, _ = kept(processor, long_dialogue(2), None)
    lengths = set()
    for max_length in range(whole["length"], 0, -1):
        try:
            encoding, text = kept(processor, long_dialogue(2), max_length, truncation="keep_last_turns")
        except ValueError as error:
            assert error.reason == "longer than max_length"
            continue
        lengths.add(encoding["length"])
        assert encoding["length"] <= max_length
        assert encoding["input_ids"].count(processor.image_token_id) == 2
        assert "be brief" in text and text.endswith("the third answer" + processor.tokenizer.eos_token)
        assert ("the first" in text) == (encoding["cut"] is None)
    assert len(lengths) == 3


def test_what_is_too_long_can_be_dropped(processor):
    whole, _ = kept(processor, long_dialogue(), None)
    same, _ = kept(processor, long_dialogue(), whole["length"], truncation="drop")
    assert same == whole
    with pytest.raises(ValueError) as error:
        kept(processor, long_dialogue(), whole["length"] - 1, truncation="drop")
    assert error.value.reason == "longer than max_length"


def test_a_cut_text_is_the_beginning_of_the_whole(processor):
    whole, _ = kept(processor, long_dialogue(), None)
    for max_length in range(1, whole["length"] + 1):
        try:
            encoding, _ = kept(processor, long_dialogue(), max_length)
        except ValueError as error:
            assert error.reason in ("no supervised token fits into max_length", "an image does not fit into max_length")
            continue
        assert encoding["length"] == max_length
        assert encoding["labels"] == whole["labels"][: len(encoding["labels"])]
        assert (encoding["cut"] is None) == (max_length == whole["length"])


# --- what is learned


def learned(processor, encoding):
    return processor.tokenizer.decode([label for label in encoding["labels"] if label >= 0])


def test_only_the_last_answer_can_be_learned(processor):
    encoding, _ = kept(processor, long_dialogue(), None, supervise="last")
    assert learned(processor, encoding).strip() == "the third answer" + processor.tokenizer.eos_token
    everything, _ = kept(processor, long_dialogue(), None)
    assert encoding["input_ids"] == everything["input_ids"]


def test_prompts_can_be_learned_too(processor):
    encoding, _ = kept(processor, long_dialogue(), None, supervise_prompt=True)
    image = processor.image_token_id
    assert encoding["labels"][1:] == [-100 if id == image else id for id in encoding["input_ids"][1:]]


def test_an_answer_left_out_is_not_learned_with_the_prompts_either(processor):
    conversation = long_dialogue()
    conversation["messages"][2]["train"] = False
    encoding, _ = kept(processor, conversation, None, supervise_prompt=True)
    assert "the first answer" not in learned(processor, encoding)
    assert "the second question" in learned(processor, encoding)


def test_a_message_has_a_weight(processor):
    conversation = long_dialogue()
    conversation["messages"][2]["weight"] = 0.25
    conversation["messages"][4]["weight"] = 0
    encoding, _ = kept(processor, conversation, None)
    plain, _ = kept(processor, long_dialogue(), None)
    assert encoding["input_ids"] == plain["input_ids"]
    assert Counter(encoding["weights"])[0.25] > 2
    by_weight = {w: [i for i, v in zip(encoding["input_ids"], encoding["weights"]) if v == w] for w in (0.25, 1.0)}
    assert processor.tokenizer.decode(by_weight[0.25]).strip() == "the first answer" + processor.tokenizer.eos_token
    assert "the second answer" not in learned(processor, encoding)
    batch = VLMDataCollator(processor)([{**conversation, "images": [Image.new("RGB", (8, 8))]}])
    assert batch["loss_weights"].shape == batch["labels"].shape
    assert ((batch["loss_weights"] > 0) == (batch["shift_labels"] >= 0)).all()
    assert "loss_weights" not in VLMDataCollator(processor)([{**long_dialogue(), "images": [Image.new("RGB", (8, 8))]}])


def test_the_data_set_survives_a_journey_to_a_worker(processor, folder):
    dataset = ConversationDataset(dialogue_rows(12), reading_of(folder))
    mixed = MixedDataset([dataset, dataset], weights=[1, 2])
    collate = VLMDataCollator(processor, encode=partial(encode_dialogue, truncation="drop"), account=True)
    alone = [collate([mixed[i] for i in range(b, b + 4)]) for b in range(0, 24, 4)]
    loader = DataLoader(mixed, batch_size=4, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    for expected, found in zip(alone, loader):
        assert_same_batch(found, expected)


# --- what rows are called, and how large they may be


def test_a_row_is_called_by_the_number_that_its_source_gave_it(processor, folder):
    rows = dialogue_rows(10).add_column("__row", list(range(10))).select([7, 2])
    rows = datasets.concatenate_datasets([rows, datasets.Dataset.from_list([{"__row": 9, "messages": None}])])
    later, ahead = ConversationDataset(rows, reading_of(folder)), ConversationDataset(rows, reading_of(folder))
    ahead.encode_ahead(Encoder(processor))
    assert [item["row"] for item in later] == [7, 2, 9]
    assert [(item["row"], item["position"]) for item in ahead] == [(7, 0), (2, 1)]
    assert [entry["row"] for entry in ahead.account.report()["dropped samples"]] == ["9"]
    stream = StreamedDataset([(rows.to_iterable_dataset(), reading_of(folder))], shuffle_buffer=1)
    assert [item["row"] for _, item in zip(range(3), stream)] == [7, 2, 9]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_every_caption_of_a_list_counts_whatever_list_it_is(folder, kind):
    table = pa.table({"image": ["0.png"] * 2, "caption": pa.array([["a", "b", "c"], ["d", "e"]], kind(pa.string()))})
    dataset = ConversationDataset(datasets.Dataset(datasets.table.InMemoryTable(table)), reading_of(folder))
    answers = [item["messages"][1]["content"][0]["text"] for item in dataset]
    assert answers == ["a", "b", "c", "d", "e"] and len(dataset) == 5


def test_images_are_looked_at_chunk_by_chunk():
    """Put together, a thousand large images are more bytes than one array may hold."""
    features = datasets.Features(image=datasets.Image(decode=False))
    one = datasets.Dataset.from_list([{"image": {"bytes": b"a", "path": "x"}}, {"image": None}], features).data.table
    table = pa.concat_tables([one, one])
    assert table["image"].num_chunks == 2
    light = {"bytes": b"stored", "path": "x"}
    assert without_image_bytes(table, features) == {"image": [light, None, light, None]}


def test_another_version_of_the_code_that_labels_is_another_cache(processor, folder, monkeypatch):
    def name():
        return Hasher.hash(_RowEncoder(Encoder(processor), reading_of(folder), "skip", None))

    before = name()
    assert name() == before
    monkeypatch.setattr("processing.batching.encode_ahead.code_that_encodes", lambda: "another")
    assert name() != before


def test_stage_1_learns_the_answer_to_one_question_as_the_caption(processor):
    asked = {"role": "user", "content": [{"type": "text", "text": "Describe it."}, {"type": "image"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    caption = encode_caption(processor, {"messages": [{"role": "user", "content": [{"type": "image"}]}, answer]})
    assert encode_caption(processor, {"messages": [asked, answer]}) == caption
    half = encode_caption(processor, {"messages": [asked, {**answer, "weight": 0.5}]})
    assert half["labels"] == caption["labels"] and set(half["weights"]) == {0.0, 0.5}
    with pytest.raises(ValueError, match="no token of it is supervised"):
        encode_caption(processor, {"messages": [asked, {**answer, "train": False}]})


# --- what is kept of a row, and what bounds one


@pytest.mark.parametrize("stored", [False, True], ids=["paths", "bytes"])
def test_an_encoding_keeps_all_that_evaluation_and_accounts_need(processor, folder, stored):
    image = {"bytes": (folder / "1.png").read_bytes(), "path": None} if stored else "1.png"
    rows = [
        {"image": image, "question": "how many?", "answers": ["two", "2", "two"], "question_id": 7, "author": "me"},
        {"image": image, "question": "is it?", "answers": ["yes"], "kind": "yes/no", "subset": "b", "author": None},
    ]
    rows = datasets.Dataset.from_list([{"kind": None, "subset": None, "question_id": None, **row} for row in rows])
    if stored:
        rows = rows.cast_column("image", datasets.Image(decode=False))
    later, ahead = ConversationDataset(rows, reading_of(folder)), ConversationDataset(rows, reading_of(folder))
    ahead.encode_ahead(Encoder(processor))
    encoder = Encoder(processor)
    for index in range(2):
        one, other = encoder(later[index]), ahead[index]
        assert {name: one.get(name) for name in (*KEPT, "images", "input_ids", "labels", "length", "cut")} == {
            name: other.get(name) for name in (*KEPT, "images", "input_ids", "labels", "length", "cut")
        }
    first, second = ahead
    assert sorted(set(first["answers"])) == ["2", "two"] and first["id"] == "7" and "kind" not in first
    assert (second["kind"], second["subset"]) == ("yes/no", "b")
    note = "the column author is not read"
    assert first["notes"] == [note] and "notes" not in second
    collate = VLMDataCollator(processor, account=True)
    for items in (ahead, later):
        account = Account()
        account.add_batch(collate([items[0], items[1]])["account"])
        assert account.report()["sources"]["pictures"]["notes"] == {note: 1}
    assert ahead.account.report()["total"]["notes"] == {note: 1}
    assert VLMDataCollator(processor)([first]).keys() == VLMDataCollator(processor)([later[0]]).keys()


def test_notes_of_what_is_dropped_count_too(processor, folder):
    rows = [{"messages": [{"role": "user", "content": "a"}], "author": "me"}] * 3
    dataset = ConversationDataset(datasets.Dataset.from_list(rows), reading_of(folder))
    dataset.encode_ahead(Encoder(processor))
    assert dataset.account.dropped_only().report()["total"]["notes"] == {"the column author is not read": 3}


def test_the_cache_is_named_by_the_code_that_encodes_and_by_no_other(tmp_path, monkeypatch):
    names = {name.removeprefix("processing.") for name in imported_texts("processing.batching.encode_ahead")}
    assert names >= {
        "batching.encode_ahead",
        "batching.encoding",
        "messages_vlm",
        "reading.conversations",
        "images_vlm",
    }
    assert not names & {"shapes", "batching.collator", "batching.dataset", "reading.sources", "reading.coco"}
    package = tmp_path / "house"
    for file, text in (
        ("__init__.py", "from .unused import X"),
        ("unused.py", "X = 1"),
        ("a.py", "from . import b\nfrom .inner.c import C"),
        ("b.py", "def f():\n    from .d import D\n"),
        ("d.py", "from .a import b\nD = b"),
        ("inner/__init__.py", ""),
        ("inner/c.py", "from ..d import D\nC = 1"),
    ):
        (package / file).parent.mkdir(exist_ok=True)
        (package / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert set(imported_texts("house.a")) == {"house.a", "house.b", "house.d", "house.inner.c"}


@pytest.mark.parametrize("truncation", ["truncate_text", "drop", "keep_last_turns"])
@pytest.mark.parametrize("encode", [encode_caption, encode_dialogue])
def test_a_text_is_read_as_far_as_it_could_be_kept(processor, encode, truncation, monkeypatch):
    text = "a large green triangle is at the top left; " * 50_000
    say = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": text}]
    say[1]["content"] = [{"type": "text", "text": text}]
    conversation = {"images": [Image.new("RGB", (8, 8))], "messages": say, "source": "books", "row": 3}
    read = []
    method = encode.__name__.replace("dialogue", "messages")
    whole = getattr(type(processor), method)

    def spied(*args, **options):
        read.append(whole(*args, **options))
        return read[-1]

    monkeypatch.setattr(type(processor), method, spied)
    encoder = Encoder(processor, encode, 64, truncation=truncation)
    if truncation == "truncate_text":
        short = {**conversation, "messages": [say[0], {**say[1], "content": [{"type": "text", "text": text[:2000]}]}]}
        found = encoder(conversation)
        assert found == encoder(short) and found["length"] == 64 and found["cut"] == "text cut at its end"
    else:
        with pytest.raises(SampleDropped, match="books, row 3: ") as caught:
            encoder(conversation)
        error = caught.value
        assert (error.reason, error.source, error.row) == ("longer than max_length", "books", 3)
    assert len(read) >= 1 and all(len(ids) < 100 for ids, _ in read)  # of more than a million


def test_the_turns_that_fit_into_a_long_dialogue_are_found_by_halving(processor, monkeypatch):
    say = [
        {"role": role, "content": [{"type": "text", "text": f"{role} {n}"}]}
        for n in range(100)
        for role in ("user", "assistant")
    ]
    calls, encode_messages = [], type(processor).encode_messages
    monkeypatch.setattr(
        type(processor),
        "encode_messages",
        lambda self, messages, **options: calls.append(len(messages)) or encode_messages(self, messages, **options),
    )
    whole = encode_dialogue(processor, {"messages": say})["length"]
    for most in (whole // 2, whole // 5, whole - 1):
        calls.clear()
        found = encode_dialogue(processor, {"messages": say}, most, truncation="keep_last_turns")
        assert len(calls) < 12 and found["length"] <= most and found["cut"] == "first turns left out"
        first = int(re.search(r"user (\d+)", processor.decode(found["input_ids"]))[1])
        kept, more = (encode_dialogue(processor, {"messages": say[2 * n :]}) for n in (first, first - 1))
        assert found["input_ids"] == kept["input_ids"] and more["length"] > most


@pytest.mark.parametrize("encode", [encode_caption, encode_dialogue])
def test_no_weight_overflows_a_loss(processor, encode):
    def weighing(weight):
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}], "weight": weight}
        return {"images": [], "messages": [answer] if encode is encode_caption else [
            {"role": "user", "content": [{"type": "text", "text": "what?"}]}, answer
        ], "source": "s", "row": 1}  # fmt: skip

    batch = VLMDataCollator(processor, encode=encode)([weighing(1e6), weighing(1)])
    assert batch["loss_weights"].max() == 1e6 and batch["loss_weights"].sum().isfinite()
    for weight in (1.1e6, 1e39, float("inf"), float("nan"), -1.0):
        collator = VLMDataCollator(processor, encode=encode, account=True)
        (record,) = collator([weighing(weight)])["account"].records
        assert (record.dropped, record.source, record.row) == ("malformed row", "s", 1)
        assert "weight" in record.detail


def test_only_one_image_of_a_batch_is_in_memory_as_it_is_stored(processor, tmp_path, monkeypatch):
    for number in range(8):
        Image.new("RGB", (600, 500), "red").save(tmp_path / f"large{number}.png")
    opened, most = [], []

    def load(reference, size=None):
        image = load_image(reference, size)
        opened.append(weakref.ref(image))
        most.append(sum(reference() is not None for reference in opened))
        return image

    monkeypatch.setattr("processing.batching.images.load_image", load)
    files = [str(tmp_path / f"large{number}.png") for number in range(8)]
    items = [{**long_dialogue(2), "images": files[number : number + 2]} for number in range(0, 8, 2)]
    for model in (processor, tiny.processor_of("byte-level", "default", max_tiles=4)):
        most.clear()
        batch = VLMDataCollator(model)(items)
        assert len(most) == 8 and max(most) <= 2  # the last one, and the next that is being opened
        assert len(batch["pixel_values"]) == 8 if model is processor else 8 * 5
