"""Rows that a program holds: collator and `read_rows` read them as a run reads a file, and name what they cannot."""

import base64
import logging
import pickle
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from modeling_vlm import VLMForConditionalGeneration
from processing import VLMDataCollator, VLMProcessor, read_rows
from processing.batching.encoding import IGNORE, encode_caption
from processing.reading.items import is_item
from tests import tiny


@pytest.fixture(scope="module")
def processor():
    return tiny.processor_of("byte-level", "chatml")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A small picture in a folder."""
    file = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.effect_noise((40, 28), 60).convert("RGB").save(file)
    return file


def says(role, content):
    return {"role": role, "content": content}


def turns(*contents):
    return [says("user" if index % 2 == 0 else "assistant", content) for index, content in enumerate(contents)]


def layouts(picture):
    """Name -> row of an image, a question and the answer, in each known layout."""
    image, path, stored = Image.open(picture).convert("RGB"), str(picture), picture.read_bytes()
    encoded = base64.b64encode(stored).decode()
    answer = says("assistant", [{"type": "text", "text": "a cat"}])

    def asked(**part):
        return [says("user", [{"type": "image", **part}, {"type": "text", "text": "what is it?"}]), answer]

    return {
        "TRL messages and images": {"messages": turns("what is it?", "a cat"), "images": [image]},
        "TRL messages and image": {"messages": turns("what is it?", "a cat"), "image": image},
        "TRL parts of text and images": {
            "messages": [says("user", [{"type": "text", "text": "what is it?"}]), answer], "images": [image]
        },
        "TRL prompt and completion": {
            "prompt": turns("what is it?"), "completion": [says("assistant", "a cat")], "images": [path]
        },
        "HF part with image": {"messages": asked(image=image)},
        "HF part with path": {"messages": asked(path=path)},
        "HF part with url": {"messages": asked(url=f"data:image/png;base64,{encoded}")},
        "HF part with base64": {"messages": asked(base64=encoded)},
        "OpenAI part": {
            "messages": [
                says(
                    "user",
                    [
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
                        {"type": "text", "text": "what is it?"},
                    ],
                ),
                answer,
            ]
        },
        "parts with nulls, as datasets fills them": {
            "messages": [
                says(
                    "user",
                    [
                        {"type": "image", "text": None, "image": {"bytes": stored, "path": None}},
                        {"type": "text", "text": "what is it?", "image": None},
                    ],
                ),
                answer,
            ]
        },
        "LLaVA": {
            "id": "7",
            "image": path,
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}
            ],
        },
        "the_cauldron": {
            "images": [{"bytes": stored, "path": None}], "texts": [{"user": "what is it?", "assistant": "a cat"}]
        },
        "question and answer": {"image": path, "question": "what is it?", "answer": "a cat"},
        "a conversation": {"images": [path], "messages": asked()},
    }  # fmt: skip


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def pixels(processor, picture):
    return processor.process_images([Image.open(picture).convert("RGB")])["pixel_values"]


def learned(processor, batch):
    return [processor.decode([label for label in row if label != IGNORE]) for row in batch["labels"].tolist()]


def test_the_collator_takes_rows_of_every_layout_as_they_are(processor, picture):
    for name, row in layouts(picture).items():
        before = pickle.dumps(row)
        collator = VLMDataCollator(processor, on_bad_sample="error")
        batch = collator([row])
        assert learned(processor, batch) == ["a cat<|im_end|>"], name
        assert torch.equal(batch["pixel_values"], pixels(processor, picture)), name
        assert batch["input_ids"].eq(processor.image_token_id).sum() == processor.image_seq_length, name
        assert pickle.dumps(row) == before, name
        assert same(batch, collator(read_rows([row]))), name
        assert same(batch, VLMDataCollator(processor)([collator.encoder(item) for item in read_rows([row])])), name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_rows_of_all_layouts_gives_what_a_data_set_of_them_gives(processor, picture, workers):
    rows = [row for _, row in sorted(layouts(picture).items())]
    loader = DataLoader(rows, batch_size=4, collate_fn=VLMDataCollator(processor), num_workers=workers)
    expected = [VLMDataCollator(processor)(read_rows(rows[begin : begin + 4])) for begin in range(0, len(rows), 4)]
    for found, batch in zip(loader, expected, strict=True):
        assert same(found, batch)


@pytest.mark.parametrize("decoded", [False, True])
def test_a_data_set_of_the_library_is_read_as_rows_and_decoded_no_sooner(processor, picture, decoded, monkeypatch):
    features = datasets.Features(
        image=datasets.Image(decode=decoded), question=datasets.Value("string"), answer=datasets.Value("string")
    )
    stored = {"bytes": picture.read_bytes(), "path": None}
    rows = datasets.Dataset.from_list([{"image": stored, "question": "what is it?", "answer": "a cat"}] * 3, features)
    batch = VLMDataCollator(processor)([rows[index] for index in range(3)])
    assert learned(processor, batch) == ["a cat<|im_end|>"] * 3
    once = 3 if decoded else 1  # the same bytes are one image, three images that somebody decoded are not
    assert torch.equal(batch["pixel_values"], pixels(processor, picture).repeat(once, 1, 1, 1))
    items = read_rows(rows, source="cats")
    assert [item["images"] for item in items] == [[stored]] * 3
    assert [(item["source"], item["row"]) for item in items] == [("cats", 0), ("cats", 1), ("cats", 2)]
    read = VLMDataCollator(processor)(items)
    assert len(read["pixel_values"]) == 1 and read["feature_index"].ge(0).sum() == 3 * processor.image_seq_length
    assert decoded or same(read, batch)
    assert read_rows(rows.to_iterable_dataset()) == read_rows(rows)


def test_of_a_data_set_the_rows_are_read_that_were_chosen_and_in_their_order():
    rows = datasets.Dataset.from_list([{"image": Image.new("RGB", (8, 8)), "caption": str(n)} for n in range(8)])
    parts = rows.train_test_split(test_size=2, seed=0)
    for chosen in (
        rows.select([5, 1, 6]),
        rows.shuffle(seed=1),
        parts["test"],
        rows.filter(lambda row: "3" in row.values()),
    ):
        assert [said_of(item) for item in read_rows(chosen)] == list(chosen["caption"])


def said_of(item):
    return item["messages"][-1]["content"][-1]["text"]


def test_a_row_of_several_captions_gives_several_conversations_also_in_a_batch(processor, picture):
    row = {"image": str(picture), "captions": ["a cat", "a red cat"]}
    batch = VLMDataCollator(processor, encode=encode_caption)([row, {"image": str(picture), "text": "a dog"}])
    assert learned(processor, batch) == [f"{text}<|endoftext|>" for text in ("a cat", "a red cat", "a dog")]
    assert len(batch["pixel_values"]) == 1 and batch["feature_index"].ge(0).sum() == 3 * processor.image_seq_length
    asked = read_rows([row], prompt="Describe it.", caption_choice="first")
    assert [part.get("text") for part in asked[0]["messages"][0]["content"]] == [None, "Describe it."]


def test_one_bad_row_costs_itself_alone_and_is_named_by_its_place_in_the_batch(processor, picture, caplog):
    good = layouts(picture)["LLaVA"]
    deep = "a"
    for _ in range(100_000):
        deep = [deep]
    bad = {
        "None": None,
        "unknown columns": {"foo": 1},
        "no content": {"messages": [{"role": "user"}]},
        "a weight that no loss bears": {"messages": [*turns("a"), {**says("assistant", "b"), "weight": 1e39}]},
        "nested too deeply": {"messages": deep},
        "nested in a part": {"messages": turns([{"type": "text", "text": deep}], "a")},
        "no such file": {**good, "image": str(picture) + ".gone"},
    }
    for name, row in bad.items():
        collator = VLMDataCollator(processor, account=True)
        batch = collator([good, row, good])
        assert (len(batch["input_ids"]), len(batch["pixel_values"])) == (2, 1), name
        (record,) = [record for record in batch["account"].records if record.dropped is not None]
        assert (record.source, record.row) == ("the batch", 1), name
        assert record.detail.startswith("the batch, row 1: ") and len(record.detail) < 600, name
        with pytest.raises(ValueError, match="the batch, row 1: ") as caught:
            VLMDataCollator(processor, on_bad_sample="error")([good, row, good])
        assert "\n" not in str(caught.value)
        if name != "no such file":  # which is known when it is opened
            with pytest.raises(ValueError, match="mine, row 1: "):
                read_rows([good, row, good], source="mine", on_bad_sample="error")
            assert len(read_rows([good, row, good], source="mine")) == 2
    with pytest.raises(ValueError, match="mine: 2 of 2 samples cannot be read, such as mine, row 0: "):
        read_rows([bad["None"], bad["unknown columns"]], source="mine")


def test_whoever_has_no_account_is_told_once_what_is_left_out(processor, picture, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    good, bad = layouts(picture)["LLaVA"], {"foo": 1}
    collator = VLMDataCollator(processor)
    for _ in range(3):
        collator([good, bad, bad])
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) == 1 and "the batch, row 1: found columns foo" in told[0]
    assert collator.dropped == {"malformed row": 6}
    caplog.clear()
    read_rows([good, bad, bad], source="mine")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("mine: 2 of 3 samples cannot be read, such as mine, row 1: found columns foo")


def test_rows_without_columns_are_a_mistake_that_is_named(processor):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        VLMDataCollator(processor)([{}])


@pytest.mark.parametrize("rows", ["rows.jsonl", {"train": []}, {"image": "a.png", "caption": "b"}, 7])
def test_what_are_no_rows_is_refused(rows):
    with pytest.raises(ValueError, match="expected rows"):
        read_rows(rows)


def test_a_folder_of_images_keeps_the_paths_of_rows_inside(processor, picture, monkeypatch):
    row = {"image": "a.png", "caption": "a cat"}
    (item,) = read_rows([row], image_dir=picture.parent)
    assert item["images"] == [str(picture)]
    monkeypatch.chdir(picture.parent)
    assert len(VLMDataCollator(processor)([row])["pixel_values"]) == 1
    assert read_rows([row])[0]["images"] == [str(picture)]
    (picture.parent / "inner").mkdir(exist_ok=True)
    for path in ("../a.png", str(picture)):
        with pytest.raises(ValueError, match="lies outside"):
            read_rows([{**row, "image": path}], image_dir=picture.parent / "inner")
    with pytest.raises(ValueError, match="no image folder"):
        read_rows([row], image_dir=picture.parent / "gone")
    with pytest.raises(ValueError, match="is a URL"):
        VLMDataCollator(processor, on_bad_sample="error")([{**row, "image": "https://example.com/a.png"}])


def test_what_was_read_is_not_read_again(picture):
    for name, row in layouts(picture).items():
        assert is_item(row) == (name == "a conversation"), name
        assert all(map(is_item, read_rows([row]))), name
    row = {"messages": [says("assistant", [{"type": "text", "text": "b"}])]}
    assert is_item(row) and not is_item({"messages": [{**row["messages"][0], "loss": False}]})


def test_a_program_can_name_columns(processor, picture):
    rows = [{"photo": str(picture), "title": "a cat", "extra": None}]
    (item,) = read_rows(rows, columns={"image": "photo", "caption": "title"})
    assert learned(processor, VLMDataCollator(processor)([item])) == ["a cat<|im_end|>"]


# -- the README's own program -----------------------------------------------------------------------------------------


def readme_program(vision, text):
    """The README's Python block, for other backbones."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "read_rows" in code]
    for name, other in (("google/vit-base-patch16-224", vision), ("openai-community/gpt2", text)):
        assert name in block
        block = block.replace(name, str(other))
    return block


def test_the_program_of_the_readme_gives_a_model_that_is_trained_saved_and_resumed(
    folders, picture, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.open(picture).save(tmp_path / "images" / "cat.jpg")
    program = readme_program(*folders("vit-gpt2"))

    def run(program):
        made = {}
        torch.manual_seed(0)
        exec(compile(program, "README.md", "exec"), made)
        return made["trainer"]

    trainer = run(program)
    assert trainer.state.global_step == 10
    whole = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    saved = VLMForConditionalGeneration.from_pretrained("outputs/mine")
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in whole.items())
    assert VLMProcessor.from_pretrained("outputs/mine").image_token_id == saved.config.image_token_id
    half = VLMForConditionalGeneration.from_pretrained("outputs/mine/checkpoint-5").state_dict()
    assert any(not torch.equal(value, half[name]) for name, value in whole.items() if "projector" in name)
    shutil.rmtree(tmp_path / "outputs" / "mine" / "checkpoint-10")
    resumed = run(program.replace("trainer.train()", "trainer.train(resume_from_checkpoint=True)"))
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in whole.items())


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_the_stock_trainer_learns_the_same_from_rows_as_from_what_was_read_of_them(folders, picture, tmp_path, kind):
    rows = [{"image": str(picture), "question": f"what is it {n}?", "answer": "a cat " * n} for n in range(6)]

    def trained(data):
        model, processor = tiny.compose(*folders("vit-gpt2"))
        args = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, remove_unused_columns=False, report_to="none",
            use_cpu=True, logging_steps=1, save_strategy="no", learning_rate=1e-3, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, data_collator=VLMDataCollator(processor), train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    losses = trained(rows if kind == "list" else datasets.Dataset.from_list(rows))
    assert len(losses) == 3 and losses == trained(read_rows(rows))
    with pytest.raises(ValueError, match="remove_unused_columns"):
        model, processor = tiny.compose(*folders("vit-gpt2"))
        args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
        Trainer(model, args, data_collator=VLMDataCollator(processor), train_dataset=rows).train()
