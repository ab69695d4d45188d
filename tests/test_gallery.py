"""Pictures of answers can be read whatever the script, and no text of the data is more than text."""

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import pytest
from PIL import Image

from evaluation_vlm import fonts, gallery
from evaluation_vlm.fonts import Fonts
from evaluation_vlm.gallery import Shown, draw_gallery
from evaluation_vlm.gallery_page import write_page


TEXTS = [
    "What is it?",
    "图片里有什么？这是一个很长的中文问题，需要换行，因为它不适合一行的宽度。",
    "Где кошка?",
    "Où est le garçon? ¿Dónde está el niño? Größe",
    "ما هذا؟",
    "यह क्या है? बिल्ली",
    "e\u0301 and 🙂",
    "x" * 500,
    "a tab\tand \x1b[31mcolours\x1b[0m and \u202eright to left",
    "",
]


def shown_of(text: str) -> Shown:
    return Shown(Image.new("RGB", (32, 20), "red"), text, (text,), text, 1.0, "exact match 100.0%", "good")


def test_what_no_font_has_is_told(tmp_path, monkeypatch):
    assert not draw_gallery([shown_of("plain English")], tmp_path / "samples.png").lacks
    monkeypatch.setattr(fonts, "system_fonts", lambda: [])
    drawn = draw_gallery([shown_of("<b>Где</b> кошка & co?"), shown_of("plain")], tmp_path / "samples.png")
    assert drawn.lacks and drawn.picture.width == 2 * (gallery.IMAGE_SIDE + gallery.TEXT_WIDTH)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]


NASTY = "</select><script>alert(1)</script><b a='\"'>Где</b> & \u202eco\x1b[31m"


def test_whatever_data_and_model_say_stands_on_the_page_as_text():
    shown = shown_of(NASTY)._replace(kind=NASTY, written=NASTY)
    page = write_page(NASTY, NASTY, {NASTY: NASTY}, [shown, shown._replace(kind="other")])
    kinds = {"html", "head", "meta", "title", "style", "body", "header", "h1", "p", "ul", "li", "b", "span", "form"}
    kinds |= {"input", "select", "option", "output", "main", "article", "figure", "img", "div", "dl", "dt", "dd"}
    tags = Tags()
    tags.feed(page)
    assert tags.found.keys() == {*kinds, "script"} and tags.found["script"] == 1 and tags.found["b"] == 1
    assert "\u202e" not in page.partition("<main>")[2] and "\x1b" not in page.partition("<main>")[2]
    assert tags.addresses == {"data"}  # it needs nothing else


class Tags(HTMLParser):
    """The tags of a page, and the schemes of what they point to."""

    def __init__(self):
        super().__init__()
        self.found, self.addresses = Counter(), set()

    def handle_starttag(self, tag, attrs):
        self.found[tag] += 1
        self.addresses |= {value.partition(":")[0] for name, value in attrs if name in ("src", "href", "action")}


def test_a_page_filters_by_kind_where_there_are_several():
    one, other = shown_of("a")._replace(kind="colour"), shown_of("b")._replace(kind="count")
    assert 'id="kind"' in write_page("t", "s", {}, [one, other])
    assert '<select id="kind"' not in write_page("t", "s", {}, [one, one])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not here")
@pytest.mark.parametrize("first, order", [("1", "low high none nothing"), ("-1", "high low none nothing")])
def test_what_has_no_score_is_last_in_either_order(tmp_path, first, order):
    none = {"score": None, "written": ""}
    low, high = (shown_of(word)._replace(asked=word) for word in ("low", "high"))
    page = write_page("t", "s", {}, [low, high, *(shown_of(w)._replace(asked=w, **none) for w in ("none", "nothing"))])
    (tmp_path / "page.html").write_text(page.replace(f'<option value="{first}">', f'<option value="{first}" selected>'))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'home'}"]
    command += ["--dump-dom", str(tmp_path / "page.html")]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.findall(r'class="asked" dir="auto">(\w+)<', drawn) == order.split()


@pytest.mark.parametrize("text", ["Где", "猫", "é", "ł"])
def test_a_character_is_drawn_in_a_font_that_has_it(text):
    ours = Fonts()
    list(ours._runs(text))
    if ours.missing:
        pytest.skip(f"no font of this machine has {text}")
    for run, font in ours._runs(text):
        for character in run:
            assert bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffe"))
    assert fonts._has(ours._fonts[0], "a") and not fonts._has(ours._fonts[0], "猫")


@pytest.mark.parametrize("with_fonts", [True, False])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_no_line_runs_out_of_its_cell_and_no_word_is_lost(text, with_fonts, monkeypatch):
    if not with_fonts:
        monkeypatch.setattr(fonts, "system_fonts", lambda: [])
    ours = Fonts()
    lines = ours.wrap(text, 200)
    assert all(ours.width(line) <= 200 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_a_cell_is_as_high_as_its_texts_and_no_text_runs_away(tmp_path):
    few, many = shown_of("a"), shown_of("word " * 100_000)
    draw_gallery([few], tmp_path / "few.png")
    draw_gallery([many], tmp_path / "many.png")
    few, many = (Image.open(tmp_path / name).height for name in ("few.png", "many.png"))
    assert few < many <= (3 * (gallery.MOST_LINES + 1) + 1) * gallery.LINE + 3 * gallery.MARGIN


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (64, 64), (1, 1)])
def test_any_image_is_shown(size, tmp_path):
    shown = Shown(Image.new("RGB", size, "blue"), "what?", ("a",), "a", 1.0, "100%", "good")
    draw_gallery([shown], tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").getpixel((gallery.MARGIN, gallery.MARGIN)) == (0, 0, 255)


def test_a_question_without_an_image_is_shown(tmp_path):
    draw_gallery([Shown(None, "what?", ("a",), "b", 0.0, "0%", "bad")], tmp_path / "samples.png")
