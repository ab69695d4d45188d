"""A folder of images with a text of the same name beside each (`0001.jpg`, `0001.txt`), as captions are often kept.

What is special: the `datasets` library knows no such folder, and would read its texts or its images alone. Which file
is of which split, by the names of folders and files, it does know.
"""

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .conversations import ODD
from .odd import ODD_FEATURE, is_unicode, reason, without_odd
from .rows import Splits


TEXT = ".txt"

_IMAGES = frozenset(ImageFolder.EXTENSIONS)

_BOX = re.compile(r"\d+(?:\s+[-+.\de]+){4,}\s*")
"""A class and a box, as YOLO's data sets have them beside their images, one a line."""


def is_captioned(folder: Path) -> bool:
    """Whether a text stands beside an image somewhere in a folder, and no table of metadata."""
    found = False
    for _, _, names in os.walk(folder):
        if any(name.startswith("metadata.") for name in names):
            return False
        texts = {name[: -len(TEXT)] for name in names if name.endswith(TEXT)}
        found = found or bool(texts) and any(name.rpartition(".")[0] in texts for name in names if _is_image(name))
    return found


def captioned_splits(folder: Path) -> Splits:
    """The splits of such a folder; images are given by their paths in it."""
    files = datasets.load_dataset_builder("imagefolder", data_dir=str(folder)).config.data_files
    return {str(split): partial(_rows, folder.resolve(), sorted(map(str, paths))) for split, paths in files.items()}


def _rows(folder: Path, files: list[str]) -> datasets.Dataset:
    features = datasets.Features(image=datasets.Value("string"), caption=datasets.Value("string"))
    rows = list(_read(folder, [Path(file) for file in files if _is_image(file)]))
    return without_odd(datasets.Dataset.from_list(rows, datasets.Features({**features, ODD: ODD_FEATURE})))


def _read(folder: Path, images: list[Path]) -> Iterator[dict[str, Any]]:
    """An image and its text, or why there is none."""
    for image in images:
        text, caption, odd = image.with_suffix(TEXT), "", None
        if not text.is_file():
            odd = f"no {text.name} beside {image.name}"
        elif not text.resolve().is_relative_to(folder):
            odd = f"{text.name} is a link that leads out of the folder"
        else:
            try:
                caption = text.read_bytes().decode("utf-8-sig", errors="surrogateescape").strip()
            except OSError as error:
                odd = f"{text.name}: not readable ({reason(error)})"
        if not is_unicode(caption):
            odd = f"{text.name}: a text that is no UTF-8"
        elif caption and all(map(_BOX.fullmatch, caption.splitlines())):
            odd = f"{text.name} holds numbers of boxes; expected a caption"
        yield {"image": os.path.relpath(image, folder), "caption": "" if odd else caption, ODD: odd}


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _IMAGES
