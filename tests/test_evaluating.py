"""Finished models are judged on any data set from the shell; how sure a value is follows from its rows."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoProcessor

import evaluation_vlm.__main__ as evaluation
import train_pretrain
import train_sft
from evaluation_vlm.__main__ import main
from evaluation_vlm.compare import Draws, difference_of, groups_of, interval_of, sentence
from evaluation_vlm.predictions import Prediction, Scores, mean_scores
from evaluation_vlm.questions import Question
from evaluation_vlm.scores import words
from evaluation_vlm.scores.words import OWN_WORDS
from evaluation_vlm.writing import last_part
from inference_vlm.answering import Prompt


def predictions(rows) -> list[Prediction]:
    return [Prediction(Question(Prompt([1], []), ("a",), "all", "all", source="s", row=row), "a") for row in rows]


def test_an_interval_is_that_of_a_mean_over_rows():
    scores = np.random.default_rng(1).random(400)
    low, high = interval_of(mean_scores(scores.tolist()), Draws(predictions(range(400))))
    error = scores.std() / 20
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.2 * error)


def test_questions_of_one_row_are_drawn_together():
    once = np.random.default_rng(1).random(100)
    alone = interval_of(mean_scores(once.tolist()), Draws(predictions(range(100))))
    doubled = [score for score in once.tolist() for _ in range(4)]
    together = interval_of(mean_scores(doubled), Draws(predictions(row for row in range(100) for _ in range(4))))
    apart = interval_of(mean_scores(doubled), Draws(predictions(range(400))))
    assert together == pytest.approx(alone)  # asking the same thing four times tells nothing new
    assert apart.high - apart.low < 0.6 * (together.high - together.low)


def about(images, row=None) -> Prediction:
    return Prediction(Question(Prompt([1], images), ("a",), "all", "all", source="s", row=row), "a")


def test_questions_that_share_an_image_by_name_or_content_are_drawn_together():
    stored = [{"bytes": b"one", "path": "x"}, {"bytes": b"two", "path": "x"}, {"bytes": b"one", "path": None}]
    asked = [
        about(["a.png"], 0), about([stored[0]], 1), about([], 2), about(["b.png", "c.png"], 3), about([stored[1]], 4),
        about(["a.png"], 5), about([stored[2]], 6), about([], 7), about(["c.png"], 8), about([], 8), about([]),
    ]  # fmt: skip
    assert groups_of(asked) == [[0, 5], [1, 6], [2], [3, 8, 9], [4], [7], [10]]
    chained = [about(["a", "b"], 0), about(["c", "d"], 1), about(["e"], 2), about(["d", "b"], 3)]
    assert groups_of(chained) == [[0, 1, 3], [2]]


def test_an_interval_and_a_difference_are_wider_where_questions_share_images():
    once = np.random.default_rng(1).random(50)
    each = mean_scores([score for score in once.tolist() for _ in range(5)])
    none = mean_scores([0.0] * 250)
    shared = Draws([about([f"{number // 5}.png"], number) for number in range(250)])
    apart = Draws([about([f"{number}.png"], number) for number in range(250)])
    assert interval_of(each, shared) == pytest.approx(
        interval_of(mean_scores(once.tolist()), Draws(predictions(range(50))))
    )
    for found in (interval_of, lambda scores, draws: difference_of(scores, none, draws).interval):
        wide, narrow = found(each, shared), found(each, apart)
        assert narrow.high - narrow.low < 0.6 * (wide.high - wide.low)


def test_a_value_that_is_no_mean_is_drawn_by_its_own_rule():
    each = [1.0, 2.0, None, 4.0]
    scores = Scores(4.0, each, of=lambda numbers: float(max(each[number] for number in numbers)))
    assert interval_of(scores, Draws(predictions(range(4)))) == (1.0, 4.0)
    assert interval_of(Scores(4.0), Draws(predictions(range(4)))) is None


def test_the_same_draws_tell_two_models_apart_that_separate_ones_would_not():
    hard = np.random.default_rng(2).random(200)
    better, worse = mean_scores((hard + 0.02).tolist()), mean_scores(hard.tolist())
    draws = Draws(predictions(range(200)))
    assert interval_of(better, draws).low < interval_of(worse, draws).high
    found = difference_of(better, worse, draws)
    assert found.is_sure and found.value == pytest.approx(0.02)
    assert sentence("x", ".1%", found, ("one", "two")).startswith(
        "x: one is ahead of two (+2.0%, 95 %: +2.0% to +2.0%)"
    )
    same = difference_of(worse, worse, draws)
    assert not same.is_sure and "no difference can be told between one and two" in sentence(
        "x", ".1%", same, ("one", "two")
    )


@pytest.fixture
def saved(composed, tmp_path):
    """A saved model."""
    model, processor = composed
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rows(tmp_path, image):
    """A file of questions of several kinds and its images."""
    for number in range(4):
        image(number).save(tmp_path / f"{number}.png")
    (tmp_path / "own.py").write_text("def long(predictions):\n    return [len(p.answer) for p in predictions]\n")
    plain = [
        {"image": f"{n}.png", "question": "what?", "answer": "a cat", "kind": "k", "id": f"q{n}"} for n in range(3)
    ]
    dialogue = [{"role": role, "content": said} for role, said in [("user", "what?"), ("assistant", "red")] * 2]
    dialogue = [
        {"role": r, "content": c}
        for r, c in [("user", "a?"), ("assistant", "red"), ("user", "b?"), ("assistant", "two")]
    ]
    others = [
        {"image": "3.png", "question": "which?", "choices": ["red", "blue"], "answer": 1},
        {"image": "0.png", "question": "is it?", "answers": ["yes"] * 7 + ["no"] * 3},
        {"image": "missing.png", "question": "what?", "answer": "a cat"},
        {"image": "0.png", "question": "what?", "answer": None},
    ]
    files = {"plain": plain, "mixed": plain + others, "dialogue": [{"image": "1.png", "messages": dialogue}]}
    for name, of_file in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    return tmp_path


def run(*argv) -> int:
    return main([*map(str, argv), "--max_new_tokens", "4", "--batch_size", "3"])


def test_a_finished_model_is_judged_by_what_each_row_calls_for(saved, rows, capsys):
    out = rows / "out"
    assert run(saved, "--dataset", rows / "mixed.jsonl", "--output_dir", out) == 0
    results = json.loads((out / "results.json").read_text())
    (one,) = results["models"]
    assert one["questions"] == 5 and one["model"] == str(saved)
    assert {name: of["questions"] for name, of in one["metrics"].items()} == {
        "exact_match": 4, "multiple_choice": 1, "vqa_accuracy": 1,
    }  # fmt: skip
    assert all(0 <= of["interval"][0] <= of["value"] <= of["interval"][1] <= 1 for of in one["metrics"].values())
    assert (results["interval"]["seed"], results["interval"]["confidence"]) == (0, 0.95)
    assert results["interval"]["drawn"] == "images and rows" and one["groups"] == 4  # of five questions two share 0.png
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4] and lines[0]["id"] == "q0"
    assert lines[3]["choices"].keys() == {"A", "B"} and lines[4]["expected"] == ["yes"] * 7 + ["no"] * 3
    assert "<article" in (out / "samples.html").read_text()
    said = capsys.readouterr().out
    assert "missing.png" in said and "left out of the questions: 1 of 7 samples, such as" in said
    assert "vqa_accuracy 0.0% (95 %: 0.0% to 0.0%)" in said


def test_two_models_are_compared_on_the_same_questions(saved, rows, capsys):
    out = rows / "out"
    metrics = f"exact_match,anls,{rows / 'own.py'}:long"
    assert run(saved, saved, "--dataset", rows / "plain.jsonl", "--output_dir", out, "--metrics", metrics) == 0
    results = json.loads((out / "results.json").read_text())
    assert [len(results["models"]), *results["difference"]] == [2, "exact_match", "anls", "long"]
    assert not results["difference"]["long"]["is_sure"] and results["difference"]["long"]["value"] == 0
    assert capsys.readouterr().out.count("no difference can be told") == 3
    assert all((out / name / "predictions.jsonl").is_file() for name in ("first", "second"))


def test_every_answer_of_a_dialogue_is_a_question_and_its_row_one_draw(saved, rows):
    out = rows / "out"
    assert run(saved, "--dataset", rows / "dialogue.jsonl", "--output_dir", out) == 0
    (one,) = json.loads((out / "results.json").read_text())["models"]
    assert (one["questions"], one["groups"]) == (2, 1)


@pytest.mark.parametrize(
    "more, line",
    [
        (["--metrics", "cidre"], "metrics has 'cidre'; expected exact_match"),
        (["--metrics", "vqa_accuracy"], "metrics=vqa_accuracy: expected questions with four people's answers or more"),
        (["--max_samples", "0"], "max_samples=0: expected 1 or more"),
        (["--sample_seed", "-1", "--max_samples", "2"], "sample_seed=-1: expected 0 or more"),
        (["--metrics", "WRONG:score"], "cannot be read: SyntaxError"),
        (["--metrics", "EXITS:score"], "cannot be read: SystemExit"),
        (["--split", "nowhere"], "nowhere"),
        (["--columns", "question=frage"], "expected the column 'frage' that was given"),
        (["--image_dir", "EMPTY"], "no question was found in 3 rows"),
    ],
)
def test_a_mistake_is_one_line(saved, rows, capsys, more, line):
    (rows / "empty").mkdir()
    files = {"EMPTY": rows / "empty", "WRONG:score": f"{rows}/wrong.py:score", "EXITS:score": f"{rows}/exits.py:score"}
    (rows / "wrong.py").write_text("def score(:")
    (rows / "exits.py").write_text("raise SystemExit(3)")
    more = [str(files.get(word, word)) for word in more]
    assert run(saved, "--dataset", rows / "plain.jsonl", "--output_dir", rows / "out", *more) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ") and line in said.splitlines()[-1]
    assert not (rows / "out" / "results.json").exists()


def test_a_folder_that_is_no_model_and_a_third_model_are_one_line(rows, capsys):
    assert run(rows, "--dataset", rows / "plain.jsonl") == 1
    assert run("a", "b", "c", "--dataset", rows / "plain.jsonl") == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "could not be loaded" in first and "3 models: expected one, or two to be compared" in second


def test_a_model_that_is_not_of_duet_is_one_line(tmp_path, rows, capsys, monkeypatch, saved):
    other = types.SimpleNamespace(model_type="llava")
    for kind in (AutoConfig, AutoProcessor):
        monkeypatch.setattr(kind, "from_pretrained", lambda *args, **kwargs: other)
    assert run(saved, "--dataset", rows / "plain.jsonl", "--output_dir", rows / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is of type llava, which Duet did not compose" in line


@pytest.mark.parametrize("where", ["plain.jsonl", "plain.jsonl/below", "/proc/nothing/here"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_asked(rows, capsys, monkeypatch, where):
    def never(*args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("evaluation_vlm.__main__.load", never)
    assert run("model", "--dataset", rows / "plain.jsonl", "--output_dir", rows / where) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and where in line and "cannot be written" in line


def test_results_hold_what_it_takes_to_repeat_them_and_the_page_no_path(saved, rows):
    out = rows / "out"
    more = ["--max_samples", "2", "--sample_seed", "7", "--prompt", "which?", "--split", "train", "--metrics", "anls"]
    assert run(saved, "--dataset", rows / "plain.jsonl", "--image_dir", rows, "--output_dir", out, *more) == 0
    asked = json.loads((out / "results.json").read_text())["asked"]
    assert asked | {
        "max_samples": 2, "sample_seed": 7, "prompt": "which?", "split": "train", "metrics": "anls", "stage": "sft",
        "dataset_revision": None, "dataset_name": None, "image_dir": str(rows), "max_new_tokens": 4, "columns": None,
        "split_turns": "none", "max_length": None,
    } == asked  # fmt: skip
    for file in ("samples.html", "predictions.jsonl"):
        assert str(rows) not in (out / file).read_text() and "model" not in asked
    assert "<h1>What model answers</h1>" in (out / "samples.html").read_text()


@pytest.mark.parametrize(
    "name, last",
    [
        ("https://anna:word@example.com/a/x.png?sig=word", "x.png"), ("https://anna:word@example.com", "example.com"),
        ("https://example.com/a@2.png#word", "a@2.png"), ("s3://annas/a/x.png", "x.png"), ("/mnt/anna/x", "x"),
        ("maker/talk", "maker/talk"), ("a/x.png", "a/x.png"),
    ],
)  # fmt: skip
def test_what_is_written_names_no_place_and_nothing_that_gives_access(name, last):
    assert last_part(name) == last


def test_a_model_is_judged_where_and_in_what_numbers_it_is_asked_for_and_else_as_it_was_saved(
    saved, rows, capsys, monkeypatch
):
    pytest.importorskip("bitsandbytes")
    found, ask = [], evaluation.answer_questions
    monkeypatch.setattr(
        evaluation, "answer_questions", lambda model, *a, **b: found.append(model) or ask(model, *a, **b)
    )
    words = [saved, "--dataset", rows / "plain.jsonl", "--output_dir", rows / "out"]
    for more in ([], ["--load_in_8bit"], ["--dtype", "bfloat16"]):
        assert run(*words, *more) == 0
    assert [str(model.dtype) for model in found] == ["torch.float32", "torch.float32", "torch.bfloat16"]
    assert [getattr(model, "is_quantized", False) for model in found] == [False, True, False]
    assert json.loads((rows / "out" / "results.json").read_text())["asked"]["dtype"] == "bfloat16"
    assert run(*words, "--device", "nowhere") == 1
    assert "device=nowhere: there is none here" in capsys.readouterr().err


def test_an_accelerator_does_not_round_what_is_judged(monkeypatch):
    monkeypatch.setattr(evaluation, "place", lambda name, **given: {"device_map": given["device"], "dtype": "bfloat16"})
    args = evaluation._parser().parse_args(["x", "--dataset", "shapes", "--device", "cuda"])
    assert evaluation._placed("x", args) == {"device_map": "cuda"}
    args = evaluation._parser().parse_args(["x", "--dataset", "shapes", "--device", "cuda", "--dtype", "bfloat16"])
    assert evaluation._placed("x", args) == {"device_map": "cuda", "dtype": "bfloat16"}


def test_captions_are_asked_for_as_in_stage_1_and_all_of_an_image_count(saved, rows):
    captioned = [{"image": f"{n}.png", "captions": ["a cat", "a small cat", "one cat"]} for n in range(3)]
    (rows / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captioned))
    out = rows / "out"
    metrics = ("--metrics", "exact_match,anls")
    assert run(saved, "--stage", "pretrain", "--dataset", rows / "captions.jsonl", "--output_dir", out, *metrics) == 0
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["expected"] for line in lines] == [["a cat", "a small cat", "one cat"]] * 3
    assert all(line["question"] == "" for line in lines)


QUICK = [
    "--use_cpu", "--bf16", "False", "--max_steps", "1", "--max_new_tokens", "4", "--dataloader_num_workers", "0",
    "--disable_tqdm", "True",
]  # fmt: skip


def test_a_checkpoint_of_adapters_is_a_model_too(folders, rows, capsys):
    vision, text = folders("siglip-llama")
    out = rows / "trained"
    train_sft.main(
        [
            "--vision_model", str(vision), "--text_model", str(text), "--dataset", str(rows / "plain.jsonl"),
            "--tune_text", "lora", "--output_dir", str(out), *QUICK,
        ]
    )  # fmt: skip
    assert (out / "adapter_config.json").is_file()
    assert run(out, out / "base", "--dataset", rows / "plain.jsonl", "--output_dir", rows / "out") == 0
    assert "exact_match: no difference can be told between" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not here")
def test_without_java_log_page_and_card_say_what_values_were_counted_with(folders, rows, capsys, monkeypatch):
    monkeypatch.setattr(words.shutil, "which", lambda name: None)
    words.split_words.cache_clear()
    captioned = [{"image": f"{n % 4}.png", "captions": ["a cat", "a small cat"]} for n in range(8)]
    (rows / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captioned))
    vision, text = folders("siglip-llama")
    out = rows / "trained"
    train_pretrain.main(
        [
            "--vision_model", str(vision), "--text_model", str(text), "--dataset", str(rows / "captions.jsonl"),
            "--test_dataset", str(rows / "captions.jsonl"), "--predict_with_generate", "--eval_strategy", "steps",
            "--eval_steps", "1", "--output_dir", str(out), *QUICK,
        ]
    )  # fmt: skip
    words.split_words.cache_clear()
    said = capsys.readouterr().out
    assert said.index(f"cider: {OWN_WORDS}") < said.index("eval_cider") and "bleu4 0.000" in said
    assert OWN_WORDS in (out / "samples.html").read_text().replace("&#x27;", "'")
    card = " ".join((out / "README.md").read_text().replace("''", "'").split())  # as yaml folds and quotes it
    assert card.count(OWN_WORDS) >= 6  # of three metrics in the table, and in what the Hub reads
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any({"eval_cider", "eval_bleu4", "eval_rouge_l"} <= line.keys() for line in log)


@pytest.mark.slow
def test_two_processes_answer_what_one_does(saved, rows):
    assert run(saved, "--dataset", rows / "mixed.jsonl", "--output_dir", rows / "one") == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "evaluation_vlm",
        saved, "--dataset", rows / "mixed.jsonl", "--output_dir", rows / "two", "--max_new_tokens", "4",
        "--batch_size", "3",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command)], check=True, env=environment, timeout=300)
    one, two = ((rows / name / "predictions.jsonl").read_text() for name in ("one", "two"))
    assert [json.loads(line)["generated"] for line in one.splitlines()] == [
        json.loads(line)["generated"] for line in two.splitlines()
    ]
    values = [json.loads((rows / name / "results.json").read_text())["models"][0]["metrics"] for name in ("one", "two")]
    assert values[0] == values[1] and len(one.splitlines()) == 5
