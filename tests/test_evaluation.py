"""What a trained model answers is asked, judged and shown as it is, whatever a data set says of itself."""

import html
import json

import datasets
import pytest
from PIL import Image

import train_sft
from evaluation_vlm.judgement import KINDS_SHOWN, Judgement, judge, mean_of
from evaluation_vlm.metrics import METRICS
from evaluation_vlm.predictions import Prediction
from evaluation_vlm.questions import Question, find_questions
from inference_vlm.answering import Prompt
from processing.batching.encoding import encode_dialogue
from tests import tiny
from training_vlm.model_card import _cell


NASTY = [
    '<img src="https://evil.example/x.png" onerror="alert(1)">',
    "[click](javascript:alert(1)) ![pixel](http://evil.example/p.png)",
    "a | b | c",
    "`code` **bold** _it_ ~~no~~ $x$ # head",
    "```\n# Not a heading\n```",
    "https://evil.example www.evil.example @somebody #1",
    "</td></tr></table><script>alert(1)</script>",
    "one\ntwo\r\nthree\x1b[31m\u202e",
    "\\| \\[a](b)",
]


def asked(answers, kind="all", subset="all") -> Question:
    return Question(Prompt([1], []), tuple(answers), kind, subset)


def exactly(questions, answers) -> Judgement:
    return judge([*map(Prediction, questions, answers)], [METRICS["exact_match"]])


def test_an_answer_is_right_if_it_is_one_of_the_right_ones():
    questions = [asked(["a cat", "cat"]), asked(["two"]), asked(["red"])]
    assert exactly(questions, ["cat", "two", "blue"]).shares("exact_match") == {"all": {"all": 2 / 3}}


def test_a_question_knows_what_its_row_says(composed, image):
    _, processor = composed
    item = {**tiny.dialogue("what is it?", "a cat", image(0)), "answers": ["a cat", "cat "], "kind": "3", "subset": "s"}
    encoded = {**item, **encode_dialogue(processor, item)}
    (question,) = find_questions([encoded], processor)
    assert question.answers == ("a cat", "cat") and (question.kind, question.subset) == ("3", "s")
    assert question.expected == "a cat" and question.is_right("cat") and not question.is_right("dog")
    several = tiny.dialogue("what?", "a cat", image(0), more=(("how many?", "two"),))
    encoded = {**encode_dialogue(processor, several), "images": several["images"], "answers": ["a cat", "two"]}
    # Which of the row's answers belongs to which question nobody says.
    assert [question.answers for question in find_questions([encoded], processor)] == [("a cat",), ("two",)]
    assert {question.kind for question in find_questions([encoded], processor)} == {"all"}


@pytest.mark.parametrize("kinds", [["mean", "mean", "all"], NASTY, [str(n) for n in range(1000)], [""]])
def test_whatever_kinds_are_called_the_table_is_a_table(kinds):
    questions = [asked(["a"], kind, subset) for kind in kinds for subset in ("seen", "x\x1b]0;\x07`" * 20)]
    judgement = exactly(questions, ["a"] * len(questions))
    shares, table = judgement.shares("exact_match"), judgement.table("exact_match")
    lines = table.split("\n")
    assert len(lines) == 2 + min(len(set(kinds)), KINDS_SHOWN) + (len(set(kinds)) > KINDS_SHOWN)
    assert all(line.isprintable() and "`" not in line for line in lines)
    assert lines[-1].startswith("mean") and lines[-1].count("100.0%") == 2
    assert mean_of(shares["seen"]) == 1 and judgement.by_name()["exact_match/seen/mean"] == 1


def test_a_kind_that_a_subset_lacks_has_no_share_there():
    table = exactly([asked(["a"], "x", "one"), asked(["a"], "y", "two")], ["a", "b"]).table("exact_match")
    assert [line.count("%") for line in table.split("\n")] == [0, 1, 1, 2]


@pytest.mark.parametrize("text", NASTY)
def test_a_text_of_the_data_is_nothing_but_text_in_a_card(text):
    cell = _cell(text)
    assert not set("<>[]`|*_$~@\"'\\()") & set(cell.replace("&#", "").replace(";", ""))
    assert "\n" not in cell and cell.isprintable() and "www." not in cell and "://" not in cell
    shown = html.unescape(cell)
    assert shown == " ".join("".join(c if c.isprintable() else " " for c in text).split())


def test_a_long_text_is_cut_in_a_card():
    assert len(_cell("a" * 100_000)) < 1000


def test_test_rows_of_any_kind_are_counted(folders, tmp_path, image, capsys):
    """Numbers, null and markup as `kind`: the run ends well, and the card holds them as text."""
    vision, text = folders("siglip-llama")
    rows = []
    for number in range(12):
        image(number).save(tmp_path / f"{number}.png")
        question = f"<script>{number}</script> | what?"
        rows.append({"image": f"{number}.png", "question": question, "answer": "a cat", "id": number})
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {"numbers": [1, 2, None], "flags": [True, None, False], "texts": ["<b>`x`</b>", None, "|"]}
    for name, values in kinds.items():
        test = tmp_path / f"{name}.parquet"
        chosen = [{**row, "kind": value} for row, value in zip(rows, values)]
        datasets.Dataset.from_list(chosen).to_parquet(str(test))
        config = tmp_path / f"{name}.yaml"
        config.write_text(json.dumps({"test_dataset": {"path": str(test)}}))
        train_sft.main(
            [
                "--config", str(config), "--vision_model", str(vision), "--text_model", str(text), "--dataset",
                str(train), "--image_dir", str(tmp_path), "--output_dir", str(tmp_path / name), "--use_cpu", "--bf16",
                "False", "--max_steps", "1", "--max_new_tokens", "3", "--per_device_train_batch_size", "2",
                "--save_strategy", "no", "--dataloader_num_workers", "0", "--disable_tqdm", "True",
            ]
        )  # fmt: skip
        assert "3 questions, greedy decoding" in capsys.readouterr().out
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert "<script>" not in card and "<b>" not in card
        assert Image.open(tmp_path / name / "samples.png").width > 0
