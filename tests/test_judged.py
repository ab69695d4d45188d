"""Evaluation and test data are judged before training: what was asked for is done, or refused in a line."""

import json
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

import train_sft
from processing.reading.rows import hold_out
from training_vlm.learning.trainer import VLMTrainer


QUICK = [
    "--use_cpu", "--bf16", "False", "--max_steps", "2", "--per_device_train_batch_size", "4", "--max_new_tokens", "4",
    "--logging_steps", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "True",
]  # fmt: skip
EVERY_STEP = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1",
              "--load_best_model_at_end", "True"]  # fmt: skip
AHEAD = pytest.mark.parametrize("ahead", ["True", "False"])


def dialogue(image=None, answer="a cat", **more):
    said = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": answer}]
    return {**({} if image is None else {"image": image}), "messages": said, **more}


@pytest.fixture
def write(tmp_path):
    """`write(name, rows)` is the file of these rows, beside ten pictures `0.png` to `9.png`."""
    for number in range(10):
        Image.new("RGB", (16, 16), (25 * number, 0, 0)).save(tmp_path / f"{number}.png")

    def rows_in(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return rows_in


@pytest.fixture
def good(write):
    return write("train.jsonl", [dialogue(f"{number % 10}.png") for number in range(40)])


@pytest.fixture
def run(folders, tmp_path):
    """`run(*argv)` trains two steps into `tmp_path / "out"`."""
    vision, text = folders("vit-gpt2")
    names = ["--vision_model", str(vision), "--text_model", str(text), "--vision_feature_select_strategy", "cls"]
    return lambda *argv: train_sft.main([*names, *QUICK, *map(str, argv), "--output_dir", str(tmp_path / "out")])


@pytest.fixture
def refused(run, capsys, monkeypatch):
    """`refused(*argv)` is the one line with which a run ends before its first step."""

    def no_step(*args, **kwargs):
        raise AssertionError("a step was done")

    monkeypatch.setattr(VLMTrainer, "training_step", no_step)

    def ends(*argv):
        with pytest.raises(SystemExit) as stopped:
            run(*argv)
        assert stopped.value.code == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return ends


@pytest.fixture
def parts(tmp_path, write):
    """`parts(evaluation=rows)` is a folder whose splits are forty good rows and those named."""

    def folder(**splits):
        at = tmp_path / "parts"
        at.mkdir(exist_ok=True)
        for number in range(10):
            Image.new("RGB", (16, 16), (25 * number, 0, 0)).save(at / f"{number}.png")
        for name, rows in {"train": [dialogue(f"{n % 10}.png") for n in range(40)], **splits}.items():
            (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["--dataset", str(at), *(["--image_dir", str(at)])]

    return folder


BAD_ROWS = {
    "images that are missing": ([dialogue(f"gone-{n}.png") for n in range(4)], "gone-"),
    "malformed rows": ([{"messages": [{"role": "nobody", "content": "a"}], "image": "0.png"}] * 4, "malformed row"),
    "answers that do not fit": ([dialogue("0.png", question="x" * 4000) | {"messages": [
        {"role": "user", "content": "x" * 900}, {"role": "assistant", "content": "a"}]}] * 4, "max_length"),
    "no answers": ([{"image": "0.png", "messages": [{"role": "user", "content": "a"}]}] * 4, "no token of it"),
}  # fmt: skip


@AHEAD
@pytest.mark.parametrize("name", BAD_ROWS)
def test_an_evaluation_split_of_nothing_is_known_before_training(parts, refused, name, ahead):
    rows, words = BAD_ROWS[name]
    line = refused(*parts(validation=rows), "--eval_split", "validation", "--encode_ahead", ahead, *EVERY_STEP)
    assert words in line


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_test_split_of_nothing_is_known_before_training(parts, refused, name):
    rows, words = BAD_ROWS[name]
    line = refused(*parts(test=rows), "--test_split", "test")
    assert words in line and "ask" in line or words in line and "gone" in line


def test_a_streamed_evaluation_of_nothing_is_known_before_training(parts, refused):
    rows, words = BAD_ROWS["images that are missing"]
    assert words in refused(*parts(validation=rows), "--eval_split", "validation", "--streaming")


def test_one_bad_row_of_an_evaluation_costs_itself_alone(parts, run, tmp_path, capsys):
    rows = [dialogue("0.png"), dialogue("gone.png"), {"messages": "none"}, dialogue("1.png")]
    run(*parts(validation=rows, test=rows), "--eval_split", "validation", "--test_split", "test", *EVERY_STEP)
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] > 0
    assert "2 questions, greedy decoding" in said
    survey = said.split("test data")[1].split("conversations a step")[0]
    assert "1 dropped: malformed row" in survey and "1 dropped: missing image file" in survey and "gone.png" in survey


def test_a_test_image_that_breaks_later_costs_its_question_alone(parts, run, tmp_path, capsys):
    rows = [dialogue(f"{number}.png") for number in range(3)]
    argv = parts(test=rows)
    broken = tmp_path / "parts" / "2.png"
    Image.effect_noise((64, 64), 90).convert("RGB").save(broken)
    broken.write_bytes(broken.read_bytes()[:300])  # its header is there
    run(*argv, "--test_split", "test")
    said = capsys.readouterr().out
    assert "2 questions, greedy decoding" in said and f"a question is left out: {broken}" in said


def test_an_evaluation_with_nothing_left_gives_no_loss_and_no_best_model(parts, run, tmp_path, caplog):
    argv = parts(validation=[dialogue("0.png")])
    broken = tmp_path / "parts" / "0.png"
    Image.effect_noise((64, 64), 90).convert("RGB").save(broken)
    broken.write_bytes(broken.read_bytes()[:300])
    run(*argv, "--eval_split", "validation", *EVERY_STEP, "--load_best_model_at_end", "True")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] is None and state["best_metric"] is None
    assert not any("eval_loss" in entry for entry in state["log_history"])
    assert "eval_loss" not in (tmp_path / "out" / "eval_results.json").read_text()
    assert "eval_loss" not in (tmp_path / "out" / "README.md").read_text()
    assert "the evaluation gives no loss" in caplog.text


# -- what is held out ------------------------------------------------------------------------------------------------


def test_an_evaluation_that_was_asked_for_is_done_with_few_rows_too(good, run, tmp_path):
    run("--dataset", good, *EVERY_STEP)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert sum("eval_loss" in entry for entry in state["log_history"]) >= 2
    assert state["best_model_checkpoint"] is not None


def test_nothing_is_held_out_of_few_rows_where_nothing_was_asked(good, run, tmp_path):
    run("--dataset", good, "--num_train_epochs", "1", "--max_steps", "-1")
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["total"]["samples"] == 40 and not (tmp_path / "out" / "eval_results.json").exists()


def test_a_stream_holds_out_what_is_asked(good, run, tmp_path):
    run("--dataset", good, "--streaming", "--eval_share", "0.001", "--eval_strategy", "steps", "--eval_steps", "1")
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] > 0


def test_an_evaluation_without_rows_is_refused(good, write, refused):
    asked = ["--eval_strategy", "steps", "--eval_steps", "1"]
    line = refused("--dataset", good, *asked, "--eval_share", "0")
    assert "eval_strategy=steps" in line and "eval_share=0" in line and "--eval_split" in line
    line = refused("--dataset", good, *asked, "--streaming")
    assert "streamed" in line and "--eval_share" in line
    line = refused("--dataset", write("one.jsonl", [dialogue("0.png")]), *asked)
    assert "single training row" in line
    line = refused("--dataset", good, "--streaming", "--eval_on_start", "True")
    assert "eval_on_start=True" in line and "leave out --eval_on_start" in line


def test_an_evaluation_at_the_start_holds_out_a_row_for_it(good, run, tmp_path, capsys):
    run("--dataset", good, "--eval_on_start", "True")
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]["eval_loss"] > 0


def test_a_default_share_with_a_bad_row_does_not_end_the_run(write, run, tmp_path):
    """Of 150 rows one is held out, which nobody asked for."""
    rows = [dialogue("0.png")] * 150
    run("--dataset", write("many.jsonl", rows))
    assert (tmp_path / "out" / "eval_results.json").is_file()
    rows[held_out_row(150)] = dialogue("gone.png")
    run("--dataset", write("many.jsonl", rows), "--overwrite_output_dir")
    assert "eval_loss" not in (tmp_path / "out" / "eval_results.json").read_text()


def held_out_row(count):
    numbers = datasets.Dataset.from_dict({"number": list(range(count))})
    return hold_out(numbers, 0.01, 42)[1]["number"][0]


def test_every_source_of_several_is_looked_at(write, refused, tmp_path):
    bad = write("bad.jsonl", [dialogue("gone.png")] * 5)
    good = write("good.jsonl", [dialogue("0.png")] * 40)
    config = Path(tmp_path / "mix.yaml")
    config.write_text(yaml.safe_dump({"datasets": [{"path": good}, {"path": bad}]}))
    assert "gone.png" in refused("--config", config)
