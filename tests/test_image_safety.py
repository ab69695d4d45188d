"""What data names is read, and nothing else: no path out of its folder, no device, no program, no endless memory."""

import io
import os
import pickle
import socket
import subprocess
import sys
import warnings

import datasets
import pytest
from PIL import EpsImagePlugin, Image, features

from processing.batching.dataset import ConversationDataset
from processing.batching.encoding import Encoder, encode_caption
from processing.image_files_vlm import BadImage, ImagePolicy, NamedImage, image_size, load_image, resolve_reference
from processing.images_vlm import MANY_PIXELS, MOST_STRETCHED, bounded_size, trim
from processing.reading.items import Reading
from tests import tiny
from tests.broken_media import bomb, photograph


def stored(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refused(reference) -> str:
    with pytest.raises(BadImage) as caught:
        load_image(reference)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600
    return line


# --- paths


@pytest.fixture
def folders(tmp_path):
    """A folder of images with links of every kind, and a secret beside it."""
    pics, secret = tmp_path / "pics", tmp_path / "secret"
    for folder in (pics / "inner", secret):
        folder.mkdir(parents=True)
    Image.new("RGB", (6, 4), "red").save(pics / "inner/a.png")
    Image.new("RGB", (9, 9), "blue").save(secret / "s.png")
    (pics / "inside.png").symlink_to("inner/a.png")
    (pics / "also inside").symlink_to(pics / "inner")
    (pics / "out.png").symlink_to("../secret/s.png")
    (pics / "absolute.png").symlink_to(secret / "s.png")
    (pics / "twice.png").symlink_to("out.png")
    (pics / "away").symlink_to(secret)
    (tmp_path / "link to pics").symlink_to(pics)
    return tmp_path


@pytest.mark.parametrize("folder", ["pics", "link to pics"])
@pytest.mark.parametrize("name", ["inner/a.png", "inside.png", "also inside/a.png"])
def test_links_within_the_folder_are_followed(folders, folder, name):
    assert load_image(resolve_reference(name, ImagePolicy(folders / folder))).size == (6, 4)


@pytest.mark.parametrize("folder", ["pics", "link to pics"])
@pytest.mark.parametrize("name", ["out.png", "absolute.png", "twice.png", "away/s.png", "inner/../away/s.png"])
def test_a_link_out_of_the_folder_is_refused_unless_links_are_allowed(folders, folder, name):
    for path in (name, str(folders / folder / name)):
        line = refused(resolve_reference(path, ImagePolicy(folders / folder)))
        assert "a link to" in line and "if the link is your own, add --allow_links" in line
        allowed = resolve_reference(path, ImagePolicy(folders / folder, allow_links=True))
        assert load_image(allowed).size == (9, 9)
    with pytest.raises(ValueError, match="lies outside"):
        resolve_reference("../secret/s.png", ImagePolicy(folders / folder, allow_links=True))


def test_where_a_link_leads_is_looked_at_when_it_is_opened(folders):
    reference = resolve_reference("inner/a.png", ImagePolicy(folders / "pics"))
    reference = pickle.loads(pickle.dumps(reference))  # as it gets into a worker
    assert load_image(reference).size == (6, 4)
    (folders / "pics/inner/a.png").unlink()
    (folders / "pics/inner/a.png").symlink_to(folders / "secret/s.png")
    assert "a link to" in refused(reference)
    with pytest.raises(BadImage):
        image_size(reference)


def test_what_is_encoded_ahead_forgets_no_policy(folders):
    rows = datasets.Dataset.from_list([{"image": "inner/a.png", "caption": "a"}, {"image": "out.png", "caption": "b"}])
    dataset = ConversationDataset(rows, Reading(source="s", images=ImagePolicy(str(folders / "pics"))))
    later = [dataset[index]["images"][0] for index in range(2)]
    dataset.encode_ahead(Encoder(tiny.processor_of("byte-level", "chatml"), encode_caption))
    ahead = [dataset[index]["images"][0] for index in range(2)]
    for inside, out in (later, ahead):
        assert load_image(inside).size == (6, 4) and "--allow_links" in refused(out)


def test_the_hubs_own_links_are_followed(tmp_path):
    """Its cache keeps the files of a repository once, and links to them from each revision."""
    repo = tmp_path / "hub/datasets--me--walls"
    for folder in (repo / "blobs", repo / "snapshots/1/train", tmp_path / "hub/datasets--you--walls/blobs"):
        folder.mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(repo / "blobs/abc", "PNG")
    Image.new("RGB", (9, 9)).save(tmp_path / "hub/datasets--you--walls/blobs/abc", "PNG")
    own, other = repo / "snapshots/1/train/a.png", repo / "snapshots/1/train/b.png"
    own.symlink_to("../../../blobs/abc")
    other.symlink_to("../../../../datasets--you--walls/blobs/abc")
    for policy in (ImagePolicy(caches=(str(repo),)), ImagePolicy(repo / "snapshots/1"), ImagePolicy(own.parent)):
        assert load_image(resolve_reference(str(own), policy)).size == (6, 4)
        assert "--allow_links" in refused(resolve_reference(str(other), policy))


NOT_OUT = [
    "..%2fsecret/s.png",
    "%2e%2e/secret/s.png",
    "..\\secret\\s.png",
    "C:\\secret\\s.png",
    "~/s.png",
    "$HOME/s.png",
]
NOT_OUT += [
    "\\\\server\\share\\s.png",
    "INNER/A.PNG",
    "../PICS/inner/a.png ",
    "inner/a.png\0",
    "a\ud800.png",
    "x" * 5000,
]


@pytest.mark.parametrize("name", NOT_OUT)
def test_no_way_of_writing_a_path_leads_out(folders, name):
    with pytest.raises(ValueError) as caught:
        load_image(resolve_reference(name, ImagePolicy(folders / "pics")))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_a_path_of_ones_own_leads_anywhere(folders):
    for path in (folders / "pics/out.png", str(folders / "pics/away/s.png")):
        assert load_image(path).size == (9, 9)


# --- what is no regular file


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, kind):
    """A pipe that nobody writes to would hold a worker for ever, and a device gives bytes without end."""
    monkeypatch.chdir(tmp_path)
    if kind == "pipe":
        os.mkfifo("a.png")
    elif kind == "device":
        os.symlink("/dev/zero", "a.png")
    elif kind == "folder":
        os.mkdir("a.png")
    else:
        socket.socket(socket.AF_UNIX).bind("a.png")
    os.symlink("a.png", "link.png")
    for name in ("a.png", "link.png"):
        for reference in (
            name,
            tmp_path / name,
            NamedImage(str(tmp_path / name), ImagePolicy(tmp_path, allow_links=True)),
        ):
            assert "no regular file" in refused(reference)


# --- formats


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_formats_of_pictures_are_read_whatever_their_name(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    (tmp_path / "a.xyz").write_bytes(stored(photograph(64, 48), kind))
    assert load_image(tmp_path / "a.xyz").size == (64, 48)


def test_a_picture_of_a_phone_with_a_second_one_in_it_is_decoded_smaller(tmp_path):
    photograph(640, 480).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[photograph(64, 48)])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    assert load_image(tmp_path / "a.jpg", (48, 64)).size == (80, 60)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "ICNS", "IM", "PCX", "SGI", "TGA", "DDS", "SPIDER", "MSP"])
def test_no_other_format_is_read_whatever_its_name(tmp_path, monkeypatch, kind):
    def never(*args, **kwargs):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", never)
    mode = {"MSP": "1", "SPIDER": "F"}.get(kind, "RGB")
    (tmp_path / "a.png").write_bytes(stored(photograph(64, 64).convert(mode), kind))
    assert "its format is not recognised as one of" in refused(tmp_path / "a.png")


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.7\n", b"\x89HDF\r\n\x1a\n"]
)
def test_programs_and_documents_are_no_pictures(content):
    assert "its format is not recognised" in refused({"bytes": content + bytes(999), "path": "a.png"})


# --- memory


def test_an_image_of_very_many_pixels_is_halved_until_it_has_fewer(tmp_path):
    assert bounded_size(8192, 4096) == (8192, 4096), "an ordinary large image stays as it is"
    assert bounded_size(8192, 4097) == (4096, 2049) and bounded_size(9400, 9400) == (4700, 4700)
    (tmp_path / "a.png").write_bytes(bomb(9000, 5000))
    image = load_image(tmp_path / "a.png")
    assert image.size == (4500, 2500) and image.getpixel((0, 0)) == (255, 255, 255)
    assert image.width * image.height <= MANY_PIXELS


def test_the_tiles_of_a_very_large_image_follow_from_its_stored_size():
    processor = tiny.processor_of("byte-level", "chatml", max_tiles=6)
    for size in ((9400, 9400), (60_000, 700), (700, 60_000), (8192, 4097)):
        assert processor.tile_grid(*size) == processor.tile_grid(*bounded_size(*size))


def test_a_line_is_trimmed_before_its_short_side_is_scaled_up():
    assert trim(Image.new("L", (100, 1))).size == (100, 1) and MOST_STRETCHED == 100
    line = Image.new("L", (1, 60_000))
    line.paste(255, (0, 29_900, 1, 30_100))
    trimmed = trim(line)
    assert trimmed.size == (1, 100) and trimmed.getextrema() == (255, 255), "its middle"


CHILD = """
import resource, sys
from pathlib import Path
from PIL import Image
from processing import VLMDataCollator
from tests import tiny
from tests.broken_media import bomb

folder = Path(sys.argv[1])
for name in ("bomb.png", "other.png"):
    (folder / name).write_bytes(bomb(9400, 9400))
Image.new("RGB", (1, 60_000)).save(folder / "line.png")
found = []
for kind, names in (("vit", ["bomb.png", "other.png"]), ("clip", ["line.png"])):
    (folder / kind).mkdir()
    processor = tiny.processor_seeing(kind, folder / kind, (224, 224))
    samples = [tiny.dialogue("what?", "a", str(folder / name)) for name in names]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(VLMDataCollator(processor)(samples)["pixel_values"]) == len(names)
    found.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
print("MB:", max(found))
"""


def test_a_batch_of_the_largest_images_that_are_read_needs_half_a_gigabyte(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rpartition("MB:")[2]) < 600


def test_an_image_larger_than_the_limit_is_refused_whatever_another_thread_does_about_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "simplefilter", lambda *given: None)
    warnings.filterwarnings("ignore")  # as one that opens an image at the same moment
    for read in (load_image, image_size):
        with pytest.raises(BadImage, match="more pixels than the limit"):
            read({"bytes": bomb(10_000, 9_000), "path": "it"})
