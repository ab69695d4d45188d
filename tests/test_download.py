"""COCO is fetched into its own layout, continued where it broke off, and nothing half-done is taken for whole."""

import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
from PIL import Image

from processing.image_files_vlm import load_image
from processing.reading.download import download_coco
from processing.reading.sources import open_source


class Server:
    """Two archives as COCO's server gives them, with the mishaps of a long transfer on request."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        """Path and Range of every GET."""
        self.cuts: list[int] = []
        """For the next GETs, after how many bytes the connection breaks."""
        self.ranges = True
        self.lost = b""
        """What is missing at the end of every file, although its length was announced by HEAD."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        content = self.files.get(request.path)
        if content is None:
            request.send_error(404)
            return
        asked = request.headers.get("Range")
        if request.command == "GET":
            self.asked.append((request.path, asked))
            content = content.removesuffix(self.lost)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        if request.command == "GET":
            end = start + self.cuts.pop(0) if self.cuts else len(content)
            request.wfile.write(content[start:end])
            request.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            served.answer(self)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{http.server_port}"
    captions = {
        "images": [{"id": key, "file_name": f"{key:012}.jpg"} for key in (9, 25)],
        "annotations": [{"id": key, "image_id": key, "caption": f"Number {key}."} for key in (9, 25)],
    }
    served.files["/annotations/annotations_trainval2017.zip"] = zipped(
        {
            "annotations/instances_train2017.json": b"{}",
            "annotations/captions_train2017.json": json.dumps(captions).encode(),
            "annotations/captions_val2017.json": json.dumps(captions).encode(),
        }
    )
    picture = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(picture, "JPEG")
    served.files["/zips/train2017.zip"] = zipped({f"train2017/{key:012}.jpg": picture.getvalue() for key in (9, 25)})
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield served
    http.shutdown()
    http.server_close()
    thread.join()


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def check(root) -> None:
    """The folder is whole, is read, and holds nothing else."""
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()) == [
        "annotations/captions_train2017.json",
        "train2017/000000000009.jpg",
        "train2017/000000000025.jpg",
    ]
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    source = open_source(root)
    rows, image_dir = source.rows, source.image_dir
    assert rows["caption"][:] == [["Number 9."], ["Number 25."]]
    assert load_image(image_dir / rows[1]["image"]).size == (32, 32)


def test_coco_arrives_in_its_layout_with_a_progress_bar_and_only_once(server, tmp_path, capfd):
    root = tmp_path / "data/coco"
    datasets.enable_progress_bars()
    try:
        download_coco(root, base_url=server.url)
    finally:
        datasets.disable_progress_bars()
    check(root)
    shown = capfd.readouterr().err
    assert "train2017.zip" in shown and "100%" in shown and "Unpacking" in shown
    assert len(server.asked) == 2
    download_coco(root, base_url=server.url)
    assert len(server.asked) == 2, "what is there is not asked for again"


def test_a_broken_connection_is_continued_within_the_call(server, tmp_path):
    server.cuts = [100, 50]
    download_coco(tmp_path / "coco", base_url=server.url)
    check(tmp_path / "coco")
    assert [asked for _, asked in server.asked[:3]] == [None, "bytes=100-", "bytes=150-"]


def test_an_interrupted_run_is_continued_by_the_next(server, tmp_path):
    root = tmp_path / "coco"
    server.cuts = [300] + [0] * 20
    with pytest.raises(ConnectionError) as caught:
        download_coco(root, base_url=server.url)
    assert "run the same command again to continue" in str(caught.value) and "\n" not in str(caught.value)
    part = root / "annotations_trainval2017.zip.part"
    assert part.read_bytes() == server.files["/annotations/annotations_trainval2017.zip"][:300]
    server.cuts, server.asked = [], []
    download_coco(root, base_url=server.url)
    check(root)
    assert server.asked[0] == ("/annotations/annotations_trainval2017.zip", "bytes=300-")


def test_a_fetched_archive_is_unpacked_without_fetching_it_again(server, tmp_path):
    root = tmp_path / "coco"
    (root / ".unpacking-train2017/train2017").mkdir(parents=True)
    (root / ".unpacking-train2017/train2017/half.jpg").touch()  # where an earlier run was stopped
    (root / "train2017.zip").write_bytes(server.files["/zips/train2017.zip"])
    download_coco(root, base_url=server.url)
    check(root)
    assert [path for path, _ in server.asked] == ["/annotations/annotations_trainval2017.zip"]


def test_a_server_that_cannot_continue_starts_again(server, tmp_path):
    server.ranges, server.cuts = False, [300]
    download_coco(tmp_path / "coco", base_url=server.url)
    check(tmp_path / "coco")


def test_a_part_of_another_file_is_not_continued(server, tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/train2017.zip.part").write_bytes(b"x" * 100_000)
    download_coco(tmp_path / "coco", base_url=server.url)
    check(tmp_path / "coco")


def test_a_file_of_the_wrong_size_is_not_taken(server, tmp_path):
    server.lost = server.files["/zips/train2017.zip"][-10:]
    with pytest.raises(ConnectionError, match="train2017.zip: cannot be fetched"):
        download_coco(tmp_path / "coco", base_url=server.url)
    assert not (tmp_path / "coco/train2017").exists() and not (tmp_path / "coco/train2017.zip").exists()


@pytest.mark.parametrize(
    "content", [b"<html>Log in to this network</html>", zipped({"other/a.jpg": b"x"})], ids=["page", "other files"]
)
def test_an_archive_that_is_none_is_one_line_and_does_not_stay(server, tmp_path, content):
    server.files["/zips/train2017.zip"] = content
    with pytest.raises(ValueError) as caught:
        download_coco(tmp_path / "coco", base_url=server.url)
    assert "/zips/train2017.zip: not the archive that was expected (" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "coco").iterdir()) == ["annotations"]


def test_an_archive_writes_only_into_its_folder(server, tmp_path):
    server.files["/zips/train2017.zip"] = zipped(
        {"train2017/../../evil.txt": b"x", "/evil.txt": b"x", "evil.txt": b"x"}
    )
    root = tmp_path / "a/b/coco"
    download_coco(root, base_url=server.url)
    assert [path for path in tmp_path.rglob("evil.txt") if not path.is_relative_to(root / "train2017")] == []


def test_a_broken_image_in_the_archive_is_noticed(server, tmp_path):
    name = "/zips/train2017.zip"
    place = server.files[name].index(b"JFIF")
    server.files[name] = server.files[name][:place] + b"XXXX" + server.files[name][place + 4 :]
    with pytest.raises(ValueError, match="Bad CRC-32"):
        download_coco(tmp_path / "coco", base_url=server.url)
    assert not (tmp_path / "coco/train2017").exists()


def test_no_server_or_no_such_file_is_one_line(server, tmp_path, monkeypatch):
    with pytest.raises(ConnectionError) as caught:
        download_coco(tmp_path / "coco", base_url="http://127.0.0.1:9")
    assert "http://127.0.0.1:9/annotations/annotations_trainval2017.zip: cannot be fetched (" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConnectionError) as caught:
        download_coco(tmp_path / "coco", ["val2014"], base_url=server.url)
    assert "404" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline mode"):
        download_coco(tmp_path / "coco", base_url=server.url)


def test_a_split_that_coco_does_not_have_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="COCO has no captions for 'test2017'; expected train2017, val2017"):
        download_coco(tmp_path, ["test2017"])
