"""The shell asks about pictures, in any number, from a file or a URL, or about every one of a folder, and goes on."""

import http.server
import io
import json
import sys
import threading

import pytest
import torch
from PIL import Image

from inference_vlm import ask as program
from inference_vlm import folder as folders_of
from inference_vlm.answering import Answerer, Finish, Prompt, answer
from inference_vlm.ask import main, pictures_and_question
from processing.data_error_vlm import DuetError
from tests import tiny


GREEDY = ["--temperature", "0", "--max_new_tokens", "8"]


@pytest.fixture(scope="module", params=list(tiny.PAIRS))
def saved(request, folders, tmp_path_factory):
    """A saved model whose answers depend on what it sees, and the same, loaded."""
    model, processor = tiny.compose(*folders(request.param), tiny.PAIRS[request.param][2])
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    name = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(name)
    processor.save_pretrained(name)
    return str(name), Answerer.load(str(name), device="cpu")


@pytest.fixture(autouse=True)
def loaded_once(saved, monkeypatch):
    """The programs load a model that is loaded already; each name that was loaded."""
    loads, load = [], Answerer.load
    known = {saved[0]: saved[1]}
    monkeypatch.setattr(
        Answerer, "load", lambda name, **options: loads.append(name) or known.get(name) or load(name, **options)
    )
    return loads


@pytest.fixture
def pictures(tmp_path, image):
    """A folder with four pictures, one of them in a folder of its own, and what is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "c.PNG", "more/d.png")):
        image(number).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def expected(answerer, question, *images, tokens=8):
    """What an evaluation would get."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    ids, _ = answerer.processor.encode_messages(messages, add_generation_prompt=True)
    config = answerer.settings(temperature=0, max_new_tokens=tokens).config
    prompt = Prompt(ids, [str(image) for image in images])
    return answer(answerer.model, answerer.processor, [prompt], 1, config)[0]


def printed(capsys, *words, code=0):
    """What the program prints about a question: the line on stdout."""
    assert main([str(word) for word in words]) == code
    return capsys.readouterr().out


def test_a_picture_and_a_question_are_answered_as_an_evaluation_would(saved, pictures, capsys):
    name, answerer = saved
    said = printed(capsys, name, pictures / "a.png", "what is it?", *GREEDY)
    assert said == program._harmless(expected(answerer, "what is it?", pictures / "a.png")) + "\n"


def test_without_a_question_a_picture_is_captioned_and_without_a_picture_the_language_model_is_asked(
    saved, pictures, capsys
):
    name, answerer = saved
    settings = answerer.settings(temperature=0, max_new_tokens=8)
    caption = "".join(answerer.stream(answerer.read_caption([pictures / "a.png"]), settings))
    assert printed(capsys, name, pictures / "a.png", *GREEDY) == program._harmless(caption) + "\n"
    assert printed(capsys, name, "what is it?", *GREEDY) == program._harmless(expected(answerer, "what is it?")) + "\n"
    inputs = answerer.processor(images=Image.open(pictures / "a.png"), text="<image>", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == answerer.read_caption([pictures / "a.png"]).row


def test_several_pictures_are_seen_in_their_order(saved, pictures, capsys):
    name, answerer = saved
    one, two = pictures / "a.png", pictures / "b.jpg"
    said = [printed(capsys, name, *order, "which?", *GREEDY, "--json") for order in ((one, two), (two, one))]
    answers = [json.loads(line)["answer"] for line in said]
    assert answers == [expected(answerer, "which?", *order) for order in ((one, two), (two, one))]
    assert json.loads(said[0])["image_tokens"] == 2 * answerer.processor.image_seq_length


def test_one_json_object_says_the_answer_how_it_ended_and_what_it_took(saved, pictures, capsys):
    name, answerer = saved
    found = json.loads(printed(capsys, name, pictures / "a.png", "是什么？🙂", *GREEDY, "--json"))
    assert found.pop("seconds") > 0 and found.pop("prompt_tokens") > found.pop("image_tokens") > 0
    assert found.pop("finish_reason") in ("stop", "length") and 0 < found.pop("completion_tokens") <= 8
    assert found == {
        "model": name, "images": [str(pictures / "a.png")], "question": "是什么？🙂", "cached_tokens": 0,
        "answer": expected(answerer, "是什么？🙂", pictures / "a.png"),
    }  # fmt: skip


def test_a_question_comes_from_stdin_or_by_name(saved, pictures, capsys, monkeypatch):
    name, answerer = saved
    whole = program._harmless(expected(answerer, "what\nis it?", pictures / "a.png")) + "\n"
    for words in (["-"], ["--question", "-"], ["--question", "what\nis it?"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("what\nis it?\n"))
        assert printed(capsys, name, pictures / "a.png", *words, *GREEDY) == whole
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert main([name, "-"]) == 1
    assert "the question is empty" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert main([name, "-"]) == 1
    assert "expected UTF-8" in capsys.readouterr().err


def test_stop_strings_seeds_and_settings_reach_the_answer(saved, pictures, capsys):
    name, answerer = saved
    ask = [name, pictures / "a.png", "what is it?", "--max_new_tokens", "20", "--json"]
    whole = json.loads(printed(capsys, *ask, "--temperature", "0"))["answer"]
    found = json.loads(printed(capsys, *ask, "--temperature", "0", "--stop", "never", "--stop", whole[3]))
    assert found["answer"] == whole[: whole.index(whole[3])].rstrip() and found["finish_reason"] == "stop"
    drawn = [printed(capsys, *ask, "--temperature", "2", "--seed", seed) for seed in (1, 1, 2)]
    answers = [json.loads(line)["answer"] for line in drawn]
    assert answers[0] == answers[1] != answers[2]
    assert json.loads(printed(capsys, *ask, "--temperature", "2", "--top_k", "1"))["answer"] == whole


def test_a_seed_that_changes_nothing_and_an_answer_that_was_cut_are_told(saved, pictures, capsys):
    name, _ = saved
    assert main([name, str(pictures / "a.png"), "what is it?", "--temperature", "0", "--seed", "3", "--json"]) == 0
    assert "--seed changes nothing" in capsys.readouterr().err
    assert main([name, str(pictures / "a.png"), "what is it?", "--temperature", "0", "--max_new_tokens", "1"]) == 0
    assert "cut after 1 tokens; --max_new_tokens gives more room" in capsys.readouterr().err


def test_options_that_change_nothing_are_told(saved, pictures, capsys):
    words = [saved[0], str(pictures / "a.png"), "what is it?", "--temperature", "0", "--max_new_tokens", "2"]
    assert main(words) == 0 and "changes nothing" not in capsys.readouterr().err
    assert main([*words, "--top_p", "0.5", "--top_k", "3", "--batch_size", "2"]) == 0
    told = capsys.readouterr().err
    assert "--top_p, --top_k change nothing" in told and "--batch_size changes nothing" in told


def test_which_words_are_pictures_and_which_the_question(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    (pictures / "scan").write_bytes((pictures / "a.png").read_bytes())
    for words, found in (
        (["a.png", "what?"], (["a.png"], "what?")),
        (["a.png"], (["a.png"], None)),
        (["gone.png"], (["gone.png"], None)),
        (["scan"], (["scan"], None)),
        (["scan", "more"], (["scan"], "more")),  # one word beside a picture is the question, whatever folders there are
        (["more"], (["more"], None)),
        (["https://example.org/x", "a.png", "which?"], (["https://example.org/x", "a.png"], "which?")),
        (["what?"], ([], "what?")),
        (["مرحبا"], ([], "مرحبا")),
        (["a.png", "x" * 5000], (["a.png"], "x" * 5000)),
        (["a.png", "-"], (["a.png"], "-")),
        (["a.png", "nul\0"], (["a.png"], "nul\0")),
    ):
        assert pictures_and_question(words) == found
    assert pictures_and_question(["a.png", "b.jpg"], "a.png") == (["a.png", "b.jpg"], "a.png")
    with pytest.raises(DuetError, match="'What' names no picture that is there; .* one question, in quotes"):
        pictures_and_question(["a.png", "What", "is", "it?"])


@pytest.fixture
def address(pictures):
    """Of a server on this machine that has the pictures."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(pictures))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_is_fetched_when_allowed_and_from_this_machine_only_when_that_is(
    saved, pictures, address, capsys, monkeypatch, loaded_once
):
    monkeypatch.setattr("processing.image_urls_vlm.is_offline_mode", lambda: False)
    name, answerer = saved
    ask = [name, f"{address}/a.png", "what is it?", *GREEDY]
    assert main(ask) == 1 and "is a URL, and none is fetched here" in capsys.readouterr().err
    assert main([*ask, "--allow_urls"]) == 1 and "--allow_local_urls" in capsys.readouterr().err
    assert loaded_once == []
    said = printed(capsys, *ask, "--allow_urls", "--allow_local_urls")
    assert said == program._harmless(expected(answerer, "what is it?", pictures / "a.png")) + "\n"


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_picture_of_a_folder_is_answered_as_it_would_be_alone(saved, pictures, tmp_path, capsys, batch_size):
    name, answerer = saved
    out = tmp_path / "new" / "answers.jsonl"
    words = [name, pictures, "what is it?", "--out", out, "--batch_size", batch_size, *GREEDY]
    assert "has 4 answers about 4 pictures" in printed(capsys, *words)
    found = lines_of(out)
    assert [line["image"] for line in found] == ["a.png", "b.jpg", "c.PNG", "more/d.png"]
    for line in found:
        assert line["answer"] == expected(answerer, "what is it?", pictures / line["image"])
        assert line["image_tokens"] == answerer.processor.image_seq_length and line["finish_reason"]
        assert (line["model"], line["question"]) == (name, "what is it?")


def test_progress_is_told_on_stderr_and_the_answers_stay_in_the_file(saved, pictures, tmp_path, capsys):
    assert main([saved[0], str(pictures), "what?", "--out", str(tmp_path / "a.jsonl"), *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert "4/4" in err and "picture/s" in err and "\033[3" not in err and "1 other files" in err
    assert out.count("\n") == 1


def test_what_is_in_the_file_is_not_asked_again_also_after_a_kill(saved, pictures, tmp_path, capsys, loaded_once):
    out = tmp_path / "answers.jsonl"
    words = [saved[0], str(pictures), "what is it?", "--out", str(out), *GREEDY]
    assert main(words) == 0
    whole = out.read_bytes()
    first, second, *_ = whole.splitlines(keepends=True)
    capsys.readouterr()
    for left in (first + second, first + second[:-20], first + second[:-1], b""):
        out.write_bytes(left)
        assert main(words) == 0
        assert out.read_bytes() == whole
        assert ("its last line was not written to the end" in capsys.readouterr().err) == (
            left[-1:] not in (b"\n", b"")
        )
    loaded_once.clear()
    assert main(words) == 0
    assert out.read_bytes() == whole and loaded_once == [] and "has 4 of 4 answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG half a picture",
        b'{"precious": 1}',
        b'{"image": "a.png", "conversations": []}\n{"image": "b',
        b'{"image": ["a.png"], "answer": "", "model": ""}\n',
    ],
)
def test_a_file_of_another_program_stays_as_it_is(saved, pictures, tmp_path, capsys, loaded_once, content):
    other = tmp_path / "other"
    other.write_bytes(content)
    assert main([saved[0], str(pictures), "what is it?", "--out", str(other)]) == 1 and loaded_once == []
    assert "is no answer about a picture" in capsys.readouterr().err and other.read_bytes() == content


def test_a_drawn_answer_is_that_of_its_picture_whatever_was_answered_before(saved, pictures, tmp_path):
    words = [saved[0], str(pictures), "what is it?", "--temperature", "2", "--seed", "3", "--max_new_tokens", "8"]
    assert main([*words, "--out", str(tmp_path / "a.jsonl"), "--batch_size", "1"]) == 0
    assert main([*words, "--out", str(tmp_path / "b.jsonl"), "--batch_size", "1"]) == 0
    (tmp_path / "b.jsonl").write_text("".join((tmp_path / "b.jsonl").read_text().splitlines(keepends=True)[:1]))
    assert main([*words, "--out", str(tmp_path / "b.jsonl"), "--batch_size", "1"]) == 0
    answers = [line["answer"] for line in lines_of(tmp_path / "a.jsonl")]
    assert len(set(answers)) == 4 and answers == [line["answer"] for line in lines_of(tmp_path / "b.jsonl")]


def test_another_question_model_or_setting_is_asked_anew_and_said(saved, pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "answers.jsonl"
    words = [saved[0], str(pictures), "what is it?", "--out", str(out), *GREEDY]
    assert main(words) == 0
    for number, change in enumerate((["which colour?"], ["what is it?", "--dtype", "float32"], []), start=1):
        capsys.readouterr()
        if not change:  # the weights that a later training wrote
            monkeypatch.setattr(folders_of, "_stamp", lambda model: "other")
        assert main([words[0], words[1], *(change or words[2:3]), *words[3:]]) == 0
        assert f"{4 * number} lines of {out} are answers to another question" in capsys.readouterr().err
        assert len(lines_of(out)) == 4 * (number + 1)


def test_a_picture_that_has_changed_is_asked_about_anew_and_no_other(saved, pictures, tmp_path, image, capsys):
    out = tmp_path / "answers.jsonl"
    words = [saved[0], str(pictures), "what is it?", "--out", str(out), *GREEDY]
    assert main(words) == 0
    image(7, size=(50, 20)).save(pictures / "c.PNG")
    (pictures / "a.png").unlink()
    capsys.readouterr()
    assert main(words) == 0
    assert "1 lines of" in (err := capsys.readouterr().err) and "pictures that have changed" in err
    assert [line["image"] for line in lines_of(out)] == ["a.png", "b.jpg", "c.PNG", "more/d.png", "c.PNG"]
    assert main(words) == 0 and len(lines_of(out)) == 5


def test_whatever_an_answer_depends_on_tells_a_model_from_another(tmp_path, monkeypatch):
    """Its weights and settings, an adapter's base wherever that is, and the commit of a name on the Hub."""
    model, base, other = tmp_path / "run" / "sft", tmp_path / "run" / "base", tmp_path / "elsewhere"
    files = [model / "adapter_model.safetensors", model / "generation_config.json", model / "chat_template.jinja"]
    files += [
        model / "tokenizer.json",
        model / "processor_config.json",
        base / "model.safetensors",
        other / "config.json",
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(other)}))
    stamps = [folders_of._stamp(str(model))]
    for file in files:
        file.write_text("22")
        stamps.append(folders_of._stamp(str(model)))
    (model / "results.json").write_text("{}")  # of an evaluation
    assert len(set(stamps)) == len(files) + 1 and folders_of._stamp(str(model)) == stamps[-1]
    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr(
        folders_of,
        "cached_file",
        lambda name, *given, **more: f"/hub/models--{name}/snapshots/{next(commits)}/config.json",
    )
    assert [folders_of._stamp("you/it") for _ in range(2)] == ["a" * 40, "b" * 40]


def test_a_name_that_is_nowhere_has_no_commit_and_is_told_when_it_is_loaded(pictures, tmp_path, capsys):
    out = tmp_path / "made" / "answers.jsonl"
    assert main(["nobody/nothing", str(pictures), "what is it?", "--out", str(out)]) == 1
    assert "could not be loaded" in capsys.readouterr().err and not out.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such locks there")
def test_a_file_is_written_by_one_run_at_a_time(saved, pictures, tmp_path, capsys, loaded_once):
    out = tmp_path / "answers.jsonl"
    words = [saved[0], str(pictures), "what is it?", "--out", str(out), *GREEDY]
    with folders_of.written_by_one(out):
        assert main(words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {out} is being written by another run") and loaded_once == []
    assert main(words) == 0 and len(lines_of(out)) == 4


def test_what_a_model_wrote_steers_no_terminal_and_ends_no_line(saved, pictures, capsys, monkeypatch):
    steers = "a\x9b31mb\x85c\u2028d\x1be\x7ff"
    monkeypatch.setattr(saved[1], "stream", lambda *given, **more: Told([steers]))
    line = printed(capsys, saved[0], pictures / "a.png", "what?", "--json")
    assert line.isascii() and len(line.splitlines()) == 1 and json.loads(line)["answer"] == steers
    assert printed(capsys, saved[0], pictures / "a.png", "猫\x9b?", "--json").count("猫") == 1


class Told(list):
    """A stream of which this is the one piece."""

    finish = Finish("stop", 1, 1, 1, 0)


def test_pictures_that_cannot_be_read_are_lines_are_counted_and_tried_again(saved, pictures, tmp_path, image, capsys):
    out = tmp_path / "answers.jsonl"
    (pictures / "b.jpg").write_text("no picture")
    (pictures / "large.png").write_bytes(huge())
    words = [saved[0], str(pictures), "what is it?", "--out", str(out), "--batch_size", "2", *GREEDY]
    for _ in range(2):
        assert main(words) == 3
        said, err = capsys.readouterr()
        assert "has 3 answers about 5 pictures; 2 pictures could not be read" in said
        assert err.count("left out: ") == 2 and "the row" not in err and "--image_dir" not in err
        found = lines_of(out)
        assert [line["image"] for line in found if "error" in line] == ["b.jpg", "large.png"] and len(found) == 5
    image(1).save(pictures / "b.jpg")
    (pictures / "large.png").unlink()
    assert main(words) == 0
    assert {line["image"] for line in lines_of(out) if "answer" in line} == {"a.png", "b.jpg", "c.PNG", "more/d.png"}


def test_names_in_any_script_or_bytes_are_asked_about_and_found_again(saved, tmp_path, image, capsys, loaded_once):
    folder, out = tmp_path / "图片", tmp_path / "答.jsonl"
    folder.mkdir()
    names = {"猫.png", "قطة.png", "🐈.png", "\udcff.png"}  # the last is a name of bytes that are no text
    for number, name in enumerate(sorted(names)):
        image(number).save(folder / name)
    words = [saved[0], str(folder), "这是什么？", "--out", str(out), *GREEDY]
    assert main(words) == 0
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert {line["image"] for line in found} == names and "猫" in out.read_text("utf-8", errors="replace")
    loaded_once.clear()
    assert main(words) == 0 and loaded_once == []


def huge():
    """A picture of 225 megapixels in a few bytes."""
    content = io.BytesIO()
    Image.new("1", (15_000, 15_000)).save(content, "PNG")
    return content.getvalue()


def test_what_is_wrong_is_one_line_before_a_model_is_loaded(saved, pictures, tmp_path, capsys, loaded_once):
    (tmp_path / "none").mkdir()
    (tmp_path / "other.jsonl").write_text('{"text": 1}\n')
    (pictures / "large.png").write_bytes(huge())
    a, out = str(pictures / "a.png"), ["--out", str(tmp_path / "x.jsonl")]
    for words, line in (
        ([], "nothing is asked"),
        ([str(pictures), "what?"], "is a folder; ask about its pictures alone, with --out"),
        ([a, str(pictures), "what?", *out], "names no picture that is there|is a folder; ask about its pictures alone"),
        ([a, "what?", *out], "--out is for the pictures of a folder"),
        ([str(pictures), "what?", *out, "--json"], "leave out one of them"),
        ([str(tmp_path / "none"), "what?", *out], "holds no picture; expected files that end in"),
        ([str(pictures), "what?", "--out", str(tmp_path / "other.jsonl")], "line 1, is no answer about a picture"),
        ([str(pictures), "what?", "--out", str(tmp_path)], "could not be written"),
        ([str(pictures), "what?", *out, "--batch_size", "0"], "batch_size=0: expected 1 or more"),
        ([str(tmp_path / "gone.png"), "what?"], "no such image file; give another image"),
        ([str(pictures / "large.png"), "what?"], "more pixels than the limit"),
        ([a, "what?", "--temperature", "-1"], "temperature=-1.0: expected 0 or more"),
        ([a, " "], "the question is empty"),
        ([a, "what\udcff?"], "the question is no text; expected UTF-8"),
    ):
        assert main([saved[0], *words]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: ") and any(part in said for part in line.split("|"))
    assert loaded_once == []


def test_a_prompt_that_is_too_long_or_a_model_that_is_none_is_one_line(saved, pictures, tmp_path, capsys):
    question = "is it a cat? " * 200
    for words in ([str(pictures / "a.png"), question], [str(pictures), question, "--out", str(tmp_path / "x.jsonl")]):
        assert main([saved[0], *words]) == 1
        assert "leave out" in capsys.readouterr().err.splitlines()[-1]
    assert main([str(tmp_path), str(pictures / "a.png"), "what?"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not be loaded" in line
    with pytest.raises(SystemExit) as error:
        main([saved[0], "--nonsense"])
    assert error.value.code == 2


def test_options_may_stand_anywhere(saved, pictures, capsys):
    words = [str(pictures / "a.png"), "--json", "--stop", "zzz", "what is it?"]
    assert main([*GREEDY, saved[0], *words]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == "what is it?"


def test_an_interrupted_answer_ends_the_writing_and_gives_its_own_code(saved, pictures, capsys, monkeypatch):
    name, answerer = saved

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "_harmless", interrupted)
    assert main([name, str(pictures / "a.png"), "what is it?", "--max_new_tokens", "40"]) == 130
    assert answerer.turns._places.acquire(timeout=5)
    answerer.turns._places.release()


def test_a_full_memory_is_one_line(saved, pictures, capsys, monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 80 GiB\nmore"
        )

    handle = saved[1].model.register_forward_pre_hook(full)
    assert main([saved[0], str(pictures / "a.png"), "what is it?"]) == 1
    handle.remove()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the memory of the device is full (CUDA out of memory);")


def test_what_a_model_writes_steers_no_terminal():
    assert program._harmless("a\x1b[2Jb\r\x07\nc\t🙂👩‍👧 مرحبا") == "a\\x1b[2Jb\\r\\x07\nc\t🙂👩‍👧 مرحبا"
