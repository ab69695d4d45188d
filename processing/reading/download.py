"""COCO's captions, fetched: `--download` brings a COCO folder into the layout that `coco.py` reads.

    ROOT/annotations/captions_train2017.json
    ROOT/train2017/000000000009.jpg ...

Archives arrive as `*.part` files, which a later call continues where the connection broke, and are unpacked beside
their place and moved there when complete: a folder that is there is whole.
"""

import os
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

from datasets.utils import tqdm
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import get_session, httpx

from ..data_error_vlm import DuetError, NotReached
from .odd import reason


COCO_URL = "http://images.cocodataset.org"


def download_coco(root: str | os.PathLike, splits: Iterable[str] = ("train2017",), *, base_url: str = COCO_URL) -> None:
    """Put captions and images of COCO's splits into the folder `root`; what is already there is left alone.

    Raises:
        DuetError: a split that COCO has no captions for, or an archive that is not what it should be.
        NotReached: the server cannot be reached, or the transfer broke; calling again continues it.
    """
    root = Path(root).expanduser()
    for split in splits:
        if not (year := re.fullmatch(r"(?:train|val)(2014|2017)", split)):
            raise DuetError(f"COCO has no captions for {split!r}; expected train2017, val2017, train2014 or val2014")
        captions = f"annotations/captions_{split}.json"
        if not (root / captions).is_file():
            _fetch_and_unpack(f"{base_url}/annotations/annotations_trainval{year[1]}.zip", root, captions)
        if not (root / split).is_dir():
            _fetch_and_unpack(f"{base_url}/zips/{split}.zip", root, split)


def _fetch_and_unpack(url: str, root: Path, wanted: str) -> None:
    """Fetch a zip archive and put its file or folder `wanted` at the same path under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    archive = root / url.rsplit("/", 1)[1]
    if not archive.is_file():
        _fetch(url, archive)
    unpacking = root / f".unpacking-{archive.stem}"
    shutil.rmtree(unpacking, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            names = [name for name in content.namelist() if name == wanted or name.startswith(f"{wanted}/")]
            if not names:
                raise zipfile.BadZipFile(f"it holds no {wanted}")
            for name in tqdm(names, desc=f"Unpacking {archive.name}", unit="file"):
                content.extract(name, unpacking)  # which keeps every name under the folder given
    except zipfile.BadZipFile as error:
        archive.unlink()
        shutil.rmtree(unpacking, ignore_errors=True)
        raise DuetError(f"{url}: not the archive that was expected ({error}); it is deleted, try again") from None
    (root / wanted).parent.mkdir(parents=True, exist_ok=True)
    os.replace(unpacking / wanted, root / wanted)
    shutil.rmtree(unpacking)
    archive.unlink()


def _fetch(url: str, target: Path) -> None:
    """Fetch a file with a progress bar, continuing what an earlier call left behind."""
    part = target.with_name(f"{target.name}.part")
    try:
        head = get_session().head(url, follow_redirects=True)
        head.raise_for_status()
        size = int(head.headers["Content-Length"])
        if part.is_file() and part.stat().st_size > size:
            part.unlink()  # left by another file
        with part.open("ab") as file:
            http_get(str(head.url), file, resume_size=file.tell(), expected_size=size, displayed_filename=target.name)
    except (httpx.HTTPError, OSError, KeyError) as error:
        raise NotReached(
            f"{url}: cannot be fetched ({reason(error)}); run the same command again to continue, or put {target.name} "
            f"unpacked into {target.parent} yourself"
        ) from error
    os.replace(part, target)
