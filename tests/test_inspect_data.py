"""The page and the terminal show what the collator makes, token for token, and need nothing but themselves."""

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import pytest
from PIL import Image, ImageColor

from processing import VLMDataCollator
from processing.batching.account import Record
from processing.batching.encoding import IGNORE, Encoder
from tests import tiny
from training_vlm.data import encode_data, load_data
from training_vlm.inspect_data.__main__ import main
from training_vlm.inspect_data.page import write_page
from training_vlm.inspect_data.samples import KINDS, Piece, Sample, pieces_of, read_samples
from training_vlm.inspect_data.terminal import write_terminal
from training_vlm.settings import parse_arguments
from training_vlm.stages import SFT


NASTY = "<script>alert('x')</script> \"quoted\" & 'so' </div>"
UNICODE = "图片里有一只🐈‍⬛ ça va"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Dialogues and captions about pictures in a folder; of one dialogue the picture is missing."""
    folder = tmp_path_factory.mktemp("inspected")
    for number in range(6):
        Image.new("RGB", (60, 40), (40 * number, 200, 90)).save(folder / f"{number}.png")
    dialogues = [
        (["0.png"], [("user", f"what is it? {NASTY}"), ("assistant", "a cat\nand a mat\n\tand the sun")]),
        (["1.png", "2.png"], [("user", "how many?"), ("assistant", "two"), ("user", "sure?"), ("assistant", "yes")]),
        (["missing.png"], [("user", "and here?"), ("assistant", "nothing")]),
        ([], [("system", "be brief\x1b[31m"), ("user", "no picture"), ("assistant", UNICODE)]),
        (["3.png"], [("user", "which colour?"), ("assistant", "red " * 3 + "red")]),
    ]
    rows = [
        {"images": images, "messages": [{"role": role, "content": text} for role, text in turns]}
        for images, turns in dialogues
    ]
    rows[4]["messages"][1]["weight"] = 0.5
    write(folder / "dialogues.jsonl", rows)
    write(folder / "captions.jsonl", [{"image": f"{n}.png", "caption": f"a picture {n}."} for n in range(4)])
    return folder


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def backbones(folders):
    vision, text = folders("vit-gpt2")
    return ["--vision_model", str(vision), "--text_model", str(text)]


class Page(HTMLParser):
    """What a browser makes of a page: the tokens of each sample, the text, and every tag with its attributes."""

    def __init__(self, file):
        super().__init__()
        self.samples, self.tags, self.text, self.open = [], [], "", []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if attributes.get("class") == "tokens":
            self.samples.append([])
        if tag == "span" and "title" in attributes:
            self.samples[-1].append((attributes["class"], attributes["title"]))

    def handle_data(self, text):
        self.text += text

    def rows(self):
        """Kinds, ids and labels of each sample, position by position, as the titles have them."""
        return [[position for token in sample for position in read_title(*token)] for sample in self.samples]


def read_title(kind, title):
    found = re.fullmatch(r"position (\d+)(?: to (\d+))?, id ([\d ]+), label ([-\d ]+)(?:, weight .*)?", title)
    first, last = int(found[1]), int(found[2] or found[1])
    ids, labels = ([int(number) for number in found[group].split()] for group in (3, 4))
    number = last - first + 1
    ids, labels = (values * number if len(values) == 1 else values for values in (ids, labels))
    assert len(ids) == len(labels) == number
    return [(place, kind, id, label) for place, id, label in zip(range(first, last + 1), ids, labels)]


@pytest.fixture
def inspected(data, tmp_path, capsys):
    """`inspected(name, *options)` runs the program, and gives the page and what was printed."""

    def run(*argv):
        main([*argv, "--html", str(tmp_path / "page.html")])
        return Page(tmp_path / "page.html"), capsys.readouterr().out

    return run


def dialogues(data):
    return str(data / "dialogues.jsonl"), "--image_dir", str(data), "--eval_share", "0"


def trained_batch(data, folders):
    """What the Trainer's collator makes of the same rows, with the processor of the model itself."""
    _, _, data_args, *_, training_args = parse_arguments(SFT, ["--dataset", *dialogues(data), "--use_cpu"])
    _, processor = tiny.compose(*folders("vit-gpt2"))
    encoder = SFT.encoder(processor, data_args, 128)
    train, _ = encode_data(load_data(SFT, data_args, training_args), encoder, data_args, training_args)
    return VLMDataCollator(processor, 128)([train[index] for index in range(len(train))]), processor


def test_the_page_shows_the_batch_that_trains(inspected, data, folders, backbones):
    page, _ = inspected(*dialogues(data), *backbones)
    batch, processor = trained_batch(data, folders)
    rows = page.rows()
    assert len(rows) == len(batch["input_ids"]) == 4
    for row, ids, labels, mask in zip(rows, batch["input_ids"], batch["labels"], batch["attention_mask"]):
        assert [place for place, *_ in row] == list(range(len(ids)))
        assert [id for *_, id, _ in row] == ids.tolist()
        assert [label for *_, label in row] == labels.tolist()
        for place, kind, id, label in row:
            assert (kind == "supervised") == (label != IGNORE)
            assert (kind == "padding") == (mask[place] == 0)
            assert (kind == "image") == (id == processor.image_token_id)


def test_the_terminal_marks_exactly_what_is_learned(inspected, data, backbones):
    _, said = inspected(*dialogues(data), *backbones)
    end, unicode = "<|endoftext|>", UNICODE.replace(" ", "·").replace("\u200d", "\\u200d")
    assert re.findall(r"\[\[(.*?)\]\]", said, re.DOTALL)[1:] == [  # the first is the legend's
        f"·a·cat↵\nand·a·mat↵\n→and·the·sun{end}", f"·two{end}", f"·yes{end}",
        f"·{unicode}{end}", f"·red·red·red·red{end}",
    ]  # fmt: skip
    assert "{<image> x 16}{<image> x 16}" in said and "×0.5[[" in said and "\x1b" not in said
    assert "\n--- 3 of 5: " in said and re.search(r"dropped: missing image file \(.*missing\.png", said)
    assert "learned from" in said and "1 dropped: missing image file" not in said  # its image is first seen in a batch


def test_colours_say_in_the_terminal_what_marks_say_in_a_file():
    processor = tiny.processor_of("byte-level", "default")
    ids = [processor.image_token_id] * 3 + processor.tokenizer("a cat\nsits")["input_ids"]
    pieces = list(pieces_of(processor, [3], ids, [IGNORE] * 4 + ids[4:], [1] * len(ids), None))
    plain, coloured = (write_terminal([Sample(Record("tiny", 0), [], pieces)], coloured) for coloured in (False, True))
    shown = coloured[coloured.index("\x1b", coloured.index("---")) :].rstrip()
    assert all(line.startswith("\x1b[38") and line.endswith("\x1b[0m") for line in shown.splitlines())
    without = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert without == "<image> x 3a·cat↵\nsits" and "{<image> x 3}a[[·cat↵\nsits]]" in plain


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_the_pieces_of_a_text_are_the_text(kind):
    processor = tiny.processor_of(kind, "default")
    text = f"what is in the picture? {UNICODE}"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(pieces_of(processor, [1], ids, ids, [1] * len(ids), None))
    assert "".join(piece.text for piece in pieces) == processor.tokenizer.decode(ids)
    assert [id for piece in pieces for id in piece.ids] == ids
    assert not any("\ufffd" in piece.text for piece in pieces)
    if kind == "byte-level":
        assert "".join(piece.text for piece in pieces) == text and "图" in [piece.text for piece in pieces]


def test_what_stays_in_pieces_is_still_shown():
    piece = Piece("supervised", "\ufffd", 3, [7, 8], [7, IGNORE], 0.5)
    assert read_title("supervised", piece.title) == [(3, "supervised", 7, 7), (4, "supervised", 8, IGNORE)]


def test_a_page_needs_nothing_else_and_no_text_can_break_it(inspected, data, backbones):
    page, _ = inspected(*dialogues(data), *backbones)
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["script"] == tags["link"] == tags["iframe"] == 0 and tags["html"] == tags["body"] == 1
    assert tags["img"] == 4
    for tag, attributes in page.tags:
        assert not {"href", "onload", "onerror"} & attributes.keys()
        assert tag != "img" or attributes["src"].startswith("data:image/jpeg;base64,")
    assert NASTY.replace(" ", "·") in page.text and "<image> x 16" in page.text
    assert "dropped: missing image file" in page.text and "missing.png" in page.text
    assert "dialogues" in page.text and "image tokens" in page.text and "×0.5" in page.text


def test_nothing_that_the_data_names_is_taken_for_html(tmp_path):
    kept = Sample(Record(NASTY, NASTY), [], [Piece("prompt", NASTY, 0, [5], [IGNORE], 1.0)])
    dropped = Sample(Record("x", 1, NASTY, NASTY), [], [])
    (tmp_path / "page.html").write_text(write_page(NASTY, [NASTY], [kept, dropped], NASTY), encoding="utf-8")
    page = Page(tmp_path / "page.html")
    assert "script" not in [tag for tag, _ in page.tags]
    # Title, heading, line, source and row of one sample, reason and detail of the other, account; and one token.
    assert page.text.count(NASTY) == 8 and page.text.count(NASTY.replace(" ", "·")) == 1


def test_what_is_dropped_while_encoding_is_shown_with_its_reason(inspected, data, backbones, tmp_path):
    rows = [json.loads(line) for line in (data / "dialogues.jsonl").read_text().splitlines()][3:]
    rows[0]["messages"][-1]["train"] = False
    write(tmp_path / "rows.jsonl", rows)
    page, said = inspected(str(tmp_path / "rows.jsonl"), "--image_dir", str(data), "--eval_share", "0", *backbones)
    assert "dropped: no token of it is supervised" in said and len(page.samples) == 1
    assert "1 dropped: no token of it is supervised" in page.text


def test_where_nothing_can_be_learned_the_samples_are_shown_all_the_same(data, backbones, tmp_path, capsys):
    write(tmp_path / "rows.jsonl", [{"image": "missing.png", "caption": "a"}] * 3)
    with pytest.raises(SystemExit) as exit:
        main([
            str(tmp_path / "rows.jsonl"), "--image_dir", str(data), *backbones, "--html", str(tmp_path / "page.html"),
        ])  # fmt: skip
    said = capsys.readouterr()
    assert exit.value.code == 1 and said.out.count("dropped: missing image file") == 3
    assert said.err.count("error: ") == 1 and "missing.png" in said.err
    assert "training would end here" in Page(tmp_path / "page.html").text


def test_images_that_are_not_there_are_told_of_before_training(inspected, data, backbones):
    page, said = inspected(*dialogues(data), *backbones, "--n", "1")
    line = "1 of 5 images that were looked at cannot be read (such as "
    assert line in said and line in page.text and "missing.png: no such image file" in said
    assert "cannot be read" not in inspected(str(data / "captions.jsonl"), "--image_dir", str(data), *backbones)[1]


def test_a_caption_of_stage_1_has_no_prompt_but_its_image(inspected, data, backbones):
    page, said = inspected(
        str(data / "captions.jsonl"), "--image_dir", str(data), *backbones, "--stage", "pretrain", "--n", "2"
    )
    assert "Stage 1" in said and len(page.samples) == 2
    for row in page.rows():
        assert [kind for _, kind, *_ in row if kind != "padding"] == ["image"] * 16 + ["supervised"] * (
            sum(kind == "supervised" for _, kind, *_ in row)
        )
    assert "[[a·picture·0.<|endoftext|>]]" in said


def test_with_a_language_model_alone_an_image_is_one_token(inspected, data, backbones):
    page, said = inspected(*dialogues(data), *backbones[2:])
    assert "No vision model is named" in said and "{<image>}{<image>}" in said
    assert sum(kind == "image" for row in page.rows() for _, kind, *_ in row) == 4


def test_a_composed_folder_is_read_without_its_weights(inspected, data, folders, backbones, tmp_path):
    model, processor = tiny.compose(*folders("vit-gpt2"))
    processor.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "model")
    page, _ = inspected(*dialogues(data), "--model", str(tmp_path / "model"))
    assert page.rows() == inspected(*dialogues(data), *backbones)[0].rows()


def test_the_recipe_of_the_built_in_data_runs_and_writes_no_other_file(inspected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, said = inspected("--config", "shapes", "--stage", "pretrain", "--max_samples", "40", "--max_eval_samples",
                           "4", "--n", "3", "--tokenizer_dataset_name", "captions")  # fmt: skip
    assert len(page.samples) == 3 and "{<image> x 16}[[" in said and "evaluation data" in said
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_stream_is_shown_from_its_beginning(inspected, data, backbones):
    page, _ = inspected(*dialogues(data)[:3], *backbones, "--eval_share", "0", "--streaming", "--n", "2")
    assert page.rows()[0][0][1] == "prompt" and len(page.samples) == 2 and "row 1" in page.text


def test_without_arguments_the_usage_is_printed(capsys):
    main([])
    assert capsys.readouterr().out.startswith("usage: python -m training_vlm.inspect_data")


def test_errors_are_one_line(data, backbones, tmp_path, capsys):
    for argv, expected in (
        ([*dialogues(data)], "--text_model"),
        ([*dialogues(data), *backbones, "--n", "0"], "--n 0"),
        ([*dialogues(data), *backbones, "--model", "somewhere"], "both given"),
        ([*dialogues(data), "--model", backbones[3]], "gpt2 checkpoint"),
        ([str(tmp_path / "nowhere"), *backbones], "nowhere"),
        ([*dialogues(data), *backbones, "--max_lenght", "4"], "--max_length"),
        ([*dialogues(data), *backbones, "--stage", "pretrain", "--supervise", "last"], "stage 1"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(argv)
        assert exit.value.code == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and expected in lines[0]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser is installed")
def test_a_browser_draws_the_page_with_the_colours_of_its_legend(inspected, data, backbones, tmp_path):
    inspected(*dialogues(data), *backbones)
    subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={tmp_path / 'page.png'}",
            "--window-size=1200,1600", (tmp_path / "page.html").as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1200, 1600)
        colours = Counter(dict((colour, count) for count, colour in picture.convert("RGB").getcolors(1 << 24)))
    for look in KINDS.values():
        assert colours[ImageColor.getrgb(look.colour)] > 500


SAID = [("What is it?", "a cat"), ("Sure?", "yes")]
CHAT = [{"role": role, "content": text} for pair in SAID for role, text in zip(("user", "assistant"), pair)]
SPOKEN = [{"from": speaker, "value": text} for pair in SAID for speaker, text in zip(("human", "gpt"), pair)]
PLACED = [{**SPOKEN[0], "value": "<image>\nWhat is it?"}, *SPOKEN[1:]]
PARTS = [{**CHAT[0], "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}, *CHAT[1:]]

FORMATS = {
    "messages": {"messages": CHAT, "image": "0.png"},
    "messages in parts": {"messages": PARTS, "images": ["0.png"]},
    "prompt and completion": {"prompt": CHAT[:3], "completion": CHAT[3:], "images": ["0.png"]},
    "LLaVA": {"id": "1", "image": "0.png", "conversations": PLACED},
    "ShareGPT": {"conversations": SPOKEN, "system": "be brief"},
    "the_cauldron": {"images": ["0.png"], "texts": [{"user": q, "assistant": a, "source": "x"} for q, a in SAID]},
    "Flickr30k": {"image": "0.png", "caption": ["a cat", "yes"], "sentids": ["0", "1"], "filename": "0.png"},
    "caption": {"image": "0.png", "text": "a cat"},
    "question and answer": {"image": "0.png", "question": "What is it?", "answer": "a cat"},
    "question and answers": {"image": "0.png", "question": "What is it?", "answers": ["a dog", "a cat", "a cat"]},
    "plain text": {"messages": CHAT},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_without_a_flag_and_shown(name, folders, tmp_path, capsys):
    Image.new("RGB", (60, 40)).save(tmp_path / "0.png")
    write(tmp_path / "rows.jsonl", [FORMATS[name]] * 2)
    main([str(tmp_path / "rows.jsonl"), "--text_model", str(folders("vit-gpt2")[1]), "--n", "2"])
    shown = capsys.readouterr().out.split("--- 1 of 2", 1)[1]
    learned = [text.replace("·", " ").strip() for text in re.findall(r"\[\[(.*?)\]\]", shown)]
    answers = [text.removesuffix("<|endoftext|>") for text in learned]
    assert set(answers) <= {"a cat", "yes"} and answers
    assert ("{<image>}" in shown) == ("image" in FORMATS[name] or "images" in FORMATS[name])
    assert "dropped" not in shown


@pytest.mark.parametrize("max_tiles", [1, 4])
def test_an_image_that_several_samples_show_is_shown_with_each(max_tiles, image):
    processor = tiny.processor_of("byte-level", "chatml", max_tiles=max_tiles)
    one, wide = image(1), image(2, (200, 60))
    asked = [tiny.dialogue("what?", "a cat", *shown) for shown in ([one], [wide, one], [], [one])]
    together = read_samples(Encoder(processor), asked)
    apart = [sample for item in asked for sample in read_samples(Encoder(processor), [item])]
    for sample, alone in zip(together, apart, strict=True):
        assert [name for name, _ in sample.images] == [name for name, _ in alone.images]
        assert [view.tobytes() for _, view in sample.images] == [view.tobytes() for _, view in alone.images]
        assert [piece for piece in sample.pieces if piece.kind != "padding"] == alone.pieces
    tiles = [name for name, _ in together[1].images]
    assert len(tiles) == 2 if max_tiles == 1 else len(tiles) > 3
