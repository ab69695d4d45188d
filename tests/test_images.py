"""Whatever an image reference is, it gives upright RGB, or one line that names it and says what to do."""

import base64
import io
import pickle
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from processing import image_files_vlm as images
from processing import image_urls_vlm as urls
from processing.batching.account import DROP_REASONS
from processing.image_files_vlm import (
    NO_FOLDER,
    BadImage,
    ImagePolicy,
    MissingImage,
    check_image,
    load_image,
    resolve_reference,
)
from tests.broken_media import LYING, bomb, make_corpus, photograph


def one_line(caught) -> str:
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


def local(url: str) -> str:
    """A URL that may lead to a server of this machine."""
    return resolve_reference(url, ImagePolicy(allow_urls=True, allow_local_urls=True))


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, dict[str, str | None]]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, make_corpus(folder)


# --- what an image looks like


def test_every_kind_of_reference_loads_the_same_image(tmp_path):
    image, path = Image.new("RGB", (3, 2), "red"), tmp_path / "a.png"
    image.save(path)
    data = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    in_row = {"bytes": path.read_bytes(), "path": "gone.png"}
    for reference in (image, str(path), path, in_row, {"bytes": None, "path": str(path)}, data):
        reference = resolve_reference(reference, ImagePolicy(tmp_path))
        check_image(reference)
        loaded = load_image(reference)
        assert (loaded.mode, loaded.size, loaded.getpixel((0, 0))) == ("RGB", (3, 2), (255, 0, 0))
    assert image.getpixel((0, 0)) == (255, 0, 0), "the caller's image is still open"


def test_every_file_of_the_corpus_is_read_or_refused_with_its_reason(corpus, recwarn):
    """Any other error, or a warning, would end a run or fill its screen."""
    folder, reasons = corpus
    assert set(reasons.values()) - {None} < set(DROP_REASONS)
    for name, reason in reasons.items():
        if reason is None:
            check_image(folder / name)
            assert load_image(folder / name).mode == "RGB"
            continue
        for size in (None, (4, 4)):
            with pytest.raises(BadImage) as caught:
                load_image(folder / name, size)
            assert caught.value.reason == reason and one_line(caught).startswith(str(folder / name))
            assert isinstance(caught.value, FileNotFoundError) == (name == "missing.jpg")
        if name != "truncated.jpg":  # its header is whole
            with pytest.raises(BadImage):
                check_image(folder / name)
    assert not recwarn.list


def test_every_reason_is_one_of_the_account():
    assert {images.MISSING, images.UNREADABLE, images.TOO_LARGE, images.NOT_FETCHED} <= set(DROP_REASONS)


def test_an_image_is_upright_opaque_8_bit_rgb_of_its_first_frame(corpus):
    folder, _ = corpus
    pixels = {
        name: np.asarray(load_image(folder / name)).astype(int)
        for name in (
            "plain.jpg",
            "rotated.jpg",
            "alpha.png",
            "palette.png",
            "16bit.png",
            "cmyk.jpg",
            "animated.gif",
            "20000x1.png",
        )
    }
    original = np.asarray(photograph(64, 48)).astype(int)

    def distance(one, other) -> float:
        return abs(one - other).mean()

    assert pixels["rotated.jpg"].shape == (64, 48, 3)
    assert distance(pixels["rotated.jpg"], np.rot90(pixels["plain.jpg"], -1)) == 0
    assert (pixels["alpha.png"][:, :32] == 255).all() and distance(pixels["alpha.png"][:, 32:], original[:, 32:]) == 0
    assert (load_image(Image.new("LA", (2, 2), (0, 128))).getpixel((0, 0))) == (127, 127, 127)
    assert distance(pixels["16bit.png"], np.asarray(photograph(64, 48).convert("L")).astype(int)[..., None]) < 1
    assert distance(pixels["palette.png"], original) < 20
    assert distance(pixels["cmyk.jpg"], original) < 10
    assert (pixels["animated.gif"] == (255, 0, 0)).all()
    assert pixels["20000x1.png"].shape == (1, 20_000, 3)


def test_a_transparent_palette_is_laid_on_white(tmp_path):
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "a.png", transparency=0)
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


# --- large images


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_a_jpeg_is_decoded_smaller_but_never_below_the_wanted_size(turned, wide):
    photo = photograph(*((900, 500) if wide else (500, 900)))
    exif = Image.Exif()
    exif[0x0112] = LYING if turned else 1
    reference = {"bytes": stored(photo, "JPEG", quality=90, exif=exif), "path": None}
    full = load_image(reference)
    assert full.size == (photo.size[::-1] if turned else photo.size)
    for height, width in ((100, 100), (100, 230), (224, 100), (63, 112), (112, 63), (1, 1), (251, 10)):
        loaded = load_image(reference, (height, width))
        assert loaded.width >= width and loaded.height >= height
        scale = min(full.width // width, full.height // height)
        assert (loaded.width < full.width) == (scale >= 2), "a reduced decode, wherever the size allows one"
        small, expected = (np.asarray(i.resize((width, height), Image.BICUBIC)).astype(int) for i in (loaded, full))
        assert abs(small - expected).mean() < 2
    assert load_image(reference, (600, 600)).size == full.size


def test_only_a_jpeg_file_is_reduced():
    photo = photograph(400, 300)
    assert load_image({"bytes": stored(photo), "path": None}, (10, 10)).size == (400, 300)
    opened = Image.open(io.BytesIO(stored(photo, "JPEG")))
    assert load_image(opened, (10, 10)).size == opened.size == (400, 300), "the caller's own image stays as it is"


@pytest.mark.parametrize("side", [15_000, 10_000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side):
    """Beyond twice Pillow's limit, where Pillow refuses, and between that and the limit, where it only warns."""
    content = bomb(side, side)
    assert len(content) < 100_000
    for read in (load_image, check_image):
        with warnings.catch_warnings(record=True) as warned, pytest.raises(BadImage) as caught:
            warnings.simplefilter("always")
            read({"bytes": content, "path": "bomb.png"})
        assert caught.value.reason == "image too large" and not warned
        assert one_line(caught).startswith("bomb.png: more pixels than the limit of 89,478,485")


def test_the_limit_is_pillows_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    load_image({"bytes": stored(Image.new("L", (10, 10))), "path": None})
    with pytest.raises(BadImage, match="the limit of 100,"):
        load_image({"bytes": stored(Image.new("L", (10, 11))), "path": None})


# --- messages


def test_an_error_is_one_line_that_names_the_image(tmp_path):
    (tmp_path / "text\n.jpg").write_text("no image")
    with pytest.raises(FileNotFoundError) as caught:
        load_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    assert one_line(caught).startswith(f"{tmp_path / 'gone.jpg'}: no such image file; check the path")
    with pytest.raises(BadImage) as caught:
        load_image(tmp_path / "text\n.jpg")
    assert "its format is not recognised as one of AVIF, BMP, " in one_line(caught)
    with pytest.raises(BadImage) as caught:
        load_image({"bytes": b"no image", "path": None})
    assert "an image stored in its row (8 bytes): not a readable image" in one_line(caught)
    for data in ("data:image/png;base64," + "A" * 999, "data:image/png;base64,*"):
        with pytest.raises(BadImage) as caught:
            load_image(data)
        assert "data:image/png;base64," in one_line(caught) and caught.value.reason == "unreadable image"
    with pytest.raises(ValueError) as caught:
        load_image(None)
    assert "found NoneType where an image was expected" in one_line(caught)


@pytest.mark.parametrize("kind", [BadImage, MissingImage])
def test_an_error_comes_out_of_a_worker_process_whole(kind):
    error = pickle.loads(pickle.dumps(kind("a.jpg: gone", "missing image file")))
    assert (type(error), str(error), error.reason) == (kind, "a.jpg: gone", "missing image file")


# --- where a reference points


def test_a_path_is_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = str(tmp_path / "pics/a.png")
    for reference in ("a.png", Path("a.png"), "./b/../a.png", expected, {"bytes": None, "path": "a.png"}):
        for folder in (tmp_path / "pics", "pics"):
            assert resolve_reference(reference, ImagePolicy(folder)) == expected
    for reference in (expected, {"bytes": None, "path": expected}):
        assert resolve_reference(reference, NO_FOLDER) == expected
    kept = (Image.new("L", (1, 1)), {"bytes": b"x", "path": "../a.png"}, "data:image/png;base64,AAAA")
    for reference in kept:
        assert resolve_reference(reference, ImagePolicy("pics")) is resolve_reference(reference, NO_FOLDER) is reference


def test_the_folder_of_the_images_may_be_a_link(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pics")
    for folder in ("pics", "link"):
        for named in ("pics", "link"):
            path = str(tmp_path / named / "a.png")
            assert resolve_reference(path, ImagePolicy(tmp_path / folder)) == path
    with pytest.raises(ValueError, match="lies outside"):
        resolve_reference("../a.png", ImagePolicy(tmp_path / "link"))


REFUSED = [
    ("../a.png", "pics", "lies outside"),
    ("/etc/a.png", "pics", "lies outside"),
    ("b/../../a.png", "pics", "lies outside"),
    ({"bytes": None, "path": "../a.png"}, "pics", "lies outside"),
    ("a.png", None, "is the path a.png; name the folder it is relative to with --image_dir"),
    ({"bytes": None, "path": "a.png"}, None, "name the folder it is relative to with --image_dir"),
    ("https://example.org/a.png", "pics", "is a URL; add --allow_urls, or fetch the images"),
    ("HTTP://example.org/a.png", None, "is a URL; add --allow_urls"),
    ({"bytes": None, "path": "https://example.org/a.png"}, "pics", "is a URL; add --allow_urls"),
    ("file:///etc/passwd", "pics", "is of an unknown scheme"),
    ("file:/etc/passwd", "/etc", "is of an unknown scheme"),
    ("hf://datasets/a/b/a.png", None, "is of an unknown scheme"),
    ("s3://bucket/a.png", "pics", "is of an unknown scheme"),
    ("data:text/plain,hello", "pics", "is of an unknown scheme"),
    ("", "pics", "found str where an image was expected"),
    ({"bytes": None, "path": None}, "pics", "found dict where an image was expected"),
    (None, "pics", "found NoneType where an image was expected"),
    (["a.png"], "pics", "found list where an image was expected"),
]


@pytest.mark.parametrize("path", ["/etc/a.png", "/cache/datasets--me--x/../y/a.png", "/cache/datasets--me--xy/a.png"])
def test_a_data_set_of_the_hub_names_no_file_of_this_machine_but_its_own(path):
    policy = ImagePolicy(caches=("/cache/datasets--me--x",))
    own = "/cache/datasets--me--x/snapshots/1/a.png"
    assert resolve_reference({"bytes": None, "path": own}, policy) == own
    for reference in (path, {"bytes": None, "path": path}):
        with pytest.raises(ValueError, match="of this machine, which data may not choose; name the folder") as caught:
            resolve_reference(reference, policy)
        one_line(caught)


@pytest.mark.parametrize(("reference", "folder", "message"), REFUSED)
def test_a_reference_that_leads_nowhere_or_out_of_its_folder_is_one_line(reference, folder, message):
    with pytest.raises(ValueError) as caught:
        resolve_reference(reference, ImagePolicy(folder))
    assert message in one_line(caught)
    if message == "lies outside":
        assert "--image_dir" in one_line(caught)


# --- URLs


@pytest.fixture
def server(monkeypatch):
    """The address of a server of this machine that has an image, a redirect to it, and some that never come."""
    content = stored(photograph(64, 48), "JPEG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path in ("/slow.jpg", "/stuck.jpg", "/endless.jpg"):
                self.send_response(200)
                self.end_headers()
                pause = {"/slow.jpg": 0.1, "/stuck.jpg": 2}.get(self.path, 0)
                try:
                    for _ in range(20 if pause else 200):
                        self.wfile.write(bytes(10 if pause else 1000))
                        time.sleep(pause)
                        if pause == 2:
                            break
                except OSError:
                    pass
                return
            self.send_response({"/ok.jpg": 200, "/moved.jpg": 302}.get(self.path, 404))
            if self.path == "/moved.jpg":
                self.send_header("Location", "/ok.jpg")
            self.end_headers()
            self.wfile.write(content if self.path == "/ok.jpg" else b"")

        def log_message(self, *args):
            pass

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["ok.jpg", "moved.jpg"])
def test_an_image_is_fetched_where_urls_are_allowed(server, name):
    for reference in (f"{server}/{name}", {"bytes": None, "path": f"{server}/{name}"}):
        reference = resolve_reference(reference, ImagePolicy("pics", allow_urls=True, allow_local_urls=True))
        check_image(reference)
        assert load_image(reference).size == (64, 48)
        assert load_image(reference, (12, 12)).size == (16, 12)


FAILURES = [
    ("gone.jpg", "the server answers 404", "image could not be fetched"),
    ("endless.jpg", "more than 50,000 bytes", "image too large"),
    ("slow.jpg", "not there within 0.5 seconds", "image could not be fetched"),
    ("stuck.jpg", "not there within 0.5 seconds", "image could not be fetched"),
]


@pytest.mark.parametrize(("name", "message", "reason"), FAILURES)
def test_what_cannot_be_fetched_is_one_line_in_good_time(server, monkeypatch, name, message, reason):
    monkeypatch.setattr(urls, "FETCH_BYTES", 50_000)
    monkeypatch.setattr(urls, "FETCH_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(BadImage) as caught:
        load_image(local(f"{server}/{name}"))
    assert time.monotonic() - started < 1.5
    assert one_line(caught).startswith(f"{server}/{name}: ") and message in one_line(caught)
    assert caught.value.reason == reason


def test_an_address_without_a_server_and_an_offline_hub_are_one_line(server, monkeypatch):
    for address in ("http://127.0.0.1:9/a.jpg", "http://[/a.jpg", "http:///a.jpg"):
        with pytest.raises(BadImage) as caught:
            load_image(local(address))
        assert one_line(caught).startswith(f"{address}: the image could not be fetched (")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadImage, match="HF_HUB_OFFLINE is set"):
        load_image(local(f"{server}/ok.jpg"))
