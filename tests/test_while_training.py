"""A model is judged while it learns, its training stays what it would be without, and the best one is kept."""

import json
import shutil
import sys
import types

import pytest
import torch
from PIL import Image
from transformers import EarlyStoppingCallback

import train_sft
from evaluation_vlm.asking import StoredImages, _shares, answer_questions, questions_of
from evaluation_vlm.curves import draw_curves, nice_ticks, panels_of
from evaluation_vlm.judgement import judge
from evaluation_vlm.metrics import choose_metrics
from evaluation_vlm.predictions import Prediction
from evaluation_vlm.questions import Question
from evaluation_vlm.reporters import report_image
from evaluation_vlm.showing import Wording, chosen, evenly
from evaluation_vlm.while_training import WhileTraining
from inference_vlm.answering import Prompt, greedy, text_of
from modeling_vlm import VLMModel
from processing.batching.encoding import Encoder, encode_dialogue
from tests import tiny
from tests.test_trainer import trainer_of, weights
from training_vlm import finish
from training_vlm.learning.trainer import VLMTrainer


QUICK = [
    "--use_cpu", "--bf16", "False", "--max_steps", "4", "--per_device_train_batch_size", "4", "--max_new_tokens", "3",
    "--logging_steps", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "True", "--eval_strategy", "steps",
    "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1",
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """Options for forty rows to learn from and a test file of twelve about three images, of two kinds."""
    for number in range(3):
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n % 3}.png", "question": "what is it?", "answer": "a cat"} for n in range(40)]
    asked = [{**row, "kind": ("colour", "count")[n % 2]} for n, row in enumerate(rows[:12])]
    for name, content in (("train", rows), ("test", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return ["--dataset", str(tmp_path / "train.jsonl"), "--test_dataset", str(tmp_path / "test.jsonl")]


@pytest.fixture
def run(folders, data, tmp_path):
    """`run(*argv)` trains a few steps into `tmp_path / "out"`."""
    vision, text = folders("vit-gpt2")
    names = ["--vision_model", str(vision), "--text_model", str(text), "--vision_feature_select_strategy", "cls"]
    return lambda *argv: train_sft.main([*names, *data, *QUICK, "--output_dir", str(tmp_path / "out"), *argv])


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
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return ends


GROWING = """
calls = []
def growing(predictions):
    calls.append(len(predictions))
    return [min(len(calls), 4) / 10 - (0.3 if len(calls) > 4 else 0)] * len(predictions)
"""


def test_answers_are_judged_at_every_evaluation_and_decide_which_model_is_kept(run, tmp_path, capsys):
    """A metric that is best at the third of six evaluations (it is tried once before); patience ends the run after."""
    (tmp_path / "own.py").write_text(GROWING)
    best = ["--metric_for_best_model", "eval_growing", "--load_best_model_at_end", "True"]
    run(
        "--predict_with_generate", "--metrics", f"exact_match,{tmp_path / 'own.py'}:growing", *best,
        "--early_stopping_patience", "2", "--max_steps", "20",
    )  # fmt: skip
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_growing" in entry]
    assert [round(entry["eval_growing"], 6) for entry in evaluations[:5]] == [0.2, 0.3, 0.4, 0.1, 0.1]
    assert evaluations[0].keys() >= {"eval_loss", "eval_exact_match", "eval_exact_match/all/colour"}
    assert state["best_global_step"] == 3 and state["global_step"] == 5
    assert state["best_model_checkpoint"].endswith("checkpoint-3")
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 12 and predictions[0]["question"] == "what is it?"
    assert predictions[0]["expected"] == ["a cat"] and predictions[0]["scores"].keys() == {"exact_match", "growing"}
    page = (out / "samples.html").read_text()
    assert page.count("<article") == 12 and page.count("data:image/png;base64,") == 12
    assert Image.open(out / "samples.png").width > 0 and Image.open(out / "training.png").width > 0
    assert not list(out.glob(".*"))
    said = capsys.readouterr().out
    assert "12 questions are answered, and judged by exact_match, growing" in said
    assert "Test answers (12 questions, greedy decoding)" in said


@pytest.mark.parametrize("more", [[], ["--temperature", "0.7"]])
def test_the_picture_after_training_has_the_scores_of_the_runs_own_metric(run, tmp_path, monkeypatch, more):
    """A metric that tells how many answers it was given: of few samples, all of them."""
    (tmp_path / "own.py").write_text("def count(predictions):\n    return [len(predictions)] * len(predictions)\n")
    drawn, draw_gallery = [], finish.draw_gallery
    monkeypatch.setattr(finish, "draw_gallery", lambda shown, file: drawn.append(shown) or draw_gallery(shown, file))
    alone = ["--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    run("--metrics", f"{tmp_path / 'own.py'}:count,exact_match", *alone, *more)
    assert [one.written for one in drawn[0]] == ["count 12"] * finish.SAMPLES_SHOWN


def test_what_no_evaluation_would_log_is_refused_before_training(refused, tmp_path):
    line = refused("--predict_with_generate", "--metric_for_best_model", "eval_exact_mach")
    assert "exact_match/all/colour" in line and "did you mean 'exact_match'" in line
    (tmp_path / "own.py").write_text("def mine(predictions):\n    return 1 / 0\n")
    line = refused("--predict_with_generate", "--metrics", f"{tmp_path / 'own.py'}:mine")
    assert "ZeroDivisionError" in line
    line = refused("--predict_with_generate", "--metrics", "cider,vqa_accuracy")
    assert "vqa_accuracy" in line or "pycocoevalcap" in line


def test_a_run_that_holds_nothing_out_is_evaluated_on_its_test_data(run, tmp_path):
    """The questions are the same as their loss is of; `kind` alone splits the values."""
    run("--predict_with_generate", "--eval_share", "0", "--max_eval_questions", "6", "--max_steps", "1")
    (first, *_) = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][1:]
    assert first["eval_loss"] > 0 and first.keys() >= {"eval_exact_match/all/colour", "eval_exact_match/all/count"}
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 12  # all of them after training


def test_with_cached_features_the_answers_are_the_same_and_no_encoder_is_run(run, tmp_path, monkeypatch):
    ran, during, found = [], [], []
    encode_views, evaluate = VLMModel.encode_views, VLMTrainer.evaluate
    monkeypatch.setattr(VLMModel, "encode_views", lambda *a, **k: ran.append(0) or encode_views(*a, **k))

    def counted(*args, **kwargs):
        before, metrics = len(ran), evaluate(*args, **kwargs)
        during.append(len(ran) - before)
        return metrics

    monkeypatch.setattr(VLMTrainer, "evaluate", counted)
    for more in ([], ["--cache_vision_features", str(tmp_path / "cache")]):
        run("--predict_with_generate", "--max_steps", "1", "--save_strategy", "no", *more)
        found.append((tmp_path / "out" / "predictions.jsonl").read_text())
        shutil.rmtree(tmp_path / "out")
    assert found[0] == found[1]
    assert len(during) == 4 and all(during[:2]) and not any(during[2:])


@pytest.fixture
def items(image):
    return [tiny.dialogue("what is it?", f"a {'red' if n % 2 else 'blue'} cat", image(n % 4)) for n in range(12)]


def test_a_training_with_evaluations_is_bit_for_bit_the_training_without(folders, items, tmp_path):
    """Dropout, workers' seeds and rows of many texts included."""
    made = []
    for name, more in (("with", {"eval_strategy": "steps", "eval_steps": 1}), ("without", {})):
        trainer = trainer_of("vit-gpt2", folders, items, tmp_path / name, max_steps=5, **more)
        trainer.data_collator.padding_free = True
        if name == "with":
            questions = questions_of(items, Encoder(trainer.processing_class, encode_dialogue, 100))
            settings = greedy(trainer.model, trainer.processing_class, 4)
            trainer.examine = WhileTraining(trainer, questions, choose_metrics(questions), settings)
            trainer.examine.settings.do_sample, trainer.examine.settings.temperature = True, 2.0
        trainer.train()
        made.append((weights(trainer), [e["loss"] for e in trainer.state.log_history if "loss" in e], trainer))
    (one, losses, trainer), (other, expected, _) = made
    assert sum("eval_exact_match" in entry for entry in trainer.state.log_history) == 5
    assert losses == expected and all(torch.equal(one[name], other[name]) for name in other)


def test_every_question_is_one_process_s_and_those_about_an_image_are_of_the_same():
    images = [f"{n}.png" for n in range(20)]
    questions = [Question(Prompt([1], [images[n % 20]][: n % 7]), ("a",), "all", "all") for n in range(90)]
    for processes in (1, 2, 3, 7):
        shares = _shares(questions, processes)
        assert sorted(number for share in shares for number in share) == list(range(90))
        if processes > 1:
            homes = {image: {p for p, s in enumerate(shares) for n in s if questions[n].prompt.images == [image]}
                     for image in images}  # fmt: skip
            assert all(len(home) == 1 for home in homes.values())
    assert {len(share) for share in _shares(questions, 3)} == {30}
    about_one = [questions[1]] * 9
    assert [len(share) for share in _shares(about_one, 2)] == [5, 4]  # one image is no reason to wait for one process


def test_images_that_lie_in_rows_stay_there(composed, image, tmp_path):
    model, processor = composed
    image(1).save(tmp_path / "1.png")
    read = []

    class Rows:
        def __len__(self):
            return 30

        def __getitem__(self, index):
            read.append(index)
            content = (tmp_path / "1.png").read_bytes()
            return tiny.dialogue("what?", "a cat", {"bytes": content, "path": None})

    questions = questions_of(Rows(), Encoder(processor, encode_dialogue, 100))
    assert len(questions) == 30 and all(isinstance(q.prompt.images, StoredImages) for q in questions)
    read.clear()
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    predictions = answer_questions(model, processor, questions, 8, greedy(model, processor, 2))
    assert [p.question for p in predictions] == questions and sum(seen) == 1 and set(read) == set(range(30))


@pytest.mark.parametrize("tokenizer", ["byte-level", "unigram-first", "wordpiece"])
@pytest.mark.parametrize("template", ["default", "chatml", "vicuna", "llama3"])
def test_a_question_is_shown_without_its_template(tokenizer, template, image):
    processor = tiny.processor_of(tokenizer, template)
    item = tiny.dialogue("what is it?", "a cat", image(0), more=(("how many?", "two"),))
    questions = questions_of([item], Encoder(processor, encode_dialogue, 100))
    assert [Wording(processor)(question) for question in questions] == [
        text_of(processor, processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in ("what is it?", "how many?")
    ]
    alone = questions[0]._replace(prompt=Prompt([processor.image_token_id], [image(0)]))
    assert Wording(processor)(alone) == ""


def test_a_page_of_few_shows_the_lowest_and_the_others_evenly():
    questions = [Question(Prompt([1], []), (str(n % 10 == 0),), "all", "all") for n in range(1000)]
    judgement = judge([Prediction(q, "False") for q in questions], choose_metrics(questions, "exact_match"))
    numbers = chosen(judgement, 20)
    scores = [judgement.score_of(number) for number in numbers]
    assert scores == sorted(scores) and scores.count(0.0) >= 10 and scores.count(1.0) >= 5 and len(set(numbers)) == 20
    assert len(chosen(judgement, 5000)) == 1000
    assert evenly([1, 2, 3], 8) == [1, 2, 3] and evenly(range(100), 3) == [0, 49, 99]


def test_the_curves_are_those_of_the_log(tmp_path):
    log = [
        {"step": 1, "loss": 2.0, "learning_rate": 1e-3},
        {"step": 2, "loss": float("nan")},
        {"step": 2, "eval_loss": 1.5, "eval_cider": 0.3},
        {"step": 3, "loss": 1.0, "learning_rate": 0.0},
    ]
    panels = panels_of(log, ["cider", "bleu"])
    assert [panel.title for panel in panels] == ["loss", "cider", "learning rate"]
    assert [series.points for series in panels[0].series] == [[(1, 2.0), (3, 1.0)], [(2, 1.5)]]
    assert draw_curves([], tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()
    assert draw_curves(log, tmp_path / "training.png", ["cider"]).size == Image.open(tmp_path / "training.png").size


@pytest.mark.parametrize("low, high", [(0, 1), (0.98, 0.99), (3, 3), (0, 0), (-5, 1e6), (1e-7, 2e-7), (40, 41)])
def test_ticks_are_few_and_hold_all_between_them(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low * (1 + 1e-9) + 1e-12 and ticks[-1] >= high * (1 - 1e-9) and 2 <= len(ticks) <= 9


def test_pictures_go_to_the_reporters_that_are_on(monkeypatch):
    got = []
    make = types.SimpleNamespace
    writer = make(add_image=lambda *args, **kwargs: got.append(("tensorboard", *args)), flush=lambda: None)
    wandb = make(run=object(), Image=lambda image: image, log=lambda values: got.append(("wandb", values)))
    context = make(current_run=make(get=lambda: object()))
    trackio = make(context_vars=context, Image=lambda image: image, log=lambda values: got.append(("trackio", values)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    callbacks = [type(name, (), {})() for name in ("WandbCallback", "TrackioCallback", "TensorBoardCallback", "Other")]
    callbacks[2].tb_writer = writer
    trainer = make(state=make(global_step=7), callback_handler=make(callbacks=callbacks))
    picture = Image.new("RGB", (8, 4))
    report_image(trainer, "samples", picture)
    assert [entry[0] for entry in got] == ["wandb", "trackio", "tensorboard"]
    assert got[0][1] == {"samples": picture, "train/global_step": 7}
    assert got[2][1] == "samples" and got[2][2].shape == (4, 8, 3) and got[2][3] == 7
    got.clear()
    wandb.run, trackio.context_vars.current_run.get, callbacks[2].tb_writer = None, lambda: None, None
    report_image(trainer, "samples", picture)
    assert got == []


def test_early_stopping_waits_as_long_in_a_resumed_run(folders, items, tmp_path):
    def trainer():
        made = trainer_of(
            "vit-gpt2", folders, items, tmp_path / "run", max_steps=9, save_strategy="steps", save_steps=1,
            eval_strategy="steps", eval_steps=1, metric_for_best_model="flat", greater_is_better=True,
            restore_callback_states_from_checkpoint=True, load_best_model_at_end=True,
        )  # fmt: skip
        made.examine = lambda: {"flat": 0.5}
        made.add_callback(EarlyStoppingCallback(3))
        return made

    whole = trainer()
    whole.train()
    assert whole.state.global_step == 4
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    (losses, *_) = panels_of(resumed.state.log_history)
    assert [step for step, _ in losses.series[0].points] == [1, 2, 3, 4]  # the curves begin where the run began
