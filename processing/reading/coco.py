"""COCO's captions become rows: a captions JSON beside a folder of images, in COCO's own layout."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from ..data_error_vlm import DuetError, NotFound
from ..image_files_vlm import inside


def coco_files(path: Path) -> dict[str, Path]:
    """Split name -> captions JSON in COCO's layout, `path` being the file or the folder above `annotations`."""
    if path.is_dir():
        files = sorted(path.glob("annotations/captions_*.json"))
        return {file.stem.removeprefix("captions_"): file for file in files}
    if path.suffix == ".json" and path.is_file() and _is_one_object(path):
        return {path.stem.removeprefix("captions_"): path}
    return {}


def coco_root(path: Path) -> Path:
    """The folder of the whole, which image paths start from where no other is given; `path` as in `coco_files`."""
    return path if path.is_dir() else path.parent.parent


def coco_rows(file: Path, split: str, image_dir: str | os.PathLike | None = None) -> datasets.Dataset:
    """One row for each captioned image of a captions file: `image`, `caption` (a list), `image_id`.

    Args:
        file: the captions JSON.
        split: its split, which is also the name of the folder of its images.
        image_dir: the folder of the images, from which the paths in `image` start. Without it they are in the folder
            `split` beside `annotations`, and paths start from `coco_root(file)`, so that several splits go together.

    Raises:
        ValueError, FileNotFoundError: not such a file, or no such folder.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DuetError(f"{file}: not valid JSON ({error}); was it copied or fetched to its end?") from None
    images, annotations = (_list(content, key, file) for key in ("images", "annotations"))
    folder = Path(image_dir) if image_dir else coco_root(file) / split
    if not folder.is_dir():
        raise NotFound(
            f"{file}: its images are not in {folder}; give their folder with --image_dir, or fetch COCO with --download"
        )
    captions = {}
    for number, image in enumerate(images):
        place = f"{file}: images[{number}]"
        _check(image, {"id": int, "file_name": str}, place)
        try:
            inside(folder, image["file_name"])
        except ValueError as error:
            raise DuetError(f"{place}: {error}") from None
        path = image["file_name"] if image_dir else os.path.join(split, image["file_name"])
        captions[image["id"]] = (path, [])
    for number, annotation in enumerate(annotations):
        _check(annotation, {"image_id": int, "caption": str}, f"{file}: annotations[{number}]")
        if annotation["image_id"] not in captions:
            raise DuetError(
                f"{file}: annotations[{number}] has image_id {annotation['image_id']}; expected the id of an image"
            )
        captions[annotation["image_id"]][1].append(annotation["caption"])
    rows = [{"image": path, "caption": texts, "image_id": key} for key, (path, texts) in captions.items() if texts]
    if not rows:
        raise DuetError(f"{file}: no captions; expected at least one in annotations")
    features = datasets.Features(
        image=datasets.Value("string"),
        caption=datasets.List(datasets.Value("string")),
        image_id=datasets.Value("int64"),
    )
    # Kept on disk under a name that follows the file, so that later steps on these rows find their caches again.
    state = file.stat()
    fingerprint = Hasher.hash([str(file.resolve()), state.st_size, state.st_mtime_ns, split, image_dir is None])
    return datasets.Dataset.from_generator(partial(iter, rows), features, fingerprint=fingerprint)


def _is_one_object(path: Path) -> bool:
    """Whether a JSON file is one object, as COCO's are, and not a list of rows or a row in each line."""
    with path.open(encoding="utf-8", errors="replace") as file:
        if not file.read(64).lstrip().startswith("{"):
            return False
        file.seek(0)
        first, rest = file.readline(), file.readline()
    try:
        json.loads(first)
    except ValueError:
        return True  # an object written over several lines
    return not rest.strip()


def _list(content: dict[str, Any], key: str, file: Path) -> list[Any]:
    if not isinstance(content.get(key), list):
        raise DuetError(
            f"{file}: one JSON object with the keys {', '.join(content)}; "
            "expected COCO captions (lists under images and annotations), a list of rows, or a row in each line"
        )
    return content[key]


def _check(entry: Any, expected: dict[str, type], place: str) -> None:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in expected.items()):
        found = f"the keys {', '.join(entry)}" if isinstance(entry, dict) else repr(entry)[:80]
        wanted = " and ".join(f"{key} ({kind.__name__})" for key, kind in expected.items())
        raise DuetError(f"{place} has {found}; expected {wanted}, as in COCO's captions_train2017.json")
