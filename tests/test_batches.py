"""Batches of equal cost: budgets are kept, nothing is lost, and what is planned is what runs, whoever asks and when."""

import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_pretrain
import train_sft
from processing import DuetError, VLMDataCollator
from processing.batching.account import Account
from processing.batching.dataset import ConversationDataset, MixedDataset, StreamedDataset
from processing.batching.encoding import Encoder
from processing.batching.groups import Grouped
from processing.image_files_vlm import ImagePolicy
from processing.reading.items import Reading
from tests import tiny
from tests.test_settings import refusal
from tests.test_trainer import trainer_of
from training_vlm.learning.batches import Budget, PlannedBatches
from training_vlm.learning.sampling import GroupedOrder, whole_groups
from training_vlm.run import build_trainer
from training_vlm.settings import parse_arguments
from training_vlm.stages import SFT


ROOT = Path(__file__).parents[1]


class Sizes(torch.utils.data.Dataset):
    """Items that are only as long, and have only as many images, as numbers say."""

    def __init__(self, number=2000, seed=0):
        rng = np.random.default_rng(seed)
        self.sizes = rng.integers(5, 300, number), rng.integers(0, 4, number)
        self.epoch = 0

    def __len__(self):
        return len(self.sizes[0])

    def __getitem__(self, index):
        return {"source": "numbers", "row": index}

    def in_groups(self):
        (lengths, images), items = self.sizes, np.arange(len(self))
        return Grouped(items, items, lengths, 0 * items, images, images)

    def set_epoch(self, epoch):
        self.epoch = epoch


BUDGETS = {
    "packed": Budget(2048),
    "packed to a multiple": Budget(2000, pad_to_multiple_of=64),
    "padded": Budget(2048, padding_free=False),
    "padded to a multiple": Budget(2048, padding_free=False, pad_to_multiple_of=16),
    "images": Budget(2048, images=5),
}


def batches_of(planned):
    return [[item["row"] for item in planned[index]] for index in range(len(planned))]


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_every_item_comes_once_an_epoch_and_no_batch_is_over_budget(budget):
    data = Sizes()
    planned = PlannedBatches(data, budget, processes=3)
    for epoch in (0, 1, 7):
        planned.set_epoch(epoch)
        batches = batches_of(planned)
        assert sorted(item for batch in batches for item in batch) == list(range(len(data))) and data.epoch == epoch
        for batch in batches:
            lengths, multiple = data.sizes[0][batch], budget.pad_to_multiple_of or 1
            row = -(-(lengths.sum() if budget.padding_free else lengths.max(initial=0)) // multiple) * multiple
            assert (row if budget.padding_free else row * len(batch)) <= budget.tokens
            assert budget.images is None or data.sizes[1][batch].sum() <= budget.images
        if budget.images is None:
            assert np.mean([planned.run(index) for index in range(len(planned))]) > 0.9 * budget.tokens


def test_batches_follow_from_seed_and_epoch_alone():
    one, other, third = (PlannedBatches(Sizes(), Budget(2048), seed=seed) for seed in (1, 1, 2))
    first = batches_of(one)
    other.set_epoch(3)
    later = batches_of(other)
    assert first != later and batches_of(third) != first
    one.set_epoch(3)
    other.set_epoch(0)
    assert batches_of(one) == later and batches_of(other) == first


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_epoch_has_as_many_batches_for_each_process(processes):
    planned = PlannedBatches(Sizes(300), Budget(700), processes=processes)
    assert len(planned) % processes == 0
    for epoch in range(12):
        planned.set_epoch(epoch)
        assert sum(map(len, batches_of(planned))) == 300
    few = PlannedBatches(Sizes(3), Budget(300), processes=4)  # a batch of nothing, rather than one twice
    assert len(few) == 4 and sorted(map(len, batches_of(few))) == [0, 1, 1, 1]


def test_how_far_a_run_goes_does_not_change_its_batches():
    one, other = (PlannedBatches(Sizes(), Budget(2048), epochs=lambda batches, n=n: n) for n in (1, 50))
    assert batches_of(one) == batches_of(other)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_the_largest_batches_come_first_in_each_process(budget):
    planned = PlannedBatches(Sizes(), budget, processes=2)
    for epoch in (0, 1):
        planned.set_epoch(epoch)
        run = [planned.run(index) for index in range(len(planned))]
        assert sorted(run[:2]) == sorted(run)[-2:]
        images = [planned.dataset.sizes[1][batch].sum() for batch in batches_of(planned)]
        assert max(images) in images[:4]


def test_what_has_no_room_is_named_before_training():
    data = Sizes()
    longest, most = data.sizes[0].argmax(), data.sizes[1].argmax()
    with pytest.raises(DuetError, match=f"numbers, row {longest}: .* 299 positions and max_tokens_per_batch is 298;"):
        PlannedBatches(data, Budget(298))
    with pytest.raises(DuetError, match="320 positions and max_tokens_per_batch is 310"):
        PlannedBatches(data, Budget(310, pad_to_multiple_of=64))
    with pytest.raises(DuetError, match=f"numbers, row {most}: .* 3 images and max_images_per_batch is 2;"):
        PlannedBatches(data, Budget(2048, images=2))


def rows_of(folder, source, number, captions=1):
    rng = random.Random(source)
    Image.new("RGB", (20, 20)).save(folder / f"{source}.png")
    told = [["a cat " * rng.randrange(1, 9) + source for _ in range(captions)] for _ in range(number)]
    rows = datasets.Dataset.from_list([{"image": f"{source}.png", "caption": texts} for texts in told])
    choice = "random" if captions > 1 else "all"
    return rows, Reading(source=source, prompt="what?", caption_choice=choice, images=ImagePolicy(str(folder)))


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
@pytest.mark.parametrize("captions", [1, 4])
def test_a_mix_and_captions_that_are_drawn_keep_the_budget_in_every_epoch(weights, captions, tmp_path):
    encoder = Encoder(tiny.processor_of("byte-level", "default"))
    sizes = {"x": 40, "y": 25}
    parts = [ConversationDataset(*rows_of(tmp_path, source, sizes[source], captions)) for source in sizes]
    for part in parts:
        part.encode_ahead(encoder)
    data = MixedDataset(parts, weights)
    planned = PlannedBatches(data, Budget(500), processes=2, epochs=lambda batches: 6)
    collate = VLMDataCollator(encoder, padding_free=True)
    for epoch in range(6):
        planned.set_epoch(epoch)
        batches = [planned[index] for index in range(len(planned))]
        expected = sorted(str((item["source"], item["input_ids"])) for item in map(data.__getitem__, range(len(data))))
        assert sorted(str((item["source"], item["input_ids"])) for batch in batches for item in batch) == expected
        run = [collate([batch])["input_ids"].numel() for batch in batches]
        assert max(run) <= 500 and all(ran <= planned.run(index) for index, ran in enumerate(run) if batches[index])


# Runs.

QUICK = [
    "--use_cpu", "--bf16", "False", "--max_steps", "6", "--max_new_tokens", "4", "--save_strategy", "steps",
    "--save_steps", "2", "--logging_steps", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "True",
    "--tune_text", "full", "--eval_share", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """Arguments that name 24 dialogues of very different length about eight images."""
    folder, rng = tmp_path_factory.mktemp("dialogues"), random.Random(0)
    rows = []
    for number in range(24):
        Image.new("RGB", (40, 28), (number * 9, 90, 50)).save(folder / f"{number % 8}.png")
        said = [("user", "what is it?"), ("assistant", "a cat " * rng.randrange(1, 12))] * rng.randrange(1, 3)
        messages = [{"role": role, "content": text} for role, text in said]
        rows.append({"images": [f"{number % 8}.png"], "messages": messages})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset", str(folder / "rows.jsonl"), "--image_dir", str(folder)]


@pytest.fixture
def backbones(folders):
    vision, text = folders("siglip-llama")
    return ["--vision_model", str(vision), "--text_model", str(text)]


OPTIONS = {
    "no padding": ["--padding_free", "on"],
    "padding": ["--padding_free", "off"],
    "shared prefixes": ["--share_prefix", "on", "--gradient_accumulation_steps", "2"],
    "budget": ["--max_tokens_per_batch", "300"],
    "budget of padded batches": ["--max_tokens_per_batch", "300", "--padding_free", "off"],
    "budget and accumulation": ["--max_tokens_per_batch", "300", "--gradient_accumulation_steps", "2"],
    "budget and shared prefixes": ["--max_tokens_per_batch", "300", "--share_prefix", "on"],
    "budget of a stream": ["--max_tokens_per_batch", "300", "--streaming", "--shuffle_buffer", "10"],
    "budget of a stream of shared prefixes": [
        "--max_tokens_per_batch",
        "300",
        "--streaming",
        "--shuffle_buffer",
        "10",
        "--share_prefix",
        "on",
    ],
}


WIDER = OPTIONS.keys() - {"budget and shared prefixes", "budget of a stream of shared prefixes"}


@pytest.mark.parametrize(
    "options",
    [pytest.param(OPTIONS[name], id=name, marks=[pytest.mark.slow] * (name in WIDER)) for name in OPTIONS],
)
def test_a_resumed_run_is_the_run_with_each_option(backbones, dialogues, tmp_path, options):
    common = [*backbones, *dialogues, *QUICK, *options]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_sft.main([*common, "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoint-4", stopped / "checkpoint-4")
    train_sft.main([*common, "--output_dir", str(stopped), "--resume_from_checkpoint", "last"])
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    reports = [json.loads((folder / "data_report.json").read_text()) for folder in (whole, stopped)]
    assert reports[0] == reports[1]


CHANGES = {
    "max_tokens_per_batch=200 (it had 300)": ["--max_tokens_per_batch", "200"],
    "max_images_per_batch=2 (it had none)": ["--max_images_per_batch", "2"],
    "share_prefix=on (it had off)": ["--share_prefix", "on"],
    "padding_free=off (it had on)": ["--padding_free", "off"],
    "split_turns=questions (it had none), conversations=36 (it had 24)": ["--split_turns", "questions"],
    "seed of the data=5 (it had 42), gradient_accumulation_steps=2 (it had 1)": [
        "--data_seed",
        "5",
        "--gradient_accumulation_steps=2",
    ],
    "max_length=80 (it had 256)": ["--max_length", "80"],
    "max_tokens_per_batch=none (it had 300)": ["--max_tokens_per_batch", None],
    "streaming=True (it had False)": ["--streaming"],
    "": [],
}


@pytest.mark.slow
def test_a_run_that_goes_on_with_another_order_of_data_is_told_so(backbones, dialogues, tmp_path, capsys):
    common = [*backbones, *dialogues, *QUICK, "--max_tokens_per_batch", "300", "--max_steps", "2"]
    train_sft.main([*common, "--output_dir", str(tmp_path / "first")])
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    for number, (says, changes) in enumerate(CHANGES.items()):
        capsys.readouterr()
        going_on = ["--max_steps", "3", "--save_strategy", "no", "--output_dir", str(tmp_path / str(number))]
        argv = [*common, *going_on, "--resume_from_checkpoint", checkpoint, *changes]
        if None in changes:  # it is left out
            at = argv.index(changes[0])
            argv = argv[:at] + argv[at + 2 : -2]
        train_sft.main(argv)
        lines = [line for line in capsys.readouterr().out.splitlines() if "goes on with" in line]
        assert lines == [
            f"the run goes on with {says}: the data come in another order from here on, and of the epoch that it was "
            "in some may come twice and some not at all"
        ] * bool(says)


def test_a_run_that_goes_on_with_other_data_is_told_so(backbones, dialogues, tmp_path, capsys):
    """They are as many; their lengths are others, from which the batches follow."""
    common = [*backbones, *dialogues, *QUICK, "--max_tokens_per_batch", "300", "--output_dir"]
    train_sft.main([*common, str(tmp_path / "first"), "--max_steps", "2"])
    first, *others = Path(dialogues[1]).read_text().splitlines(keepends=True)
    rows = first + "".join(others).replace("a cat a cat", "a cat")  # another first row would be other data altogether
    (tmp_path / "rows.jsonl").write_text(rows)
    common[common.index(dialogues[1])] = str(tmp_path / "rows.jsonl")
    going_on = ["--max_steps", "3", "--resume_from_checkpoint", str(tmp_path / "first" / "checkpoint-2")]
    train_sft.main([*common, str(tmp_path / "second"), *going_on])
    assert "the run goes on with other data than it had" in capsys.readouterr().out


def test_a_run_says_what_a_step_holds_and_trains_on_every_conversation_once_an_epoch(
    backbones, dialogues, tmp_path, capsys
):
    options = ["--max_steps", "-1", "--num_train_epochs", "2", "--max_tokens_per_batch", "300"]
    train_sft.main([*backbones, *dialogues, *QUICK, *options, "--output_dir", str(tmp_path)])
    said = capsys.readouterr().out
    steps = json.loads((tmp_path / "trainer_state.json").read_text())["global_step"]
    assert f"about {round(48 / steps)} conversations a step (up to 300 positions x 1 x 1 process)" in said
    assert json.loads((tmp_path / "data_report.json").read_text())["total"]["samples"] == 48
    metrics = json.loads((tmp_path / "train_results.json").read_text())
    assert metrics["train_samples_per_second"] == pytest.approx(48 / metrics["train_runtime"], rel=0.05)


def test_what_a_number_of_conversations_would_be_is_said_to_be_replaced(capsys):
    with pytest.raises(SystemExit):
        train_sft.main(["--dataset", "nowhere", "--output_dir", "out", "--use_cpu", "--bf16", "False",
                        "--max_tokens_per_batch", "300", "--per_device_train_batch_size", "4"])  # fmt: skip
    assert "max_tokens_per_batch takes the place of per_device_train_batch_size=4" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--streaming", "--max_steps", "2"]], ids=["ahead", "stream"])
def test_a_budget_smaller_than_a_conversation_is_one_line(backbones, dialogues, tmp_path, capsys, options):
    with pytest.raises(SystemExit):
        train_sft.main(
            [*backbones, *dialogues, *QUICK, "--max_tokens_per_batch", "40", *options, "--output_dir", str(tmp_path)]
        )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ", row " in error and "positions and max_tokens_per_batch is 40" in error


REFUSED = {
    "max_images_per_batch": ["--max_images_per_batch", "4"],
    "max_tokens_per_batch=0": ["--max_tokens_per_batch", "0"],
    "--train_sampling_strategy": ["--max_tokens_per_batch", "99", "--train_sampling_strategy", "group_by_length"],
    "--auto_find_batch_size": ["--max_tokens_per_batch", "99", "--auto_find_batch_size", "True"],
    "share_prefix=on: texts share a prefix in one row": ["--share_prefix", "on", "--padding_free", "off"],
    "share_prefix=on and train_sampling_strategy": [
        "--share_prefix",
        "on",
        "--train_sampling_strategy",
        "group_by_length",
    ],
    "padding_free='no'": ["--padding_free", "no"],
    "--encode_ahead": ["--max_tokens_per_batch", "99", "--encode_ahead", "False"],
}


@pytest.mark.parametrize("says", REFUSED)
def test_options_that_exclude_each_other_are_refused_in_one_line(says):
    assert says in refusal(*REFUSED[says])


# Order of the texts of an image.


@pytest.mark.parametrize("size", [1, 4, 5, 12, 32])
def test_texts_of_an_image_come_in_one_batch_where_they_have_room(size):
    rng = random.Random(0)
    groups = [group for group in range(200) for _ in range(rng.choice([1, 2, 5, 5, 12]))]
    order = whole_groups(groups, size, random.Random("a seed"))
    assert sorted(order) == list(range(len(groups))) and order == whole_groups(groups, size, random.Random("a seed"))
    assert order != whole_groups(groups, size, random.Random("another"))
    batches: dict[int, set[int]] = {}
    for place, item in enumerate(order):
        batches.setdefault(groups[item], set()).add(place // size)
    at_least = {group: -(-groups.count(group) // size) for group in batches}
    divided = sum(len(found) > at_least[group] for group, found in batches.items())
    assert divided <= 0.1 * len(batches)


def test_the_order_of_groups_follows_from_seed_and_epoch_and_is_read_anew(folders, image, tmp_path):
    data = tiny.ragged_dialogues(image) * 2

    class Grouped(list):
        groups = np.arange(16) // 4

    trainer = trainer_of("vit-gpt2", folders, Grouped(data), tmp_path, per_device_train_batch_size=4)
    assert not isinstance(trainer._get_train_sampler(), GroupedOrder)
    trainer.data_collator.padding_free = trainer.data_collator.share_prefix = True
    sampler = trainer._get_train_sampler()
    first = list(sampler)
    assert all(len({item // 4 for item in first[start : start + 4]}) == 1 for start in range(0, 16, 4))
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(16))


# What is decided, and said.


def said_of(capsys, main, *argv):
    main([*argv, "--max_steps", "1", "--save_strategy", "no"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("no padding", "batches are"))]
    return line


@pytest.fixture
def captions(tmp_path):
    """Arguments that name 12 images with five captions each."""
    rows = []
    for number in range(12):
        Image.new("RGB", (40, 28), (number * 20, 90, 50)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": [f"a cat {word}" for word in "it and two at sun".split()]})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset", str(tmp_path / "captions.jsonl"), "--image_dir", str(tmp_path)]


def test_a_run_leaves_out_what_it_can_and_says_so(backbones, captions, dialogues, tmp_path, capsys):
    run = [*backbones, *QUICK, "--overwrite_output_dir", "--output_dir", str(tmp_path / "out")]
    large, small = ["--per_device_train_batch_size", "40"], ["--per_device_train_batch_size", "8"]
    assert said_of(capsys, train_pretrain.main, *run, *captions, *large) == (
        "no padding, each image of a batch encoded once, what texts of an image begin with run once; a step holds 8.0 "
        "images, and below 32 it teaches less than one of as many texts of different images, if it costs less; "
        "--share_prefix off has them apart"
    )
    assert "with 5.0 texts an image a step would hold 1.6 images" in said_of(
        capsys, train_pretrain.main, *run, *captions, *small
    )
    assert said_of(capsys, train_pretrain.main, *run, *captions, *small, "--share_prefix", "on").endswith("run once")
    assert "not shared: each image has one text" in said_of(
        capsys, train_pretrain.main, *run, *captions, *large, "--caption_choice", "random"
    )
    assert "not shared: train_sampling_strategy=group_by_length" in said_of(
        capsys, train_pretrain.main, *run, *captions, *large, "--train_sampling_strategy", "group_by_length"
    )
    assert (
        said_of(capsys, train_pretrain.main, *run, *captions, "--padding_free", "off")
        == "batches are padded, each image of a batch encoded once"
    )


def test_a_model_that_does_not_keep_texts_apart_is_padded_as_before_and_says_why(
    backbones, captions, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        train_pretrain, "build_trainer", partial(build_trainer, probe=lambda model, share_prefix: "it mixes all tokens")
    )
    run = [*backbones, *captions, *QUICK, "--overwrite_output_dir", "--output_dir", str(tmp_path / "out")]
    assert (
        said_of(capsys, train_pretrain.main, *run)
        == "batches are padded, each image of a batch encoded once; it mixes all tokens"
    )
    for option in ("padding_free", "share_prefix"):
        with pytest.raises(SystemExit):
            train_pretrain.main([*run, f"--{option}", "on"])
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"{option}=on cannot be: it mixes all tokens" in line


def test_a_model_that_keeps_texts_apart_but_not_behind_a_prefix_is_packed_without_sharing(
    backbones, captions, tmp_path, capsys, monkeypatch
):
    counts = partial(build_trainer, probe=lambda model, share_prefix: "it counts" if share_prefix else None)
    monkeypatch.setattr(train_pretrain, "build_trainer", counts)
    run = [*backbones, *captions, *QUICK, "--overwrite_output_dir", "--output_dir", str(tmp_path / "out")]
    assert said_of(capsys, train_pretrain.main, *run) == (
        "no padding, each image of a batch encoded once; prefixes are not shared: it counts"
    )
    with pytest.raises(SystemExit):
        train_pretrain.main([*run, "--share_prefix", "on"])
    assert "share_prefix=on cannot be: it counts" in capsys.readouterr().err


def test_on_and_off_are_read_from_a_yaml_too(tmp_path):
    for written, meant in (("off", "off"), ("on", "on"), ("auto", "auto")):
        (tmp_path / "run.yaml").write_text(f"dataset: shapes\npadding_free: {written}\n")
        settings = parse_arguments(SFT, ["--config", str(tmp_path / "run.yaml"), "--output_dir", "out", "--use_cpu"])
        assert settings.efficiency.padding_free == meant


def test_a_batch_runs_the_positions_that_were_planned(backbones, captions, tmp_path):
    """Also where prefixes are shared: the account of the run counts what ran."""
    ran = []
    add_batch = Account.add_batch
    run = [*backbones, *captions, *QUICK, "--max_steps", "-1", "--num_train_epochs", "1", "--share_prefix", "on"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Account, "add_batch", lambda self, batch: ran.append(batch) or add_batch(self, batch))
        train_pretrain.main([*run, "--max_tokens_per_batch", "200", "--output_dir", str(tmp_path / "out")])
    assert sum(len(batch.records) for batch in ran) == 60
    assert max(batch.run for batch in ran) <= 200 and ran[0].run == max(batch.run for batch in ran)
    assert sum(batch.run for batch in ran) < 0.6 * sum(batch.tokens for batch in ran)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_texts_of_a_row_of_a_stream_come_one_after_the_other_where_they_are_shared(workers, buffer):
    rows = [{"image": f"{n}.png", "caption": [f"{n} {word}" for word in "abc"[: 1 + n % 3]]} for n in range(30)]
    sources = [
        (
            datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2),
            Reading(source=name, images=ImagePolicy(own_paths=True)),
        )
        for name in "xy"
    ]
    stream = StreamedDataset(sources, weights=[3, 1], shuffle_buffer=buffer)
    stream.keeps_rows = True
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
    items = [item for _, item in zip(range(4000), loader)]
    share = sum(item["source"] == "x" for item in items) / len(items)
    assert 0.7 < share < 0.8
    if not workers:  # the loader takes turns between workers
        said = [(item["source"], item["messages"][-1]["content"][0]["text"]) for item in items]
        for place, (source, text) in enumerate(said[:-2]):
            if text.endswith("a"):
                number = int(text[:-2])
                expected = [(source, f"{number} {word}") for word in "abc"[: 1 + number % 3]]
                assert said[place : place + len(expected)] == expected


def run_in_two_processes(folder, *argv):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(ROOT / "train_sft.py"), *QUICK, "--ddp_backend", "gloo", "--max_tokens_per_batch", "300",
            "--share_prefix", "on", *argv,
        ],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_take_the_same_number_of_steps_and_see_every_conversation_once(backbones, dialogues, tmp_path):
    epochs = ["--max_steps", "-1", "--num_train_epochs", "2", "--output_dir", "out"]
    assert "positions x 1 x 2 processes)" in run_in_two_processes(tmp_path, *backbones, *dialogues, *epochs)
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["total"]["samples"] == report["total"]["learned from"] == 48
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["epoch"] == 2 and state["global_step"] % 2 == 0


@pytest.mark.slow
@pytest.mark.parametrize("data", [[], ["--streaming", "--shuffle_buffer", "10"]], ids=["ahead", "stream"])
def test_two_processes_go_on_with_the_batches_that_they_had(backbones, dialogues, tmp_path, data):
    run_in_two_processes(tmp_path, *backbones, *dialogues, *data, "--output_dir", "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "stopped" / "checkpoint-4")
    resumed = ["--output_dir", "stopped", "--resume_from_checkpoint", "last"]
    run_in_two_processes(tmp_path, *backbones, *dialogues, *data, *resumed)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
