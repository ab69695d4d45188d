"""TRL's trainers take a folder of ours unchanged, and learn what we learn; they need more than the lowest library."""

from pathlib import Path

import pytest
import transformers
from datasets import Dataset

from modeling_vlm import VLMForConditionalGeneration
from processing import VLMProcessor
from processing.batching.encoding import IGNORE, encode_dialogue
from tests import tiny


trl = pytest.importorskip("trl", minversion="1.16")
pytestmark = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18),
    reason="TRL masks answers about images from 5.18 on",
)

TEMPLATES = Path(__file__).parent / "templates"
CHATML = ["<|im_start|>", "<|im_end|>"]
LEARNT = {
    "ours, with marks": (None, []),
    "its own marks": (tiny.GENERATION, CHATML),
    "qwen3": ((TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8"), CHATML),
    "llama3": ((TEMPLATES / "llama3.jinja").read_text(encoding="utf-8"), tiny.TEMPLATES["llama3"][1]),
}
SETTINGS = {
    "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False,
    "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture
def saved(folders, tmp_path):
    """A folder of ours whose language model has a certain template; its model and processor."""

    def save(template, tokens):
        vision, text = map(str, folders("vit-gpt2"))
        tokenizer = tiny.byte_level_tokenizer()
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.chat_template = template
        model = VLMForConditionalGeneration.from_backbones(vision, text, tokenizer=tokenizer)
        processor = VLMProcessor.from_backbones(vision, text, model.config, tokenizer=tokenizer)
        processor.update_generation_config(model.generation_config)
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        return tmp_path / "model", model, processor

    return save


def said(role, text):
    return {"role": role, "content": text}


def dialogues(image, turns):
    first = [said("user", "what is it?"), said("assistant", "a red circle")]
    return [
        {
            "images": [image(row)],
            "messages": [*first, said("user", "how many?"), said("assistant", "two " * (row + 1))][: 2 * turns],
        }
        for row in range(4)
    ]


@pytest.mark.parametrize("template", LEARNT)
@pytest.mark.parametrize("turns", [1, 2])
def test_sft_with_the_answers_alone_learns_the_ids_that_we_learn(template, turns, saved, image, tmp_path):
    _, model, processor = saved(*LEARNT[template])
    settings = {"assistant_only_loss": True, "max_length": None, **SETTINGS}
    rows = dialogues(image, turns)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    batch = trainer.data_collator([dict(row) for row in rows])
    # TRL gives a template that it knows by its text, and that has no marks, a version with marks.
    assert (trainer.chat_template is None) == (template not in ("qwen3", "llama3"))
    for row, ids, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist()):
        content = [[{"type": "image"}, {"type": "text", "text": m["content"]}] for m in row["messages"][:1]]
        messages = [{**row["messages"][0], "content": content[0]}, *row["messages"][1:]]
        answers = [id for id in labels if id != IGNORE]
        own = processor.encode_messages(messages, chat_template=trainer.chat_template)
        assert answers == [id for id, weight in zip(*own) if weight]
        if turns == 1 or template != "qwen3":  # of which TRL's version keeps a thought in every answer
            encoded = encode_dialogue(processor, {"messages": messages})
            assert answers == [id for id in encoded["labels"] if id != IGNORE]
            expanded, own_labels = processor.expand_images(encoded["input_ids"], encoded["labels"])
            assert (ids[: len(expanded)], labels[: len(expanded)]) == (expanded, own_labels)
    before = model.model.language_model.wte.weight.clone()
    trainer.train()
    assert not model.model.language_model.wte.weight.equal(before)


def test_sft_learns_the_same_from_rows_without_images(saved, image, tmp_path):
    _, model, processor = saved(*LEARNT["qwen3"])
    rows = [{"messages": row["messages"]} for row in dialogues(image, 2)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, **SETTINGS),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    for row, item in zip(rows, trainer.train_dataset):
        ids, weights = processor.encode_messages(row["messages"], chat_template=trainer.chat_template)
        assert item["input_ids"] == ids
        assert item["labels"] == [id if weight else IGNORE for id, weight in zip(ids, weights)]
    trainer.train()


def test_dpo_prefers_on_a_folder(saved, image, tmp_path):
    folder, _, _ = saved(*LEARNT["qwen3"])
    rows = [
        {
            "images": [image(row)],
            "prompt": [said("user", "what is it?")],
            "chosen": [said("assistant", "a red circle")],
            "rejected": [said("assistant", "no")],
        }
        for row in range(4)
    ]
    settings = trl.DPOConfig(output_dir=str(tmp_path), max_length=None, trust_remote_code=True, **SETTINGS)
    trainer = trl.DPOTrainer(model=str(folder), args=settings, train_dataset=Dataset.from_list(rows))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_grpo_rewards_on_a_folder(saved, image, tmp_path):
    _, model, processor = saved(*LEARNT["qwen3"])
    rows = [{"image": image(row), "prompt": [said("user", "what is it?")]} for row in range(4)]
    settings = trl.GRPOConfig(output_dir=str(tmp_path), num_generations=2, max_completion_length=4, **SETTINGS)
    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=lambda completions, **others: [float(number) for number in range(len(completions))],
        args=settings,
        train_dataset=Dataset.from_list(rows),
    )
    before = model.model.language_model.wte.weight.clone()
    trainer.train()
    assert not model.model.language_model.wte.weight.equal(before)
