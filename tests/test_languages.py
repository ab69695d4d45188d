"""Folders, pictures, questions and answers in any script, and emoji: read, asked, learned and shown as they are."""

import configparser
import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image, features

import train_pretrain
from evaluation_vlm.__main__ import main as evaluate
from evaluation_vlm.fonts import Fonts
from evaluation_vlm.gallery import Shown
from evaluation_vlm.gallery import _cell as draw_cell
from evaluation_vlm.gallery_page import write_page
from evaluation_vlm.judgement import _label as label_of_kind
from inference_vlm import ask, explain, export, merge, serve, update
from inference_vlm.program import ended_by, program
from processing.batching.account import Record
from processing.data_error_vlm import printable
from tests import tiny
from training_vlm.inspect_data.page import write_page as inspected_page
from training_vlm.inspect_data.samples import Piece, Sample
from training_vlm.model_card import _cell as cell_of_card


FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
WORDS = f"猫 قطة कुत्ता {FAMILY}"
"""Chinese, Arabic, Hindi, and one emoji of three that are joined."""
QUESTION, ANSWER = f"ما هذا؟ 这是什么？{FAMILY}", f"一只猫 قطة {FAMILY}"


@pytest.fixture(scope="module")
def made(tmp_path_factory, folders):
    """A saved model, a picture and rows about it, in a folder of such a name."""
    folder = tmp_path_factory.mktemp("languages") / WORDS
    model, processor = tiny.compose(*folders("vit-gpt2"), "cls")
    model.save_pretrained(folder / "模型")
    processor.save_pretrained(folder / "模型")
    Image.new("RGB", (40, 30), "red").save(folder / f"{WORDS}.png")
    about = {"image": f"{WORDS}.png"}
    asked = [{**about, "question": QUESTION, "answer": ANSWER, "question_type": kind} for kind in WORDS[:5:2]]
    for name, rows in (("سؤال", asked), ("标题", [{**about, "caption": ANSWER}] * 2)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def ascii_terminal(monkeypatch):
    """Have stdout be a terminal that can show ASCII alone; `buffer` holds what it was given."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    return sys.stdout


def test_a_picture_and_a_question_of_any_script_are_asked_about(made, capsys):
    asked = [str(made / "模型"), str(made / f"{WORDS}.png"), QUESTION, "--json", "--max_new_tokens", "2"]
    assert ask.main(asked) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["question"] == QUESTION and said["images"] == [str(made / f"{WORDS}.png")]


def test_an_error_names_a_file_as_it_is_called(made, capsys):
    assert ask.main([str(made / "模型"), str(made / f"{FAMILY}.png"), QUESTION]) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and str(made / f"{FAMILY}.png") in line


def test_a_terminal_that_cannot_show_a_script_ends_no_command(made, tmp_path, monkeypatch, capsys):
    terminal = ascii_terminal(monkeypatch)
    judged = ["--dataset", str(made / "سؤال.jsonl"), "--max_new_tokens", "2", "--output_dir", str(tmp_path / WORDS)]
    assert evaluate([str(made / "模型"), *judged]) == 0
    assert b"?" in terminal.buffer.getvalue()
    assert QUESTION in (tmp_path / WORDS / "predictions.jsonl").read_text(encoding="utf-8")
    assert "question" in capsys.readouterr().err, "a bar of what is answered, and not on stdout"
    assert update.main([str(made / "没有")]) == 1


def test_a_stage_learns_and_saves_text_of_any_script(made, tmp_path, folders, monkeypatch):
    terminal = ascii_terminal(monkeypatch)
    vision, text = folders("vit-gpt2")
    out = tmp_path / WORDS
    train_pretrain.main([
        "--vision_model", str(vision), "--text_model", str(text), "--dataset", str(made / "标题.jsonl"), "--use_cpu",
        "--bf16", "False", "--vision_feature_select_strategy", "cls", "--output_dir", str(out), "--max_steps", "1",
        "--per_device_train_batch_size", "1", "--disable_tqdm", "True", "--max_new_tokens", "2",
    ])  # fmt: skip
    assert (out / "model.safetensors").is_file() and b"Stage 1" in terminal.buffer.getvalue()


def test_a_page_joins_emoji_and_runs_each_text_in_its_own_direction():
    shown = Shown(image=None, asked=QUESTION, expected=(ANSWER,), answer=ANSWER, kind="猫", score=None, written="")
    page = write_page(WORDS, "", {}, [shown])
    assert f'<p class="asked" dir="auto">{QUESTION}</p>' in page and page.count(f'<dd dir="auto">{ANSWER}</dd>') == 2
    assert "\u202e" not in write_page("\u202e", "", {}, [])


def test_the_inspectors_page_runs_each_text_in_its_own_direction_and_nothing_turns_its_neighbours():
    sample = Sample(Record(ANSWER, 0), [], [Piece("prompt", QUESTION, 0, [5], [-100], 1.0)])
    page = inspected_page(WORDS, ["\u202e"], [sample], "")
    assert f'<h1 dir="auto">{WORDS}</h1>' in page and f"<bdi>{sample.name}</bdi>" in page and ANSWER in sample.name
    assert '<div class="tokens" dir="auto"><span class="prompt"' in page and "\u202e" not in page


@pytest.mark.skipif(not features.check("raqm"), reason="nothing joins letters here")
def test_emoji_and_letters_stay_joined_in_the_samples_of_a_run_and_in_its_card(monkeypatch):
    drawn = []
    monkeypatch.setattr(Fonts, "draw", lambda self, pen, place, text, fill: drawn.append(text))
    shown = Shown(image=None, asked="", expected=(), answer=f"{FAMILY}\u202e", kind="", score=None, written="")
    draw_cell(shown, Fonts())
    assert f"generated: {FAMILY}" in drawn
    assert FAMILY in cell_of_card(f"{FAMILY}\u202e") and "\u202e" not in cell_of_card("\u202e")
    assert label_of_kind(FAMILY) == FAMILY


def test_what_turns_a_line_is_written_out_and_what_joins_letters_is_not():
    assert printable(WORDS) == WORDS and printable("a\u202eb\x1b") == "a\\u202eb\\x1b"


def test_a_command_calls_itself_as_it_was_called(monkeypatch):
    names = {"/usr/bin/duet-ask": "duet-ask", "duet-ask.exe": "duet-ask", "/home/me/ask.py": "python -m ask"}
    for called, name in names.items():
        monkeypatch.setattr(sys, "argv", [called])
        assert program("ask") == name


def test_a_command_calls_the_others_by_the_names_that_they_are_installed_under(monkeypatch):
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[1] / "setup.cfg")
    installed = settings["options.entry_points"]["console_scripts"].split("\n")
    names = dict(line.replace(" ", "").split("=") for line in installed if line.strip())
    monkeypatch.setattr(sys, "argv", ["/usr/bin/duet-export"])
    for name, place in names.items():
        assert program(place.removesuffix(":main").removesuffix(".__main__")) == name


def test_a_mistake_ends_every_command_in_the_same_way(monkeypatch, capsys):
    """Also one that the code of a checkpoint raises, whose class is not ours; `DUET_TRACEBACK` shows where."""
    told = type("DuetError", (ValueError,), {"is_duet_error": True})
    assert ended_by(told("no\nmodel")) == 1 and capsys.readouterr().err == "error: no model\n"
    with pytest.raises(ZeroDivisionError):
        ended_by(ZeroDivisionError())
    for module in (merge, export, update, explain, serve):
        for name in ("merge", "export", "update", "_run", "serve"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *args, **kwargs: (_ for _ in ()).throw(told("no\nmodel")))
        assert module.main(["it", "there", "what?"][: 1 if module in (update, serve) else 2]) == 1
        assert capsys.readouterr().err == "error: no model\n", module
    for module in (merge, export, update, explain):
        for name in ("merge", "export", "update", "_run"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        assert module.main(["it", "there", "what?"][: 1 if module is update else 2]) == 130
        assert capsys.readouterr().err == "\n", module
    monkeypatch.setenv("DUET_TRACEBACK", "1")
    monkeypatch.setattr(update, "update", lambda *args, **kwargs: (_ for _ in ()).throw(told("no\nmodel")))
    with pytest.raises(told):
        update.main(["it"])
