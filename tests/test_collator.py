"""Conversations in, one batch out: nothing misplaced, nothing learned that should not be, nothing lost uncounted."""

import multiprocessing
import pickle
import random
from collections import Counter

import datasets
import pytest
import torch
from datasets.fingerprint import Hasher
from PIL import Image

from processing import VLMDataCollator
from processing.batching.account import DROP_REASONS
from processing.batching.dataset import ConversationDataset
from processing.batching.encode_ahead import _RowEncoder
from processing.batching.encoding import IGNORE, Encoder, SampleDropped, encode_caption, encode_dialogue
from processing.reading.items import Reading
from tests import tiny


IMAGE = {"type": "image"}


def one_line(caught) -> str:
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


def text(words):
    return {"type": "text", "text": words}


def conversation(*said, images=(), **more):
    """`conversation(["image", "what?"], "blue")`: user and assistant in turn."""
    messages = []
    for index, content in enumerate(said):
        content = [content] if isinstance(content, str) else content
        parts = [IMAGE if part == "image" else text(part) for part in content]
        messages.append({"role": "assistant" if index % 2 else "user", "content": parts})
    return {"messages": messages, "images": list(images), **more}


def unlearnable(*said, **more):
    made = conversation(*said, **more)
    return {**made, "messages": [{**message, "train": False} for message in made["messages"]]}


@pytest.fixture(scope="module")
def processor():
    """Byte-level, ChatML, pad token and eos are one, three positions an image."""
    return tiny.processor_of("byte-level", "chatml")


@pytest.fixture
def ragged(image):
    """Conversations of different lengths with no, one and several images."""
    return [
        conversation("hi", "hello"),
        conversation(["image", "what is it?"], "a red circle", images=[image(1)]),
        conversation(
            ["compare ", "image", " with ", "image"], "no", ["image"], "yes", images=[image(2), image(3), image(4)]
        ),
    ]


# -- the batch --------------------------------------------------------------------------------------------------------


def test_each_row_is_its_conversation_and_then_padding(processor, ragged):
    batch = VLMDataCollator(processor)(ragged)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "shift_labels", "pixel_values"}
    lengths = []
    for row, item in enumerate(ragged):
        ids, supervised = processor.expand_images(*processor.encode_messages(item["messages"]))
        lengths.append(len(ids))
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        labels = [id if flag else IGNORE for id, flag in zip(ids, supervised)]
        assert batch["labels"][row, : len(ids)].tolist() == labels
        assert batch["input_ids"][row, len(ids) :].eq(processor.tokenizer.pad_token_id).all()
        assert batch["labels"][row, len(ids) :].eq(IGNORE).all()
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (batch["labels"].shape[1] - len(ids))
    assert len(set(lengths)) == 3 and batch["input_ids"].shape[1] == max(lengths)  # as long as the longest, not longer
    assert {batch[key].dtype for key in ("input_ids", "attention_mask", "labels")} == {torch.long}


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_the_end_token_is_learned_and_padding_is_not_though_they_share_an_id(kind):
    processor = tiny.processor_of(kind, "default")
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    batch = VLMDataCollator(processor)([conversation("hi", "hello"), conversation("hi", "a b c d e f", "and?", "no")])
    eos = processor.tokenizer.eos_token_id
    ends = batch["labels"].eq(eos)
    assert ends.sum(1).tolist() == [1, 2]
    real = batch["attention_mask"].sum(1).tolist()
    assert batch["labels"][0, real[0] - 1] == eos and batch["labels"][0, real[0] :].eq(IGNORE).all()
    assert batch["labels"][1, real[1] - 1] == eos


def test_a_label_sits_at_its_own_token_behind_all_that_the_images_take_up(image):
    for size in (1, 3, 16):
        processor = tiny.processor_of("byte-level", "default", image_seq_length=size)
        batch = VLMDataCollator(processor)([conversation(["image", "a", "image"], "blue", images=[image(), image()])])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        learned = labels.ne(IGNORE)
        assert torch.equal(labels[learned], ids[learned])
        placeholders = ids.eq(processor.image_token_id)
        assert placeholders.sum() == 2 * size and labels[placeholders].eq(IGNORE).all()
        assert processor.decode(labels[learned]) == " blue<|endoftext|>"
        caption = VLMDataCollator(processor, encode=encode_caption)([conversation(["image"], "blue", images=[image()])])
        assert caption["labels"][0, :size].eq(IGNORE).all() and caption["labels"][0, size:].ne(IGNORE).all()


def test_pixels_come_in_the_order_of_the_image_tokens(processor, ragged, image):
    batch = VLMDataCollator(processor)(ragged)
    expected = processor.image_processor([image(1), image(2), image(3), image(4)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    per_row = batch["input_ids"].eq(processor.image_token_id).sum(1)
    assert per_row.tolist() == [0, processor.image_seq_length, 3 * processor.image_seq_length]


def test_a_batch_of_texts_has_no_pixels(processor):
    batch = VLMDataCollator(processor)([conversation("hi", "hello"), conversation("a <image>", "b")])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "shift_labels"}


def test_the_length_can_be_rounded_up(processor, ragged):
    exact = VLMDataCollator(processor)(ragged)["input_ids"].shape[1]
    for multiple in (1, 7, 64, exact):
        batch = VLMDataCollator(processor, pad_to_multiple_of=multiple)(ragged)
        lengths = {batch[key].shape[1] for key in ("input_ids", "attention_mask", "labels")}
        assert lengths == {-(-exact // multiple) * multiple}


@pytest.mark.parametrize("cut", [False, True])
def test_encoded_or_not_gives_the_same_batch(processor, ragged, cut):
    max_length = encode_dialogue(processor, ragged[2])["length"] - 4 if cut else None
    encoded = [{**encode_dialogue(processor, item, max_length), "images": item["images"]} for item in ragged]
    one, other = VLMDataCollator(processor, max_length)(ragged), VLMDataCollator(processor)(encoded)
    assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    texts = [{key: value for key, value in item.items() if key != "images"} for item in encoded[:1]]
    assert torch.equal(VLMDataCollator(processor)(texts)["labels"], VLMDataCollator(processor)(ragged[:1])["labels"])


def test_collating_changes_nothing_of_what_it_was_given(processor, ragged):
    before = [[*item["images"]] for item in ragged], pickle.dumps([item["messages"] for item in ragged])
    encoded = [{**encode_dialogue(processor, item), "images": item["images"]} for item in ragged]
    ids = [[*item["input_ids"]] for item in encoded]
    collator = VLMDataCollator(processor)
    first, second = collator(ragged), collator(ragged)
    collator(encoded)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert before == ([[*item["images"]] for item in ragged], pickle.dumps([item["messages"] for item in ragged]))
    assert ids == [item["input_ids"] for item in encoded]


def test_every_reference_to_an_image_gives_its_pixels(processor, image, tmp_path):
    image().save(tmp_path / "a.png")
    stored = (tmp_path / "a.png").read_bytes()
    references = [image(), str(tmp_path / "a.png"), tmp_path / "a.png", {"bytes": stored, "path": None}]
    references.append({"bytes": None, "path": str(tmp_path / "a.png")})
    batch = VLMDataCollator(processor)([conversation(["image"], "a", images=[reference]) for reference in references])
    assert all(torch.equal(pixels, batch["pixel_values"][0]) for pixels in batch["pixel_values"])


# -- what cannot be learned from --------------------------------------------------------------------------------------


def test_what_cannot_be_learned_from_is_left_out_and_counted_by_reason(processor, image):
    good = conversation("hi", "hello")
    collator = VLMDataCollator(processor, max_length=20)
    assert collator.dropped == {}
    batch = collator(
        [
            unlearnable("hi", "hello"),
            good,
            conversation(["what is that on the far left of the picture?", "image"], "a", images=[image()]),
            conversation(["image", "what is that on the far left of the picture?"], "a", images=[image()]),
            conversation("what"),
        ]
    )
    expected = VLMDataCollator(processor)([good])
    assert all(torch.equal(batch[key], expected[key]) for key in expected) and set(batch) == set(expected)
    assert collator.dropped == dict(zip(DROP_REASONS, (2, 1, 1)))
    collator([unlearnable("hi", "hello")])
    assert collator.dropped == dict(zip(DROP_REASONS, (3, 1, 1)))


@pytest.mark.parametrize("start, workers", [("fork", 2), ("spawn", 1)])  # a spawned worker imports everything anew
def test_what_workers_leave_out_is_counted_too(processor, start, workers):
    samples = [conversation("hi", "hello"), unlearnable("hi", "hello"), conversation("a " * 40, "b")] * 4
    collator = VLMDataCollator(processor, max_length=30)
    loader = torch.utils.data.DataLoader(
        samples,
        batch_size=3,
        collate_fn=collator,
        num_workers=workers,
        multiprocessing_context=multiprocessing.get_context(start),
        persistent_workers=True,
    )
    for times in (1, 2):
        assert [len(batch["input_ids"]) for batch in loader] == [1, 1, 1, 1]
        assert collator.dropped == {DROP_REASONS[0]: 4 * times, DROP_REASONS[2]: 4 * times}


def test_a_batch_of_nothing_costs_nothing(composed, image):
    model, processor = composed
    collator = VLMDataCollator(processor, max_length=5)
    batch = collator([unlearnable(["image", "hi"], "hello", images=[image()]), conversation("a " * 30, "b")])
    assert batch["input_ids"].tolist() == [[processor.tokenizer.pad_token_id]]
    assert batch["attention_mask"].tolist() == [[1]] and batch["labels"].tolist() == [[IGNORE]]
    assert "pixel_values" not in batch and sum(collator.dropped.values()) == 2
    model.train()
    loss = model(**batch).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    full = VLMDataCollator(processor)([conversation(["image", "hi"], "hello", images=[image()])])
    assert model(**full).loss.item() > 0


def test_the_loss_is_that_of_the_labels_alone(composed, image):
    """Padding, more rows and their order change no logit that is learned."""
    model, processor = composed
    model.eval()
    samples = [
        conversation(["image", "what?"], "a red circle", images=[image(1)]),
        conversation("hi", "a"),
        conversation(["a", "image"], "b", "c", "no", images=[image(2)]),
    ]
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            batch = VLMDataCollator(processor)([sample])
            learned = batch["labels"][:, 1:].ne(IGNORE).sum().item()
            total, count = total + model(**batch).loss.item() * learned, count + learned
        for multiple in (None, 32):
            batch = VLMDataCollator(processor, pad_to_multiple_of=multiple)(samples[::-1])
            assert model(**batch).loss.item() == pytest.approx(total / count, rel=1e-5)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts, images", [(2, 1), (1, 0)])
def test_images_that_do_not_match_their_parts_are_a_bad_row_and_in_what_is_encoded_an_error(
    processor, image, parts, images
):
    sample = conversation(["image"] * parts + ["what?"], "a", images=[image()] * images)
    collator = VLMDataCollator(processor)
    assert len(collator([sample, conversation("hi", "hello")])["input_ids"]) == 1
    assert collator.dropped == {"malformed row": 1}
    line = f"the batch, row 1: found {parts} image part.s. in the messages but {images} image.s. in the row; expected"
    with pytest.raises(ValueError, match=line) as caught:
        VLMDataCollator(processor, on_bad_sample="error")([conversation("hi", "hello"), sample])
    one_line(caught)
    encoded = {**encode_dialogue(processor, sample), "images": sample["images"]}
    line = f"a conversation with {parts} image parts and {images} images was found; expected one image for each part"
    with pytest.raises(ValueError, match=f"the batch, row 0: {line}") as caught:
        VLMDataCollator(processor)([encoded])
    one_line(caught)


def test_an_image_that_cannot_be_read_is_counted_or_gives_one_line_that_names_it(processor, tmp_path):
    strict = VLMDataCollator(processor, on_bad_sample="error")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    for name, error in (("broken.jpg", ValueError), ("cut.png", ValueError), ("gone.jpg", FileNotFoundError)):
        with pytest.raises(error, match=name) as caught:
            strict([conversation(["image"], "a", images=[str(tmp_path / name)])])
        one_line(caught)
        collator = VLMDataCollator(processor)
        batch = collator([conversation(["image"], "a", images=[str(tmp_path / name)]), conversation("b", "c")])
        assert len(batch["input_ids"]) == 1 and "pixel_values" not in batch
        assert collator.dropped == {"missing image file" if name == "gone.jpg" else "unreadable image": 1}


def test_a_conversation_that_the_template_refuses_gives_one_line_with_its_place():
    processor = tiny.processor_of("byte-level", "gemma")
    sample = {"messages": [{"role": "system", "content": "a"}, *conversation("b", "c")["messages"]]}
    with pytest.raises(ValueError, match=r"talks, row 7: the chat template refuses .*system") as caught:
        VLMDataCollator(processor, on_bad_sample="error")([{**sample, "source": "talks", "row": 7}])
    one_line(caught)


def test_stage_1_refuses_a_dialogue_with_its_place(processor, image):
    for sample in (
        conversation("what?", "a", source="talks", row=7),
        conversation(["image"], "a", ["image"], "b", images=[image()] * 2, source="talks", row=7),
    ):
        with pytest.raises(ValueError, match="talks, row 7: stage 1 learns from images and their captions") as caught:
            encode_caption(processor, sample)
        one_line(caught)


# -- a data set, encoded ----------------------------------------------------------------------------------------------


def caption_rows(folder, count=5, captions=3):
    """Rows of an image and its captions, as the `datasets` library stores them."""
    rows = []
    for row in range(count):
        Image.new("RGB", (8, 8), (row * 20, 0, 0)).save(folder / f"{row}.png")
        rows.append({"image": {"path": str(folder / f"{row}.png"), "bytes": None}, "caption": []})
        rows[-1]["caption"] = [f"row {row} caption {number}" for number in range(captions)]
    return datasets.Dataset.from_list(rows)


def encoded(rows, processor, encode, seed=0, **reading):
    dataset = ConversationDataset(rows, Reading(source="s", **reading), seed)
    dataset.encode_ahead(Encoder(processor, encode))
    return dataset


def dropped_of(dataset):
    return dataset.account.report()["total"]["dropped"]


def caption_of(processor, item):
    return processor.decode([label for label in item["labels"] if label != IGNORE][:-1])


def test_encoded_rows_make_the_batches_of_their_conversations(processor, tmp_path):
    dataset = encoded(caption_rows(tmp_path), processor, encode_caption)
    assert len(dataset) == 15 and dataset.account.total["learned from"] == 15 and dropped_of(dataset) == {}
    assert [caption_of(processor, item) for item in dataset] == [
        f"row {row} caption {number}" for row in range(5) for number in range(3)
    ]
    batch = VLMDataCollator(processor)([dataset[index] for index in (4, 0, 13)])
    samples = [
        conversation(["image"], caption_of(processor, dataset[index]), images=[str(tmp_path / f"{row}.png")])
        for index, row in ((4, 1), (0, 0), (13, 4))
    ]
    expected = VLMDataCollator(processor, encode=encode_caption)(samples)
    assert set(batch) == set(expected) and all(torch.equal(batch[key], expected[key]) for key in batch)


def test_the_account_says_what_will_be_learned(processor, tmp_path):
    dataset = encoded(caption_rows(tmp_path), processor, encode_caption)
    batch = VLMDataCollator(processor)([*dataset])
    assert dataset.account.total["tokens"] == batch["attention_mask"].sum() == sum(item["length"] for item in dataset)
    assert dataset.account.total["supervised"] == batch["labels"][:, 1:].ne(IGNORE).sum()
    plain = tiny.processor_of("byte-level", "plain")  # here the answer is the first of all, which nothing predicts
    rows = datasets.Dataset.from_list([{"messages": conversation("", "blue")["messages"]}])
    total = encoded(rows, plain, encode_dialogue).account.total
    assert total["supervised"] == total["tokens"] - 1


@pytest.mark.parametrize("encode, prompt", [(encode_caption, ""), (encode_dialogue, "Describe it.")])
def test_the_first_all_or_a_random_caption(processor, tmp_path, encode, prompt):
    rows = caption_rows(tmp_path)
    first = encoded(rows, processor, encode, prompt=prompt, caption_choice="first")
    assert [caption_of(processor, item) for item in first] == [f"row {row} caption 0" for row in range(5)]
    one, same, other = (
        encoded(rows, processor, encode, prompt=prompt, caption_choice="random", seed=seed) for seed in (1, 1, 2)
    )
    shown = []
    for epoch in range(4):
        one.set_epoch(epoch)
        same.set_epoch(epoch)
        shown.append([caption_of(processor, item) for item in one])
        assert shown[-1] == [caption_of(processor, same[index]) for index in reversed(range(5))][::-1]
        assert [caption.split(" caption")[0] for caption in shown[-1]] == [f"row {row}" for row in range(5)]
    assert len(set(map(tuple, shown))) > 1  # other captions in other epochs, ...
    other.set_epoch(3)
    assert [caption_of(processor, item) for item in other] != shown[-1]  # ... and for other seeds ...
    assert len({caption for captions in shown for caption in captions}) > 8  # ... and all of them in time
    one.set_epoch(1)
    random.seed(0)
    assert [caption_of(processor, item) for item in one] == shown[1]


def test_a_random_caption_is_never_one_that_was_dropped(processor, tmp_path):
    rows = caption_rows(tmp_path).to_list()
    for row in rows:
        row["caption"].append("a far too long caption of very many words that does not fit at all")
    rows[2]["caption"] = rows[2]["caption"][-1:]
    lengths = []

    def encode(processor, item, max_length):
        made = encode_caption(processor, item)
        lengths.append(made["length"])
        if made["length"] > 30:
            raise SampleDropped(DROP_REASONS[2])
        return made

    dataset = encoded(datasets.Dataset.from_list(rows), processor, encode, caption_choice="random")
    assert len(dataset) == 4 and dataset.account.total["learned from"] == 12
    assert dropped_of(dataset) == {DROP_REASONS[2]: 5} and max(lengths) > 30
    for epoch in range(10):
        dataset.set_epoch(epoch)
        assert [caption_of(processor, item)[:5] for item in dataset] == ["row 0", "row 1", "row 3", "row 4"]


@pytest.mark.parametrize("dropped", [range(0), range(1990, 2000), range(1200), range(0, 2000, 3)], ids=str)
def test_drops_are_counted_wherever_they_are(dropped):
    """The libraries guess types from the first thousand rows: none may decide for the others."""
    processor = tiny.processor_of("byte-level", "chatml")
    lost = set(dropped)
    rows = [{"messages": [{"role": "user", "content": "a"}]} for _ in range(2000)]
    for row, item in enumerate(rows):
        item["messages"].append({"role": "assistant", "content": f"b {row}", "train": row not in lost})
    dataset = encoded(datasets.Dataset.from_list(rows), processor, encode_dialogue)
    assert len(dataset) == dataset.account.total["learned from"] == 2000 - len(lost)
    assert dropped_of(dataset) == ({DROP_REASONS[0]: len(lost)} if lost else {})
    kept = [row for row in range(2000) if row not in lost]
    for index in (0, len(kept) // 2, -1):
        assert f"b {kept[index]}<|im_end|>" in processor.decode(dataset[index % len(kept)]["input_ids"])
        assert dataset[index % len(kept)]["images"] == []


def test_a_data_set_is_encoded_once_for_all_processes(tmp_path):
    """What names the cache does not change with what the processor did before."""
    fresh = tiny.processor_of(tiny.byte_level_tokenizer(), "chatml")
    used = pickle.loads(pickle.dumps(fresh))
    used.encode_messages(conversation("a", "b")["messages"])

    def name(processor, max_length=None):
        encoder = Encoder(processor, max_length=max_length)
        return Hasher.hash(_RowEncoder(encoder, Reading(), "skip", datasets.Features()))

    names = [name(processor, None) for processor in (fresh, used)]
    fresh.encode_messages(conversation("c", "d", "e", "f")["messages"])
    names.append(name(fresh, None))
    assert len(set(names)) == 1
    longer = name(fresh, 9)
    fresh.image_seq_length += 1
    assert len({names[0], longer, name(fresh, None)}) == 3


def test_workers_read_an_encoded_data_set(processor, tmp_path):
    dataset = encoded(caption_rows(tmp_path), processor, encode_caption, caption_choice="random")
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=VLMDataCollator(processor), num_workers=2)
    plain = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=VLMDataCollator(processor))
    for one, other in zip(loader, plain, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert Counter(len(batch["pixel_values"]) for batch in plain) == {2: 2, 1: 1}
