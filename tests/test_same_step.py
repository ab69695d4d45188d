"""However conversations are laid into a batch, a step learns the same: loss and gradients are those of each alone."""

import datasets
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from processing import VLMDataCollator, read_rows
from processing.batching.encoding import IGNORE, encode_caption, encode_dialogue
from tests import tiny


FORMS = {
    "padded": {},
    "one row": {"padding_free": True},
    "one row, a multiple long": {"padding_free": True, "pad_to_multiple_of": 64},
    "one row, prefixes shared": {"padding_free": True, "share_prefix": True},
}


def gradients(model, batches):
    """Loss and gradients of a step over batches, by the number of all their targets."""
    model.zero_grad()
    count = sum(int(batch["shift_labels"].ne(IGNORE).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(count)).loss
        loss.backward()
        total += loss.item()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(found)


def is_close(found, expected):
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    off = (gradient - expected_gradient).norm() / expected_gradient.norm()
    return abs(loss - expected_loss) <= 1e-5 * abs(expected_loss) and off <= 1e-5


def weighed(dialogue, weight):
    dialogue["messages"][1]["weight"] = weight
    return dialogue


@pytest.fixture
def samples(image):
    """Captions of two images, five of one; dialogues that show them, alone, together, and again; weights; text."""
    one, other, wide = image(1), image(2), image(3, (200, 60))
    return {
        encode_caption: [
            {"image": one, "caption": [f"a {word} cat" for word in ("red", "small", "large blue", "", "")]},
            {"image": other, "caption": "the sun"},
        ],
        encode_dialogue: [
            tiny.dialogue("what is it?", "a cat", one, more=(("which colour?", "red"),)),
            tiny.dialogue("what is there?", "a large green triangle is at the top left", one),
            tiny.dialogue("what is it?", "a cat", other, wide),
            weighed(tiny.dialogue("what is it?", "a cat", one, other), 0.25),
            tiny.dialogue("no picture here. which colour has the sun?", "blue"),
            tiny.dialogue("what is it?", "a mat", one),
        ],
    }


@pytest.mark.parametrize("max_tiles", [1, 4])
@pytest.mark.parametrize("encode", [encode_caption, encode_dialogue])
def test_a_step_is_that_of_each_conversation_alone(pair, folders, samples, encode, max_tiles):
    model, processor = tiny.compose(*folders(pair), "patch", max_tiles=max_tiles)
    model.requires_grad_(True).eval()  # no dropout
    rows = read_rows(samples[encode])
    if max_tiles > 1 and pair == "vit-gpt2":  # learned positions: two tiled images are more than there are
        rows = [row for row in rows if len(row["images"]) < 2]
    alone = VLMDataCollator(processor, encode=encode)
    expected = gradients(model, [alone([row]) for row in rows])
    lengths = {}
    for name, form in FORMS.items():
        batch = VLMDataCollator(processor, encode=encode, **form)(rows)
        lengths[name] = batch["labels"].numel()
        assert is_close(gradients(model, [batch]), expected), name
    assert lengths["one row, prefixes shared"] < lengths["one row"] < lengths["padded"]
    batch = VLMDataCollator(processor, encode=encode, padding_free=True)(rows)
    leaking = {**batch, "segments": [(0, batch["labels"].numel(), -1, 0)]}  # as if it were one text
    if pair != "vit-gpt2":
        assert not is_close(gradients(model, [leaking]), expected)


@pytest.mark.parametrize("split", ["history", "questions"])
def test_dialogues_that_are_split_are_learned_as_each_part_alone(folders, image, split):
    model, processor = tiny.compose(*folders("siglip-llama"))
    model.requires_grad_(True).eval()
    more = (("which colour?", "red"), ("how many?", "two"))
    rows = [tiny.dialogue("what is it?", "a cat", image(1), more=more)]
    parts = [VLMDataCollator(processor)([part]) for part in read_rows(rows, split_turns=split)]
    batch = VLMDataCollator(processor, split_turns=split, padding_free=True, share_prefix=True)(rows)
    assert len(parts) == 3 and is_close(gradients(model, [batch]), gradients(model, parts))
    assert batch["labels"].numel() < 0.7 * sum(part["labels"].numel() for part in parts)


def losses(model, collator, rows, folder, **settings):
    """What the stock Trainer logs, step by step."""
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=2, logging_steps=1,
        learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True, remove_unused_columns=False,
        lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_stock_trainer_learns_the_same_without_padding_and_with_prefixes_shared(folders, tmp_path, workers):
    rows = []
    for number in range(4):
        Image.effect_noise((40, 28), 40 + number).convert("RGB").save(tmp_path / f"{number}.png")
        captions = [f"a {word} cat {number}" for word in ("red", "small", "blue")]
        rows.append({"image": str(tmp_path / f"{number}.png"), "caption": captions})
    rows = datasets.Dataset.from_list(rows)
    found = {}
    for name, form in FORMS.items():
        model, processor = tiny.compose(*folders("siglip-llama"))
        model.model.vision_tower.requires_grad_(False)
        collator = VLMDataCollator(processor, encode=encode_caption, **form)
        found[name] = losses(model, collator, rows, tmp_path / name, dataloader_num_workers=workers)
    assert len(found["padded"]) == 2 and found["padded"][-1] < found["padded"][0]
    for name, values in found.items():
        assert values == pytest.approx(found["padded"], rel=1e-4), name
