"""Pictures of answers can be read whatever the script, and no text of the data is more than text."""

import pytest
from PIL import Image

from evaluation_vlm import fonts, gallery
from evaluation_vlm.fonts import Fonts
from evaluation_vlm.gallery import Shown, draw_gallery


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
    return Shown(Image.new("RGB", (32, 20), "red"), text, text, text, right=True)


def test_what_no_font_has_stands_on_a_page_beside_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(fonts, "system_fonts", lambda: [])
    page = draw_gallery([shown_of("<b>Где</b> кошка & co?"), shown_of("plain")], tmp_path / "samples.png")
    assert page == tmp_path / "samples.html"
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;Где&lt;/b&gt; кошка &amp; co?" in text and "<b>" not in text
    assert text.count("data:image/png;base64,") == 2
    assert Image.open(tmp_path / "samples.png").width == 2 * (gallery.IMAGE_SIDE + gallery.TEXT_WIDTH)


def test_a_picture_that_shows_all_needs_no_page(tmp_path):
    (tmp_path / "samples.html").write_text("of an earlier run")
    assert draw_gallery([shown_of("plain English")], tmp_path / "samples.png") is None
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]


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
    assert few < many <= 3 * (gallery.MOST_LINES + 1) * gallery.LINE + 2 * gallery.MARGIN


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (64, 64), (1, 1)])
def test_any_image_is_shown(size, tmp_path):
    draw_gallery([Shown(Image.new("RGB", size, "blue"), "what?", "a", "a", True)], tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").getpixel((gallery.MARGIN, gallery.MARGIN)) == (0, 0, 255)


def test_a_question_without_an_image_is_shown(tmp_path):
    draw_gallery([Shown(None, "what?", "a", "b", False)], tmp_path / "samples.png")
