"""What a recipe takes, known without weights: its peak is the one measured, and it says what was assumed."""

import json
import shutil
import signal

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback, ViTConfig, ViTImageProcessorPil, ViTModel

from tests import tiny
from training_vlm import rehearsal
from training_vlm.estimate import bytes_of, largest_batch, main, settled
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.load import load_model
from training_vlm.run import build_trainer
from training_vlm.sketch import Sketch, StandIn
from training_vlm.stages import PRETRAIN, SFT


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A composed model, rows with two captions and dialogues, beside their images."""
    folder = tmp_path_factory.mktemp("made")
    tiny.save_siglip(folder / "vision")
    tiny.save_llama(folder / "text")
    model, processor = tiny.compose(folder / "vision", folder / "text")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    captions, dialogues = [], []
    for row in range(24):
        Image.new("RGB", (40, 30), (row * 9, 80, 40)).save(folder / f"{row}.png")
        long = " ".join(["a red circle"] * (1 + row % 5))
        captions.append({"image": f"{row}.png", "captions": [long, "a cat"]})
        dialogues.append({"image": f"{row}.png", "question": "what is it?", "answer": long})
    for name, rows in (("captions", captions), ("dialogues", dialogues)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


STREAMED = ["--streaming", "true", "--max_steps", "3"]


def options(made, stage=SFT, *others):
    data = made / ("dialogues.jsonl" if stage is SFT else "captions.jsonl")
    return [
        "--model", str(made / "model"), "--dataset", str(data), "--output_dir", str(made / "out"), "--tune_text",
        "full", "--eval_share", "0", "--per_device_train_batch_size", "4", *others,
    ]  # fmt: skip


class Memory(TrainerCallback):
    """The most bytes that torch's allocator had given out in the second step, by its own account."""

    def __init__(self, batch, folder):
        self.batch, self.folder = batch, folder

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 1:
            parts = [*model.parameters(), *model.buffers(), *self.batch.values()]
            parts += [part for states in optimizer.state.values() for part in states.values()]
            storages = {
                part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
                for part in parts if isinstance(part, torch.Tensor)
            }  # fmt: skip
            self.held = sum(storages.values())
            self.profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self.profiler.start()
            return
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.folder / "trace.json"))
        events = json.loads((self.folder / "trace.json").read_text())["traceEvents"]
        events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
        alive = most = 0
        for event in events:
            alive += event["args"]["Bytes"]
            most = max(most, alive)
        self.peak = self.held + most


def measured(stage, arguments, sketch, folder):
    """The peak of the same step with weights and images."""
    data = sketch.data
    model, _ = load_model(stage, arguments, data)
    two = rehearsal.rehearsing(arguments, str(folder))
    trainer = build_trainer(
        two._replace(efficiency=arguments.efficiency), model, sketch.encoder, sketch.sample(512), None
    )
    batches = list(trainer.get_train_dataloader())
    batch = max(batches, key=lambda found: (found["account"].run, len(found["pixel_values"])))
    assert batch["account"].run == sketch.rehearsed.account.run
    trainer.get_train_dataloader = lambda: [batch] * (2 * trainer.args.gradient_accumulation_steps)
    memory = Memory(batch, folder)
    trainer.add_callback(memory)
    trainer.train()
    return memory.peak


SETTINGS = {
    "fp32": (SFT, ["--bf16", "false"]),
    "bf16, stage 1": (PRETRAIN, ["--bf16", "true", "--tune_text", "last:1"]),
    "checkpointed, encoder learns": (
        SFT, ["--bf16", "true", "--gradient_checkpointing", "true", "--tune_vision", "full"]
    ),
    "padded, accumulated, sgd": (
        SFT, ["--bf16", "false", "--padding_free", "off", "--gradient_accumulation_steps", "2", "--optim", "sgd"]
    ),
    "frozen weights in bf16": (SFT, ["--bf16", "true", "--frozen_dtype", "auto", "--tune_text", "last:1"]),
    "adafactor": (SFT, ["--bf16", "false", "--optim", "adafactor"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("fp32", "bf16, stage 1", "adafactor") else ())
        for name in SETTINGS
    ],
)
def test_the_peak_is_the_one_that_is_measured(made, tmp_path, name):
    """Of the same batch, by the allocator's own account; what a kernel needs for itself is not foreseen."""
    stage, settings = SETTINGS[name]
    arguments = settled(stage, options(made, stage, *settings))
    sketch = Sketch(stage, arguments)
    found = sketch.rehearsed
    assert found.peak.total() == pytest.approx(measured(stage, arguments, sketch, tmp_path), rel=0.1)


def test_the_kinds_of_memory_are_what_they_say(made):
    sketch = Sketch(SFT, settled(SFT, options(made, SFT, "--bf16", "false", "--gradient_accumulation_steps", "2")))
    found = sketch.rehearsed
    learned = 4 * sum(p.numel() for p in sketch.model.parameters() if p.requires_grad)
    assert found.held["weights"] >= 4 * sum(p.numel() for p in sketch.model.parameters())
    assert found.held["optimizer"] == pytest.approx(2 * learned, rel=0.01)
    assert found.peak["gradients"] == pytest.approx(learned, rel=0.01)
    assert found.peak["logits"] and not found.held["logits"] and not found.held["gradients"]


def test_what_is_frozen_has_no_gradients_and_no_optimizer(made):
    sketch = Sketch(SFT, settled(SFT, [*options(made), "--tune_text", "frozen"]))
    projector = sum(p.numel() for p in sketch.model.model.multi_modal_projector.parameters())
    assert sketch.rehearsed.held["optimizer"] == pytest.approx(8 * projector, rel=0.05)


def test_no_weight_is_read_and_no_image_opened(made, tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", None)
    monkeypatch.setattr("processing.image_files_vlm.load_image", None)
    monkeypatch.setattr("processing.batching.images.load_image", None)
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", None)
    for path in (made / "model").glob("*.safetensors"):
        path.rename(tmp_path / path.name)
    try:
        assert Sketch(SFT, settled(SFT, options(made))).rehearsed.peak.total() > 0
    finally:
        for path in tmp_path.glob("*.safetensors"):
            path.rename(made / "model" / path.name)


def test_batches_of_positions_are_known_of_a_stream_too(made):
    sketch = Sketch(SFT, settled(SFT, options(made, SFT, *STREAMED, "--max_tokens_per_batch", "200")))
    assert 0 < sketch.rehearsed.account.run <= 200
    assert sketch.least_batch() <= 200 < sketch.most_batch()


@pytest.mark.parametrize(
    "settings, unit, size",
    [
        ([], "conversation", 3),
        pytest.param(["--max_tokens_per_batch", "200"], "position", 150, marks=pytest.mark.slow),
        pytest.param([*STREAMED, "--max_tokens_per_batch", "200"], "position", 150, marks=pytest.mark.slow),
    ],
)
def test_the_largest_batch_fits_and_the_next_does_not(made, settings, unit, size):
    sketch = Sketch(SFT, settled(SFT, options(made, SFT, *settings)))
    assert sketch.unit == unit
    memory = sketch.with_batch(size).peak.total()
    number = largest_batch(sketch, memory)
    assert sketch.with_batch(number).peak.total() <= memory < sketch.with_batch(number * 2).peak.total()


def test_a_memory_too_small_for_anything_is_told_in_a_line(made, capsys):
    with pytest.raises(SystemExit):
        main([*options(made), "--memory", "1kB"])
    assert "a batch of 1 conversation has" in capsys.readouterr().err


def test_the_work_of_a_run_is_that_of_its_conversations(made):
    """Twice the epochs twice the work; with a cache the encoder's only once."""
    one, two, cached = (
        Sketch(SFT, settled(SFT, options(made, SFT, *settings)))
        for settings in (
            ["--num_train_epochs", "1"], ["--num_train_epochs", "2"],
            ["--num_train_epochs", "2", "--cache_vision_features", str(made / "cache")],
        )
    )  # fmt: skip
    assert one.conversations == 24 and two.flops == pytest.approx(2 * one.flops, rel=1e-3)
    assert two.flops - cached.flops == pytest.approx(24 * two.costs.encoding, rel=1e-3)
    assert cached.cache_bytes == 24 * 16 * 32 * (2 if cached.arguments.training.bf16 else 4)


def test_a_cache_has_the_encoder_out_of_memory(made):
    plain, cached = (
        Sketch(SFT, settled(SFT, options(made, SFT, *settings)))
        for settings in ([], ["--cache_vision_features", str(made / "cache")])
    )
    tower = 4 * sum(p.numel() for p in plain.model.model.vision_tower.parameters())
    saved = plain.rehearsed.held["weights"] - cached.rehearsed.held["weights"]
    assert saved == pytest.approx(tower, rel=0.05)


@pytest.mark.parametrize(
    "stage, said, wanted",
    [(SFT, (60, 25), (60, 25)), (PRETRAIN, (30, 30), (30, 30)), (PRETRAIN, (30, 9), (30, 30))],  # captions are learned
)
def test_what_stands_for_the_data_is_as_long_as_said(made, stage, said, wanted):
    sketch = Sketch(stage, settled(stage, options(made, stage, "--dataset", "/nowhere")), stand_in=StandIn(*said))
    found = sketch.rehearsed
    record = found.account.records[0]
    assert (record.tokens - record.image_tokens, record.supervised) == pytest.approx(wanted, abs=2)
    assert found.views == len(found.account.records) == 4
    assert "No data were read" in sketch.described and sketch.flops is None


def test_the_estimate_is_told_in_full(made, capsys):
    main([*options(made), "--peak", "1", "--utilisation", "0.5", "--max_steps", "1000", "--devices", "2"])
    shown = capsys.readouterr().out
    for part in ("Stage 2", "projector", "optimizer", "activations", "logits", "at the peak", "Not in it", "cached",
                 "TFLOP for 8,000 conversations", "hours at 50% of 1 TFLOP/s on each of 2 devices"):  # fmt: skip
        assert part in shown


def test_what_ends_the_command_is_not_taken_for_a_step_that_cannot_be_run(made, monkeypatch, capsys):
    """SIGTERM is whoever's it was before, as there is nothing to be saved, and Ctrl-C ends it with its code."""

    class Told(BaseException):
        pass

    def told(*given):
        raise Told

    monkeypatch.setattr(rehearsal._Between, "on_step_end", lambda *given, **more: signal.raise_signal(number))
    handlers = {signal.SIGTERM: told, signal.SIGINT: signal.default_int_handler}  # which a shell may have ignored
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        number = signal.SIGTERM
        with pytest.raises(Told):
            main(options(made))
        number = signal.SIGINT
        with pytest.raises(SystemExit) as ended:
            main(options(made))
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    assert ended.value.code == 130 and "shapes alone" not in capsys.readouterr().err


def test_stage_2_is_estimated_before_stage_1_has_run(made, tmp_path, capsys):
    """Its model is the one that the same recipe makes."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
eval_share: 0
pretrain:
  dataset: {made / "captions.jsonl"}
  vision_model: {made / "vision"}
  text_model: {made / "text"}
  output_dir: {tmp_path / "one"}
sft:
  dataset: {made / "dialogues.jsonl"}
  model: {tmp_path / "one"}
  tune_text: last:2
  output_dir: {tmp_path / "two"}
"""
    )
    main([str(recipe)])
    shown = capsys.readouterr().out
    assert "Stage 1" in shown and "Stage 2" in shown and not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    "text, size", [("24GB", 24e9), ("1.5GiB", 1.5 * 2**30), ("512mb", 512e6), ("1000", 1000), ("2K", 2000)]
)
def test_sizes_are_read(text, size):
    assert bytes_of(text) == size


def test_the_steps_are_those_of_the_run_s_own_trainer(made, monkeypatch):
    seen = []
    step = VLMTrainer.training_step
    monkeypatch.setattr(VLMTrainer, "training_step", lambda self, *a, **k: seen.append(1) or step(self, *a, **k))
    found = Sketch(SFT, settled(SFT, options(made, SFT, "--gradient_accumulation_steps", "4"))).rehearsed
    assert found.peak.total() and len(seen) == 4  # two steps of two micro-batches


# What is said on the command line.


def told(capsys, *argv):
    main(list(argv))
    return capsys.readouterr().out


def refused(capsys, *argv):
    with pytest.raises(SystemExit):
        main(list(argv))
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.slow
def test_a_recipe_is_read_alike_however_it_is_named(made, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"dataset: {made / 'captions.jsonl'}\nbf16: false\neval_share: 0\n"
        f"pretrain: {{vision_model: {made / 'vision'}, text_model: {made / 'text'}, output_dir: {tmp_path / 'one'}}}\n"
    )
    first, *others = (
        told(capsys, *named) for named in ([str(recipe)], ["--config", str(recipe)], [f"--config={recipe}"])
    )
    assert "Stage 1" in first and "Stage 2" not in first and "fp32" in first
    assert others == [first, first]


@pytest.mark.parametrize(
    "option, value",
    [
        ("utilisation", "40"), ("utilisation", "0"), ("utilisation", "nan"), ("peak", "inf"), ("peak", "-1"),
        ("devices", "0"), ("samples", "-3"), ("memory", "0"), ("memory", "-5GB"), ("tokens_per_sample", "80/180"),
        ("tokens_per_sample", "0"), ("per_device_train_batch_size", "0"), ("config", ""),
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_is_one_line(made, capsys, option, value):
    line = refused(capsys, *options(made), f"--{option}={value}")
    assert option in line and value in line


def test_a_peak_has_to_be_finite_and_the_line_says_so(made, capsys):
    assert "--peak inf: expected a finite number above 0" in refused(capsys, *options(made), "--peak", "inf")


def test_an_estimate_of_nothing_that_is_named_is_refused(capsys):
    assert "no recipe is named" in refused(capsys, "--memory", "24GB", "--peak", "312")


REFUSED = {
    "parameters of the vision encoder train": ["--tune_vision", "last:1", "--cache_vision_features", "cache"],
    "a stream has no end": [*STREAMED, "--cache_vision_features", "cache"],
    "positions and max_tokens_per_batch is 20": ["--max_tokens_per_batch", "20"],
    "padding_free=on cannot be: torch_compile": ["--padding_free", "on", "--torch_compile", "true"],
    "--frozen_dtype bfloat16: this run computes in float32": ["--bf16", "false", "--frozen_dtype", "bfloat16"],
    "dataloader_drop_last leaves nothing to learn from": [
        "--dataloader_drop_last",
        "true",
        "--per_device_train_batch_size",
        "25",
    ],
    "--frozen_dtype bfloat16: this run casts to float16": ["--fp16", "true", "--frozen_dtype", "bfloat16"],
    "frozen_dtype='float32': expected one of auto": ["--fp16", "true", "--frozen_dtype", "float32"],
    "24 conversations of a batch of 32": ["--dataloader_drop_last", "true", "--devices", "8"],
    "dtype='int7'": ["--dtype", "int7"],
    "but not both": ["--bf16", "true", "--fp16", "true"],
    "room for 240 tokens of text": ["--tokens_per_sample", "241/50"],
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_a_run_refuses_the_estimate_refuses(made, capsys, says):
    assert says in refused(capsys, *options(made), *REFUSED[says])


def test_an_encoder_has_to_be_named_as_for_a_run(made, capsys):
    argv = ["--text_model", str(made / "text"), "--dataset", str(made / "dialogues.jsonl"), "--output_dir", "out"]
    assert "no model is named" in refused(capsys, *argv)


@pytest.mark.parametrize("data", [[], STREAMED, [*STREAMED, "--max_tokens_per_batch", "99"]])
def test_data_of_which_nothing_can_be_learned_are_refused(made, tmp_path, capsys, data):
    rows = [{"image": "0.png", "caption": None}] * 1100
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [*options(made, PRETRAIN, *data), "--dataset", str(tmp_path / "rows.jsonl"), "--stage", "pretrain"]
    assert "there is nothing to learn from" in refused(capsys, *argv)


def rows_file(made, folder, *parts):
    """Captions, so many of each kind; `None` is learned from by nobody."""
    rows = [{"image": f"{n % 20}.png", "caption": caption} for caption, count in parts for n in range(count)]
    file = folder / f"{len(list(folder.iterdir()))}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for n in range(20):
        if not (folder / f"{n}.png").exists():
            shutil.copy(made / f"{n}.png", folder)
    return str(file)


def sketch_of(made, *others):
    return Sketch(PRETRAIN, settled(PRETRAIN, options(made, PRETRAIN, *others)))


def test_a_sample_in_which_nothing_of_a_source_is_learned_does_not_refuse_all_of_it(made, tmp_path):
    """The rows between those that are read may be others; a source that was read whole has none."""
    good, sparse = rows_file(made, tmp_path, ("a cat", 40)), rows_file(made, tmp_path, (None, 600), ("a cat", 1))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"datasets: [{{path: {good}}}, {{path: {sparse}}}]\n")
    argv = options(made, PRETRAIN)
    at = argv.index("--dataset")
    argv[at : at + 2] = ["--config", str(recipe)]
    assert Sketch(PRETRAIN, settled(PRETRAIN, argv)).rehearsed.conversations == 40


def test_what_is_refused_of_a_sample_says_that_it_is_one(made, tmp_path, capsys):
    argv = options(made, PRETRAIN, "--dataset", rows_file(made, tmp_path, (None, 1100)), "--stage", "pretrain")
    assert "there is nothing to learn from in a sample of 512: " in refused(capsys, *argv)


@pytest.mark.slow
def test_conversations_of_which_nothing_is_learned_are_no_work(made, tmp_path):
    half, whole = (rows_file(made, tmp_path, ("a cat", 40), (None, dropped)) for dropped in (40, 0))
    one, other = (sketch_of(made, "--dataset", data, "--num_train_epochs", "1") for data in (half, whole))
    assert one.conversations == other.conversations == 40 and one.flops == other.flops
    assert "80 conversations" in one.described


@pytest.mark.slow
def test_batches_of_which_nothing_is_learned_are_steps_of_a_run(made, tmp_path):
    """A batch of one of two rows, of which one is learned: as many steps hold half as many conversations."""
    half, whole = (rows_file(made, tmp_path, ("a cat", 40), (None, dropped)) for dropped in (40, 0))
    argv = [*STREAMED[:2], "--max_steps", "100", "--per_device_train_batch_size", "1"]
    one, other = (sketch_of(made, *argv, "--dataset", data) for data in (half, whole))
    assert other.conversations == 100 and 35 <= one.conversations <= 65
    assert one.flops == pytest.approx(other.flops * one.conversations / 100, rel=1e-2)


def test_each_of_two_streams_is_read_for_its_lengths(made, tmp_path):
    short, long = rows_file(made, tmp_path, ("a cat", 1100)), rows_file(made, tmp_path, ("a cat " * 30, 1100))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"datasets: [{{path: {short}}}, {{path: {long}}}]\n")
    argv = options(made, PRETRAIN, *STREAMED, "--max_tokens_per_batch", "400")
    at = argv.index("--dataset")
    argv[at : at + 2] = ["--config", str(recipe)]
    sketch = Sketch(PRETRAIN, settled(PRETRAIN, argv))
    lengths = sketch._lengths(512)
    assert len(set(lengths)) == 2 and lengths.count(min(lengths)) == lengths.count(max(lengths)) == 256
    assert sketch.least_batch() == max(lengths)


def test_batches_of_positions_are_not_dropped_for_their_number(made):
    argv = options(made, SFT, "--max_tokens_per_batch", "200", "--dataloader_drop_last", "true")
    assert Sketch(SFT, settled(SFT, argv), devices=100).rehearsed.batches


def test_no_batch_is_proposed_of_which_dropping_the_last_leaves_none(made):
    argv = options(made, SFT, "--dataloader_drop_last", "true")
    assert Sketch(SFT, settled(SFT, argv), devices=3).most_batch() == 8


@pytest.mark.parametrize("options_of_workers", [["--dataloader_persistent_workers", "true"],
                                                ["--dataloader_prefetch_factor", "4"]])  # fmt: skip
def test_a_recipe_is_taken_whatever_cores_this_machine_has(made, monkeypatch, options_of_workers):
    """Workers that the recipe does not count are as many as the machine has a use for."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert settled(SFT, options(made, SFT, *options_of_workers)).training.dataloader_num_workers == 0


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_the_precision_that_was_asked_for_is_told(made, capsys, kind):
    assert f"supervised; {kind}, " in told(capsys, *options(made), f"--{kind}", "true")


@pytest.mark.parametrize("budget", [[], ["--max_tokens_per_batch", "99", "--shuffle_buffer", "10"]])
def test_a_stream_whose_first_rows_are_dropped_is_known_by_its_others(made, tmp_path, budget):
    rows = [{"image": "0.png", "caption": None}] * 700 + [
        {"image": f"{n % 20}.png", "caption": "a cat"} for n in range(99)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [*options(made, PRETRAIN, *STREAMED, *budget), "--dataset", str(tmp_path / "rows.jsonl")]
    sketch = Sketch(PRETRAIN, settled(PRETRAIN, argv))
    assert sketch.rehearsed.conversations > 0 and sketch.rehearsed.peak["activations"]
    assert sketch.least_batch() > 0 < sketch.most_batch()


def test_prefixes_are_shared_where_a_whole_step_of_the_run_has_images_enough(made):
    """In a step are all micro-batches of all devices, though no more than two are rehearsed."""
    settings = options(made, PRETRAIN)
    for others, devices, shared in (([], 1, False), (["--gradient_accumulation_steps", "4"], 1, True), ([], 4, True)):
        sketch = Sketch(PRETRAIN, settled(PRETRAIN, [*settings, *others]), devices=devices)
        assert ("begin with run once" in sketch.rehearsed.savings) == shared


@pytest.mark.slow
def test_half_precision_of_either_kind_takes_the_same(made):
    kinds = (["--fp16", "true", "--frozen_dtype", "float16"], ["--bf16", "true", "--frozen_dtype", "bfloat16"])
    one, other = (Sketch(SFT, settled(SFT, options(made, SFT, *kind))).rehearsed for kind in kinds)
    assert one.peak == other.peak


@pytest.mark.slow
def test_an_encoder_of_other_channels_is_estimated(made, tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32,
                       patch_size=8, num_channels=1)  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    argv = options(made, PRETRAIN, "--vision_model", str(tmp_path), "--text_model", str(made / "text"))[2:]
    for cache in ([], ["--cache_vision_features", str(tmp_path / "cache")]):
        assert Sketch(PRETRAIN, settled(PRETRAIN, [*argv, *cache])).rehearsed.views


WORKERS = [
    "--dataloader_num_workers",
    "2",
    "--dataloader_prefetch_factor",
    "2",
    "--dataloader_persistent_workers",
    "true",
]


@pytest.mark.parametrize(
    "settings", [WORKERS, ["--eval_on_start", "true", "--eval_share", "0.1"]], ids=["workers", "start"]
)
def test_what_only_a_whole_run_does_is_no_part_of_two_steps(made, settings):
    one, other = (
        Sketch(SFT, settled(SFT, options(made, SFT, *more))).rehearsed
        for more in (settings, settings[-2:] * ("0.1" in settings))
    )
    assert one.peak == other.peak and one.peak.total()
