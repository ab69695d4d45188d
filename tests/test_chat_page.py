"""The chat page does what people do with it, in a real browser; and it needs nothing but its server."""

import json
import re
import time
import urllib.error
import urllib.request

import pytest


pytest.importorskip("fastapi")

from evaluation_vlm.gallery import Shown  # noqa: E402
from evaluation_vlm.gallery_page import write_page  # noqa: E402
from inference_vlm.answering import Answerer, Finish  # noqa: E402
from inference_vlm.serving import chat_page  # noqa: E402
from inference_vlm.serving.examples import EXAMPLES, examples_of, is_captioner  # noqa: E402
from tests import tiny  # noqa: E402
from tests.browser import PROGRAM, browsing  # noqa: E402
from tests.serving import ask, data_url, said, serving, until  # noqa: E402


in_a_browser = pytest.mark.skipif(PROGRAM is None, reason="chromium is not here")
ESCAPE, ENTER, SHIFT = ("Escape", 27), ("Enter", 13, "\r"), 8


class Slow(Answerer):
    """Answers as fast as one reads, or says what it was told to."""

    says, seconds = "", 0.0

    def write(self, prepared, *args, tell, **options):
        def slowly(piece):
            tell(piece)
            time.sleep(self.seconds)

        if self.says:
            tell(self.says)
            return Finish("stop", prepared.prompt_tokens, prepared.image_tokens, 1, 0)
        return super().write(prepared, *args, tell=slowly, **options)


@pytest.fixture(scope="module")
def slow(folders):
    return Slow(*tiny.compose(*folders("siglip-llama"), "patch"))


@pytest.fixture
def answerer(slow, monkeypatch):
    """It answers at once, unless a test has it be slow."""
    monkeypatch.setattr(slow, "seconds", 0.0)
    return slow


@pytest.fixture(scope="module")
def server(slow):
    with serving(slow, max_new_tokens=40, max_images=2) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(answerer, server, browser):
    open_page(browser, server)
    yield browser
    assert not browser.complaints


@pytest.fixture
def pictures(tmp_path, image):
    """Three files."""
    files = [tmp_path / f"picture {number}.png" for number in range(3)]
    for number, file in enumerate(files):
        image(number).save(file)
    return files


def open_page(browser, server):
    browser.open(f"{server.url}/")
    browser.until("!document.querySelector('#composer').hidden")


def ask_it(page, question, ended=True):
    """Write a question and send it; the answer's text, once it has `ended`."""
    count = page.run("document.querySelectorAll('.answer').length")
    page.run("document.querySelector('#question').focus()")
    page.write(question)
    page.key(*ENTER)
    page.until(f"document.querySelectorAll('.answer').length !== {count} || !document.querySelector('#stop').hidden")
    if ended:
        page.until("document.querySelector('#stop').hidden")
    return answers(page)[-1]


def answers(page):
    return page.run("[...document.querySelectorAll('.answer .words')].map(words => words.textContent)")


def questions(page):
    return page.run("[...document.querySelectorAll('.question .words')].map(words => words.textContent)")


def text(page, selector):
    return page.run(f"[...document.querySelectorAll({selector!r})].filter(e => !e.hidden).at(-1)?.textContent ?? ''")


def click(page, selector):
    page.run(f"document.querySelector({selector!r}).click()")


def chosen(page, *files):
    page.upload("#files", *files)
    page.until(f"document.querySelectorAll('#pictures img').length === {len(files)}")


def said_by_the_api(server, *messages, **settings):
    """The answer's text, and what it took."""
    status, answer = ask(f"{server.url}/v1/chat/completions", {"model": "tiny", "messages": messages, **settings})
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["usage"]


@in_a_browser
def test_pictures_are_uploaded_and_asked_about_and_the_answer_is_seen_as_it_is_written(
    page, server, slow, pictures, image, monkeypatch
):
    expected, usage = said_by_the_api(server, said("what is it?", image(0), image(1)))
    monkeypatch.setattr(slow, "seconds", 0.02)
    chosen(page, *pictures[:2])
    ask_it(page, "what is it?", ended=False)
    seen = {answers(page)[-1]}
    while page.run("document.querySelector('#stop').hidden") is False:
        seen.add(answers(page)[-1])
    assert len(seen) > 4 and all(expected.startswith(part) for part in seen)
    assert answers(page) == [expected]
    assert page.run("document.querySelectorAll('.question img').length") == 2
    counts = text(page, ".counts")
    assert f"{usage['prompt_tokens']} tokens read (32 of pictures" in counts and "· 40 written ·" in counts
    share = -(-100 * usage["total_tokens"] // slow.max_positions)
    assert f"{share}\u00a0% of the context" in counts and text(page, "#context").strip().startswith(f"{share} % of")
    assert page.run("document.querySelector('#pictures').children.length") == 0


@in_a_browser
def test_escape_stops_an_answer_and_the_conversation_goes_on_from_what_was_written(page, server, slow, monkeypatch):
    monkeypatch.setattr(slow, "seconds", 0.05)
    ask_it(page, "hello", ended=False)
    page.until("document.querySelector('.answer .words').textContent.length > 2")
    page.key(*ESCAPE)
    page.until("document.querySelector('#stop').hidden")
    (partial,) = answers(page)
    assert partial and "stopped" in text(page, ".counts") and until(lambda: server.service.worker.inside == 0)
    monkeypatch.setattr(slow, "seconds", 0)
    messages = [said("hello"), said(partial, role="assistant"), said("and now?")]
    expected, _ = said_by_the_api(server, *messages)
    assert ask_it(page, "and now?") == expected != said_by_the_api(server, said("and now?"))[0]


@in_a_browser
def test_a_retry_asks_again_with_the_settings_of_now(page, server):
    click(page, "#open")
    page.run("document.querySelector('#temperature').value = 1.5; document.querySelector('#max_tokens').value = 9")
    page.run("document.querySelector('#seed').value = 1; document.querySelector('#system').value = 'be a cat'")
    click(page, "#close")
    wanted = {"temperature": 1.5, "max_tokens": 9}
    messages = [said("be a cat", role="system"), said("hello")]
    first, second = (said_by_the_api(server, *messages, **wanted, seed=seed)[0] for seed in (1, 2))
    assert ask_it(page, "hello") == first != second
    assert "cut: longest answer" in text(page, ".counts")
    page.run("document.querySelector('#seed').value = 2")
    click(page, ".retry")
    page.until(f"document.querySelector('.answer .words').textContent === {json.dumps(second)}")
    assert questions(page) == ["hello"]
    page.run(f"document.querySelector('#stops').value = {json.dumps(second[3:5])}")
    page.until("document.querySelector('#stop').hidden")
    click(page, ".retry")
    page.until(f"document.querySelector('.answer .words').textContent === {json.dumps(second[:3].rstrip())}")


@in_a_browser
def test_an_edited_question_drops_what_follows_as_it_says(page, server, pictures, image):
    chosen(page, pictures[0])
    first = ask_it(page, "what is it?")
    ask_it(page, "and where?")
    ask_it(page, "why?")
    page.write("a draft")
    click(page, ".edit")
    assert "drops the 2 turns after it" in text(page, "#editing")
    page.key(*ESCAPE)
    assert page.run("document.querySelector('#question').value") == "a draft"
    assert len(answers(page)) == 3 and answers(page)[0] == first
    click(page, ".edit")
    page.run("document.querySelector('#question').value = ''")
    assert ask_it(page, "how many?") == said_by_the_api(server, said("how many?", image(0)))[0]
    assert questions(page) == ["how many?"]
    assert page.run("document.querySelector('#question').value") == "a draft"


@in_a_browser
def test_pictures_are_pasted_dropped_and_removed_and_too_many_are_refused(page, pictures, image, tmp_path):
    page.run(
        f"""const text = atob({json.dumps(data_url(image(5)).partition(",")[2])});
        const bytes = Uint8Array.from(text, c => c.charCodeAt(0));
        const held = new DataTransfer(); held.items.add(new File([bytes], 'pasted.png', {{type: 'image/png'}}));
        document.querySelector('#question').dispatchEvent(
          new ClipboardEvent('paste', {{clipboardData: held, bubbles: true, cancelable: true}}))"""
    )
    page.until("document.querySelectorAll('#pictures img').length === 1")
    page.drop(pictures[0])
    page.until("document.querySelectorAll('#pictures img').length === 2")
    assert page.run("document.querySelector('#drop').hidden")
    page.drop(pictures[1])
    note = "document.querySelector('#note').textContent"
    assert "picture 1.png was not added. The server takes 2 pictures a conversation" in page.until(note)
    page.run("document.querySelector('#pictures button').click()")
    assert page.run("[...document.querySelectorAll('#pictures img')].map(image => image.alt)") == ["picture 0.png"]
    (tmp_path / "notes.txt").write_text("no picture")
    page.drop(tmp_path / "notes.txt")
    assert page.until(note) == "notes.txt is no picture."
    ask_it(page, "what is it?")
    page.drop(pictures[1], pictures[2])  # those of earlier turns are sent again, and count
    assert "these would be 3" in page.until(note)
    assert page.run("document.querySelectorAll('#pictures img').length") == 1


@in_a_browser
def test_what_the_server_refuses_is_one_line_and_the_conversation_goes_on(page, server, tmp_path):
    first = ask_it(page, "hello")
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    page.upload("#files", tmp_path / "broken.png")
    page.until("document.querySelector('#pictures .name') !== null")
    assert ask_it(page, "what is it?") == ""
    error = text(page, ".answer .error")
    assert error.startswith("messages[2].content[0].image_url") and "\n" not in error
    assert ask_it(page, "so many words " * 200) == "" and "leave out" in text(page, ".answer .error")
    messages = [said("hello"), said(first, role="assistant"), said("and now?")]
    assert ask_it(page, "and now?") == said_by_the_api(server, *messages)[0]


@in_a_browser
def test_a_conversation_and_its_settings_survive_a_reload_until_a_new_one_begins(page, server, pictures):
    chosen(page, pictures[0])
    page.run("document.querySelector('#max_tokens').value = 7")
    before = ask_it(page, "what is it?"), text(page, ".counts")
    page.write("half a question")
    page.go(f"{server.url}/")
    page.until("document.querySelectorAll('.answer').length === 1")
    assert (answers(page)[0], text(page, ".counts")) == before
    assert page.run("document.querySelector('.question img').naturalWidth") > 0
    assert page.run("document.querySelector('#question').value") == "half a question"
    assert page.run("document.querySelector('#max_tokens').value") == "7"
    click(page, "#new")
    assert questions(page) == [] and page.run("document.querySelector('#welcome').hidden") is False
    page.go(f"{server.url}/")
    page.until("!document.querySelector('#composer').hidden")
    assert questions(page) == []


@in_a_browser
def test_enter_that_composes_a_character_or_begins_a_line_does_not_send(page):
    page.write("图")
    for part in ("isComposing: true", "keyCode: 229"):
        event = f"new KeyboardEvent('keydown', {{key: 'Enter', {part}, bubbles: true, cancelable: true}})"
        assert page.run(f"document.querySelector('#question').dispatchEvent({event})")  # and the page leaves it alone
    page.key(*ENTER, SHIFT)
    page.write("片🟢")
    assert page.run("document.querySelector('#question').value") == "图\n片🟢" and questions(page) == []
    page.key(*ENTER)
    page.until("document.querySelector('.answer') && document.querySelector('#stop').hidden")
    assert questions(page) == ["图\n片🟢"]


@in_a_browser
@pytest.mark.parametrize(
    "says, direction", [("<img src=x onerror=alert(1)><b>bold</b>", "ltr"), ("الدائرة خضراء", "rtl")]
)
def test_what_a_model_says_is_text_in_its_own_direction(page, slow, monkeypatch, says, direction):
    monkeypatch.setattr(slow, "says", says)
    assert ask_it(page, "<i>what</i>") == says and questions(page) == ["<i>what</i>"]
    assert page.run("document.querySelectorAll('.words *').length") == 0
    assert page.run("getComputedStyle(document.querySelector('.answer .words')).direction") == direction


@in_a_browser
def test_a_key_is_asked_for_where_the_server_wants_one(slow, browser, answerer):
    with serving(slow, api_key="right-key", max_new_tokens=5) as server:
        browser.open(f"{server.url}/")
        browser.until("!document.querySelector('#door').hidden")
        for key in ("wrong", "right-key"):
            browser.run(
                f"document.querySelector('#key').value = {key!r}; document.querySelector('#door button').click()"
            )
            if key == "wrong":
                assert "Incorrect API key" in browser.until("document.querySelector('#note').textContent")
        browser.until("document.querySelector('#door').hidden && !document.querySelector('#composer').hidden")
        assert ask_it(browser, "hello")
        object.__setattr__(server.service.settings, "api_key", "another")
        ask_it(browser, "and now?")
        assert "Incorrect API key" in text(browser, ".answer .error")
        assert browser.run("document.activeElement.id") == "key"
        browser.run("document.querySelector('#key').value = 'another'; document.querySelector('#door button').click()")
        browser.until("document.querySelector('#door').hidden")
        click(browser, "#turns > :last-child .retry")
        browser.until("document.querySelector('#turns > :last-child .answer .words').textContent !== ''")
    assert not browser.complaints


@in_a_browser
@pytest.mark.parametrize("width, height", [(1280, 800), (420, 800), (320, 560)])
def test_nothing_is_out_of_reach_on_a_narrow_screen_or_a_wide_one(page, pictures, width, height):
    page.size(width, height)

    def check():
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("document.documentElement.scrollHeight") <= height
        assert page.run(
            "document.querySelector('#scroll').scrollWidth <= document.querySelector('#scroll').clientWidth"
        )
        outside = f"""[...document.querySelectorAll('button, textarea, input, .words, img')].filter(e => {{
          const {{left, right, width}} = e.getBoundingClientRect();
          return width && e.checkVisibility() && (left < 0 || right > {width}); }}).map(e => e.outerHTML)"""
        assert page.run(outside) == []

    check()
    chosen(page, *pictures[:2])
    check()
    ask_it(page, "w" * 150)
    click(page, ".edit")
    check()
    click(page, "#open")
    check()
    assert page.run("document.activeElement.id") == "system"


@in_a_browser
def test_a_captioner_says_so_and_captions_each_picture_by_itself(slow, answerer, browser, pictures, image):
    with serving(slow, is_captioner=True, max_new_tokens=8, max_images=1) as server:
        open_page(browser, server)
        assert "trained on captions alone" in text(browser, "#welcome p")
        for number in (0, 1):
            chosen(browser, pictures[number])
            expected = []
            slow.write(slow.read_caption([image(number)]), slow.settings(max_new_tokens=8), tell=expected.append)
            assert ask_it(browser, "") == "".join(expected)


@in_a_browser
def test_an_example_of_the_run_is_asked_and_its_right_answer_shown(slow, answerer, browser, image):
    with serving(slow, [{"question": "which?", "expected": "red", "image": data_url(image(3))}]) as server:
        open_page(browser, server)
        browser.write("a draft")
        click(browser, ".example")
        browser.until("document.querySelector('.answer') && document.querySelector('#stop').hidden")
        assert answers(browser) == [said_by_the_api(server, said("which?", image(3)))[0]]
        assert text(browser, ".counts").endswith("right answer: red")
        assert browser.run("document.querySelector('#question').value") == "a draft"


def test_a_model_that_draws_has_numbers_for_settings_that_it_does_not_say(server, answerer, monkeypatch):
    monkeypatch.setattr(answerer.model.generation_config, "do_sample", True)
    _, info = ask(f"{server.url}/info")
    assert (info["defaults"]["temperature"], info["defaults"]["top_p"]) == (1, 1)


def test_pictures_without_a_word_are_captioned_for_programs_too(server, answerer, image):
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(image(1))}}]}
    expected = []
    finish = answerer.write(
        answerer.read_caption([image(1)]), answerer.settings(max_new_tokens=6, temperature=0), tell=expected.append
    )
    found, usage = said_by_the_api(server, message, max_tokens=6, temperature=0)
    assert found == "".join(expected) and usage["prompt_tokens"] == finish.prompt_tokens


def test_examples_come_from_the_page_of_samples_with_their_pictures(tmp_path, image):
    shown = [
        Shown(image(number), f"what <b>is</b> {number}?", ("<red>", "crimson"), "generated") for number in range(20)
    ]
    (tmp_path / "samples.html").write_text(write_page("t", "s", {}, [*shown, *shown]))
    found = examples_of(tmp_path)
    assert len(found) == EXAMPLES and len({one["question"] for one in found}) == EXAMPLES
    assert found[0] == {"question": "what <b>is</b> 0?", "expected": "<red>", "image": data_url(image(0))}
    assert found[-1]["question"] == "what <b>is</b> 19?"


@pytest.mark.parametrize("content", [None, b"", b"<article><dd><img src=x><p class=asked>", b"\xff\xfe"])
def test_a_folder_without_samples_offers_none(tmp_path, content):
    if content is not None:
        (tmp_path / "samples.html").write_bytes(content)
    assert examples_of(tmp_path) == [] and is_captioner(str(tmp_path)) is False


@pytest.mark.parametrize(
    "tags, known", [("[duet, stage-1]", True), ("[duet, stage-2]", False), ("stage-1", False), ("[", False)]
)
def test_the_card_of_a_run_says_whether_it_was_trained_on_captions_alone(tmp_path, tags, known):
    (tmp_path / "README.md").write_text(f"---\ntags: {tags}\n---\n# A model\n")
    assert is_captioner(str(tmp_path)) is known


def test_the_page_needs_nothing_but_its_server_and_runs_nothing_but_its_files(server):
    files = {file.name: file.read_text(encoding="utf-8") for file in chat_page._FOLDER.iterdir()}
    for name, content in files.items():
        with urllib.request.urlopen(f"{server.url}/{'' if name == 'index.html' else f'page/{name}'}") as response:
            assert response.read().decode() == content
            policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'") and "unsafe" not in policy
        assert not re.search(r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", content), name
        assert set(re.findall(r'(?:src|href|from) ?=? ?"([^"]+)"', content)) <= {"data:,"} | {
            prefix + other for other in files for prefix in ("page/", "./")
        }
    for path in ("page/", "page/index.html", "page/../chat_page.py", "page/%2e%2e/chat_page.py", "page/none.js"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{server.url}/{path}")
        assert error.value.code == 404
