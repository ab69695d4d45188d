"""How a run ends: the weights first, then everything else by itself; answers called greedy are greedy."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import train_pretrain
import train_sft
from evaluation_vlm.judgement import Judgement
from inference_vlm.answering import Prompt, answer, greedy
from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.generation_vlm import savable
from tests import tiny
from training_vlm import finish
from training_vlm.learning import publishing
from training_vlm.learning.checkpoints import UNFINISHED, discard_unfinished, find_checkpoint, replace_files
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.model_card import RunCard


ROOT = Path(__file__).parents[1]
QUICK = [
    "--use_cpu", "--bf16", "False", "--max_steps", "2", "--per_device_train_batch_size", "4", "--max_new_tokens", "4",
    "--logging_steps", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "True",
]  # fmt: skip
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
SHIPPED = {
    "sampling": SAMPLING,
    "a temperature without do_sample": {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "pad_token_id": 0},
    "a temperature beside do_sample=false": {"do_sample": False, "temperature": 0.6},
    "beams without beams": {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5},
    "penalties and words": {
        "no_repeat_ngram_size": 2, "bad_words_ids": [[5]], "forced_eos_token_id": 0, "min_new_tokens": 2,
        "transformers_version": "4.20.0", "eos_token_id": [0, 2],
    },
    "outputs": {"output_scores": True, "pad_token_id": -1},
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """Twelve captioned pictures, and the arguments that name them."""
    rows = []
    for number in range(12):
        Image.new("RGB", (24, 24), (20 * number, 9, 99)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"picture {number}"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset", str(tmp_path / "rows.jsonl")]


@pytest.fixture
def backbones(folders, tmp_path):
    """`backbones(generation)` are arguments that name a pair whose language model ships these settings."""

    def named(generation=None):
        vision, text = folders("vit-gpt2")
        if generation is not None:
            text = Path(shutil.copytree(text, tmp_path / "text"))
            (text / "generation_config.json").write_text(json.dumps(generation))
        return ["--vision_model", str(vision), "--text_model", str(text)]

    return named


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def saved_settings(folder):
    return json.loads((Path(folder) / "generation_config.json").read_text())


# -- settings of generation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if number > 1 else ()) for number, name in enumerate(SHIPPED)]
)
def test_no_settings_of_generation_stand_between_weights_and_the_disk(backbones, data, tmp_path, name):
    out = tmp_path / "out"
    train_pretrain.main([
        *backbones(SHIPPED[name]), *data, *QUICK, "--save_strategy", "steps", "--save_steps", "1", "--output_dir",
        str(out),
    ])  # fmt: skip
    for folder in (out / "checkpoint-1", out / "checkpoint-2", out):
        model, _ = load(folder)
        GenerationConfig.from_pretrained(folder).validate(strict=True)
        model.save_pretrained(tmp_path / "again")
    train_sft.main(["--model", str(out), *data, *QUICK, "--output_dir", str(tmp_path / "two")])
    assert (tmp_path / "two" / "README.md").is_file()


def test_sampling_defaults_are_kept_for_the_user_unless_told_otherwise(backbones, data, tmp_path):
    common = [*backbones(SAMPLING), *data, *QUICK]
    train_pretrain.main([*common, "--output_dir", str(tmp_path / "kept")])
    kept = saved_settings(tmp_path / "kept")
    assert {name: kept[name] for name in SAMPLING} == SAMPLING and kept["max_new_tokens"] == 4
    train_pretrain.main([*common, "--temperature", "0", "--output_dir", str(tmp_path / "greedy")])
    told = saved_settings(tmp_path / "greedy")
    assert told["do_sample"] is False and not {"temperature", "top_p", "top_k"} & told.keys()
    assert told["repetition_penalty"] == 1.05
    train_pretrain.main([*common, "--temperature", "1.5", "--output_dir", str(tmp_path / "warm")])
    told = saved_settings(tmp_path / "warm")
    assert (told["do_sample"], told["temperature"], told["top_p"], told["top_k"]) == (True, 1.5, 0.8, 20)
    train_pretrain.main([*common, "--num_beams", "2", "--output_dir", str(tmp_path / "beams")])
    told = saved_settings(tmp_path / "beams")
    assert (told["do_sample"], told["num_beams"]) == (False, 2)


def test_a_temperature_without_a_word_about_sampling_means_to_sample():
    config, left_out = savable(GenerationConfig(temperature=0.9))
    assert config.do_sample is True and config.temperature == 0.9 and not left_out
    config, left_out = savable(GenerationConfig(do_sample=False, temperature=0.9))
    assert config.do_sample is False and left_out == ["temperature"]


def test_a_users_own_settings_do_not_stand_in_the_way_of_saving(composed, tmp_path, caplog):
    model, _ = composed
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = torch.tensor([2])  # which is no JSON
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 10_000
    assert saved_settings(tmp_path)["do_sample"] is False


def test_greedy_answers_inherit_nothing_but_token_ids(composed):
    model, processor = composed
    ids = processor.tokenizer("the cat is", add_special_tokens=False)["input_ids"]
    questions = [Prompt(ids, [])] * 2
    # Rows of the embedding that are no token, and blanks, would leave nothing to read.
    silent = [id for id in range(model.config.text_config.vocab_size) if not processor.tokenizer.decode([id]).strip()]

    def asked():
        config = greedy(model, processor, 12)
        config.suppress_tokens = sorted({*config.suppress_tokens, *processor.tokenizer.all_special_ids, *silent})
        return answer(model, processor, questions, 2, config)

    expected = asked()
    assert expected[0] == expected[1] != ""
    own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=50.0, no_repeat_ngram_size=1, min_new_tokens=12,
        bad_words_ids=[[id] for id in processor.tokenizer(expected[0], add_special_tokens=False)["input_ids"]],
        forced_eos_token_id=5, num_return_sequences=2, max_length=3,
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=model.generation_config.pad_token_id,
        suppress_tokens=list(range(10, 60)), custom_setting=1,
    )  # fmt: skip
    model.generation_config = own
    assert asked() == expected
    assert model.generation_config is own


@pytest.mark.parametrize(
    "told",
    [["--max_new_tokens", "0"], ["--temperature", "-1"], ["--top_p", "1.5"], ["--num_beams", "0"],
     ["--temperature", "0", "--top_p", "0.9"]],
)  # fmt: skip
def test_settings_of_generation_that_cannot_be_are_known_before_training(backbones, data, tmp_path, capsys, told):
    with pytest.raises(SystemExit):
        train_pretrain.main([*backbones(), *data, *QUICK, *told, "--output_dir", str(tmp_path / "out")])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and told[-2].removeprefix("--") in line
    assert not (tmp_path / "out").exists()


# -- positions -------------------------------------------------------------------------------------------------------


def test_answers_are_as_long_as_positions_allow(folders, capsys):
    model, processor = tiny.compose(*folders("vit-gpt2"), "cls")
    word = processor.tokenizer(" cat", add_special_tokens=False)["input_ids"][0]
    lengths = [3, 95, 126, 127, 128, 200]
    config = greedy(model, processor, 64)
    config.suppress_tokens = sorted({*config.suppress_tokens, 0})  # without an end
    config.eos_token_id = None
    questions = [Prompt([word] * length, []) for length in lengths]
    written = {}
    real = processor.tokenizer.decode
    processor.tokenizer.decode = lambda ids, **options: written.setdefault(len(written), len(ids)) and real(ids) or ""
    together = answer(model, processor, questions, 6, config)
    assert sorted(written.values()) == [0, 0, 1, 2, 33, 64]
    assert together[4:] == ["", ""] and "2 of 6 questions fill all 128 positions" in capsys.readouterr().out
    processor.tokenizer.decode = real
    together = answer(model, processor, questions, 6, config)
    assert together == [answer(model, processor, [one], 1, config)[0] for one in questions]


def test_a_run_with_prompts_of_nearly_all_positions_ends_well(backbones, tmp_path, capsys):
    rows = []
    for number in (60, 95, 110, 124, 125, 126):
        said = [{"role": "user", "content": "a" * number}, {"role": "assistant", "content": "yes"}]
        rows.append({"messages": said})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_sft.main([
        *backbones(), "--dataset", str(tmp_path / "rows.jsonl"), *QUICK, "--max_new_tokens", "64", "--test_split",
        "train", "--eval_split", "train", "--tune_text", "full", "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert "exactly right" in capsys.readouterr().out
    assert (tmp_path / "out" / "samples.png").is_file()


# -- the weights first -----------------------------------------------------------------------------------------------


def broken(*args, **kwargs):
    raise RuntimeError("it broke on purpose")


AFTER = {
    "the evaluation": (VLMTrainer, "evaluate"),
    "writing the metrics": (VLMTrainer, "save_metrics"),
    "the account of the data": (finish, "write_data_report"),
    "the test questions": (Judgement, "by_name"),
    "the samples": (finish._Answers, "ask_samples"),
    "samples.html and samples.png": (finish, "draw_gallery"),
    "the model card": (RunCard, "text"),
}


@pytest.mark.parametrize("what", AFTER)
def test_what_fails_after_the_weights_costs_itself_alone(backbones, data, tmp_path, monkeypatch, capsys, what):
    monkeypatch.setattr(*AFTER[what], broken)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        train_pretrain.main([
            *backbones(), *data, *QUICK, "--save_strategy", "no", "--eval_split", "train[:4]", "--test_split",
            "train[:3]", "--output_dir", str(out),
        ])  # fmt: skip
    assert stopped.value.code == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert f"error: {what} failed: it broke on purpose" in lines
    assert "Traceback" in said.err  # of what is no person's mistake
    load(out)
    assert (out / "README.md").is_file() == (what != "the model card")
    assert (out / "samples.png").is_file() == (what != "the samples")
    assert not (out / "_unfinished").exists()


def test_the_weights_are_on_disk_before_the_last_evaluation_and_checkpoint(backbones, data, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def seen(self, *args, **kwargs):
        if self.state.global_step == 2:
            load(out)
            raise RuntimeError("as evaluated")
        return evaluate(self, *args, **kwargs)

    evaluate = VLMTrainer.evaluate
    monkeypatch.setattr(VLMTrainer, "evaluate", seen)
    common = [*backbones(), *data, *QUICK, "--eval_split", "train[:4]", "--output_dir", str(out)]
    with pytest.raises(RuntimeError, match="as evaluated"):
        train_pretrain.main([*common, "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "no"])
    load(out)


@pytest.mark.parametrize("saving", [("no",), ("steps", "--save_steps", "2")], ids="-".join)
def test_what_fails_in_the_middle_costs_no_step_that_was_made(backbones, data, tmp_path, monkeypatch, capsys, saving):
    out = tmp_path / "out"

    def seen(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise RuntimeError("as evaluated")
        return evaluate(self, *args, **kwargs)

    evaluate = VLMTrainer.evaluate
    monkeypatch.setattr(VLMTrainer, "evaluate", seen)
    common = [*backbones(), *data, *QUICK, "--max_steps", "4", "--eval_split", "train[:4]", "--eval_strategy", "steps"]
    common += ["--eval_steps", "1", "--save_strategy", *saving, "--output_dir", str(out)]
    with pytest.raises(RuntimeError, match="as evaluated"):
        train_pretrain.main(common)
    assert f"What was learned until then is in {out / 'checkpoint-3'}" in capsys.readouterr().out
    load(out / "checkpoint-3")
    monkeypatch.undo()
    train_pretrain.main([*common, "--resume_from_checkpoint", "last"])
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4


def test_what_fails_in_the_middle_of_a_step_is_not_saved_as_the_one_before(backbones, data, tmp_path, monkeypatch):
    """As where a worker dies while the optimizer moves: some weights are of the next step."""
    out = tmp_path / "out"

    def broken(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        if self.param_groups[0]["params"][0].grad is not None and (calls := calls_of.append(0) or len(calls_of)) == 2:
            raise RuntimeError(f"in step {calls}")

    stock, calls_of = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    common = [*backbones(), *data, *QUICK, "--max_steps", "4", "--save_strategy", "no", "--output_dir", str(out)]
    with pytest.raises(RuntimeError, match="in step 2"):
        train_pretrain.main(common)
    assert not list(out.glob("checkpoint-*"))


def test_what_the_trainer_refuses_is_one_line(backbones, data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for told, out in ((["--fsdp", "full_shard"], "out"), (["--push_to_hub", "True"], "out"), ([], "file")):
        with pytest.raises(SystemExit):
            train_pretrain.main([*backbones(), *data, *QUICK, *told, "--output_dir", str(tmp_path / out)])
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)


def test_a_run_that_diverges_leaves_nothing_new(backbones, data, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        train_pretrain.main([
            *backbones(), *data, *QUICK, "--max_steps", "20", "--learning_rate", "1e30", "--tune_text", "full",
            "--save_strategy", "no", "--output_dir", str(out),
        ])  # fmt: skip
    assert "nothing was saved of it" in capsys.readouterr().err and not list(out.glob("checkpoint-*"))


def test_the_best_checkpoint_is_what_is_saved(backbones, data, tmp_path):
    """The loss of each next checkpoint is worse than the first's."""
    out = tmp_path / "out"
    train_pretrain.main([
        *backbones(), *data, *QUICK, "--max_steps", "3", "--learning_rate", "10", "--max_grad_norm", "0", "--tune_text",
        "full", "--eval_split", "train[:4]", "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy",
        "steps", "--save_steps", "1", "--load_best_model_at_end", "True", "--output_dir", str(out),
    ])  # fmt: skip
    state = json.loads((out / "trainer_state.json").read_text())
    best = VLMForConditionalGeneration.from_pretrained(out / state["best_model_checkpoint"]).state_dict()
    last = VLMForConditionalGeneration.from_pretrained(out / "checkpoint-3").state_dict()
    found = VLMForConditionalGeneration.from_pretrained(out).state_dict()
    assert state["best_global_step"] < 3
    assert all(torch.equal(found[name], best[name]) for name in best)
    assert any(not torch.equal(found[name], last[name]) for name in best)


def test_a_model_that_was_there_before_stays_until_the_new_one_is_whole(composed, tmp_path, monkeypatch):
    model, processor = composed
    model.save_pretrained(tmp_path, max_shard_size="50kB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert "model.safetensors.index.json" in before
    from training_vlm.training_arguments import VLMTrainingArguments

    args = VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = VLMTrainer(model=model, args=args, processing_class=processor)
    with torch.no_grad():
        model.lm_head.weight.fill_(0.5)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", broken)
    monkeypatch.setattr("training_vlm.learning.checkpoints.save_torch_model", broken)
    with pytest.raises(RuntimeError):
        trainer.save_model()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    monkeypatch.undo()
    trainer.save_model()
    assert not list(tmp_path.glob("*index.json")) and not list(tmp_path.glob("model-0*"))
    again = VLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


WHOLE = ["config.json", "model.safetensors", "tokenizer.json"]
SHARDS = ["config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "templates/one.jinja"]


def opened(folder):
    """What a model's files hold that is found in a folder, as libraries look for it; `None` where none is."""
    names = [name for name in ADAPTER[:2] if (folder / name).is_file()]
    if ADAPTER[0] not in names:
        if not (folder / "config.json").is_file():
            return None
        sharded = not (folder / "model.safetensors").is_file()
        names = ["config.json", *(SHARDS[1:] if sharded else WHOLE[1:2])]
    found = [(folder / name).read_text() if (folder / name).is_file() else None for name in names]
    return None if None in found else set(found)


@pytest.mark.parametrize("new", [WHOLE, SHARDS, ADAPTER], ids=["whole", "shards", "adapter"])
@pytest.mark.parametrize("old", [WHOLE, SHARDS, ADAPTER], ids=["whole", "shards", "adapter"])
def test_a_model_is_never_half_of_one_and_half_of_another_and_the_next_start_makes_it_whole(
    tmp_path, monkeypatch, old, new
):
    """A kill comes before each change of the folder in turn."""

    def saved(folder, names, content):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)

    def counted(change):
        def changed(*args, **kwargs):
            done.append(change)
            if len(done) > before:
                raise KeyboardInterrupt
            return change(*args, **kwargs)

        return changed

    seen = []
    for before in range(100):
        folder, done = tmp_path / str(before), []
        saved(folder, old, "old")
        saved(folder / UNFINISHED / "model", new, "new")
        with monkeypatch.context() as patch:
            for where, name in ((os, "replace"), (Path, "unlink"), (shutil, "rmtree")):
                patch.setattr(where, name, counted(getattr(where, name)))
            with contextlib.suppress(KeyboardInterrupt):
                replace_files(folder / UNFINISHED / "model", folder)
        seen.append(opened(folder))
        find_checkpoint(None, folder)
        discard_unfinished(folder)
        assert opened(folder) == ({"new"} if before else {"old"})
        if len(done) <= before:
            break
    assert seen[0] == {"old"} and seen[-1] == {"new"} and all(found in (None, {"old"}, {"new"}) for found in seen)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *new, *(name for name in old if "model" not in name and name != ADAPTER[0])
    }  # fmt: skip


@pytest.fixture
def pushed(monkeypatch):
    """What happens to the processes of a run, and its pushes, which go nowhere."""
    happened, part = [], Accelerator.end_training
    monkeypatch.setattr(VLMTrainer, "init_hf_repo", lambda self, *_, **__: vars(self).update(hub_model_id="me/it"))
    monkeypatch.setattr(publishing, "push", lambda files, *_, **__: happened.append(sorted(files)))
    monkeypatch.setattr(Accelerator, "end_training", lambda self: happened.append("parted") or part(self))
    return happened


def test_no_process_waits_for_the_last_push(backbones, data, tmp_path, pushed):
    """It may take longer than a group of processes lets one wait."""
    command = [*backbones(), *data, *QUICK, "--push_to_hub", "True", "--hub_strategy", "end"]
    train_pretrain.main([*command, "--output_dir", str(tmp_path / "out")])
    parted, files = pushed
    assert parted == "parted" and {"README.md", "model.safetensors", "training.png"} <= set(files)


# A run whose later point waits for ever in one process, after it has said so.
WAITING = """
import sys, time
from pathlib import Path
import training_vlm.finish as finish
def wait(*args, **kwargs):
    Path(sys.argv[1], "waiting").touch()
    time.sleep(600)
finish.ask = wait
import train_pretrain
train_pretrain.main(sys.argv[2:])
"""

FAILING = """
import os, sys
from training_vlm.learning.trainer import VLMTrainer
def fail(self, *args, **kwargs):
    if os.environ["RANK"] == "1":
        raise RuntimeError("one process broke")
    return evaluate(self, *args, **kwargs)
evaluate, VLMTrainer.evaluate = VLMTrainer.evaluate, fail
import train_pretrain
train_pretrain.main(sys.argv[1:])
"""


# A run whose pushes, of a checkpoint and of the model, take longer than one process may wait for another.
PUSHING = """
import sys, time
import training_vlm.learning.publishing as publishing
def push(files, *args, **kwargs):
    if files:
        time.sleep(50)
        print("pushed", len(files), flush=True)
publishing.push = push
def init(self, *args, **kwargs):
    self.hub_model_id = "me/it"
publishing.PublishingTrainer.init_hf_repo = init
import train_pretrain
train_pretrain.main(sys.argv[1:])
"""


def environment(tmp_path):
    return {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_a_run_killed_after_training_leaves_a_folder_that_loads(backbones, data, tmp_path):
    (tmp_path / "killed.py").write_text(WAITING)
    out = tmp_path / "out"
    command = [sys.executable, "killed.py", str(tmp_path), *backbones(), *data, *QUICK, "--output_dir", str(out)]
    run = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not (tmp_path / "waiting").exists():
        assert run.poll() is None and time.time() < deadline, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stderr.close()
    load(out)


def test_a_failure_in_one_of_two_processes_does_not_hang_the_other(backbones, data, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "failing.py", *backbones(), *data, *QUICK, "--eval_split", "train[:4]", "--output_dir"]
    done = subprocess.run(
        [*command, str(out)], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=150
    )
    assert done.returncode != 0
    assert "error: the evaluation failed: one process broke" in done.stderr
    load(out)


@pytest.mark.slow
def test_pushes_may_take_longer_than_two_processes_wait_for_each_other(backbones, data, tmp_path):
    (tmp_path / "pushing.py").write_text(PUSHING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "pushing.py"]
    command = [
        *launcher, *backbones(), *data, *QUICK, "--push_to_hub", "True", "--save_strategy", "steps", "--save_steps",
        "1", "--ddp_timeout", "30", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("pushed") >= 2
