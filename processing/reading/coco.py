"""COCO's captions become rows: a captions JSON beside a folder of images, in COCO's own layout."""

import json
import os
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from ..data_error_vlm import DuetError, NotFound
from ..image_files_vlm import inside
from .cells import cut, short
from .conversations import ODD
from .odd import is_unicode, with_odd


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

    An entry that is not as it should be is a row of its own, behind the others, that says so in the column `ODD`; an
    image without captions is none. A caption that is null or empty stays in its row's list.

    Args:
        file: the captions JSON.
        split: its split, which is also the name of the folder of its images.
        image_dir: the folder of the images, from which the paths in `image` start. Without it they are in the folder
            `split` beside `annotations`, and paths start from `coco_root(file)`, so that several splits go together.

    Raises:
        DuetError: not such a file, or no entry is as it should be.
        NotFound: no such folder.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise DuetError(f"{file}: not valid JSON ({error}); was it copied or fetched to its end?") from None
    images, annotations = (_list(content, key, file) for key in ("images", "annotations"))
    folder = Path(image_dir) if image_dir else coco_root(file) / split
    if not folder.is_dir():
        raise NotFound(
            f"{file}: its images are not in {folder}; give their folder with --image_dir, or fetch COCO with --download"
        )
    found, odd = _captioned(images, annotations, folder)
    if not found:
        raise DuetError(f"{file}: " + (odd[0] if odd else "no captions; expected at least one in annotations"))
    numbers = all(isinstance(image["id"], int) for image, _ in found)
    rows = [
        {
            "image": image["file_name"] if image_dir else os.path.join(split, image["file_name"]),
            "caption": captions,
            "image_id": image["id"] if numbers else _key(image["id"]),
        }
        for image, captions in found
    ]
    features = datasets.Features(
        image=datasets.Value("string"),
        caption=datasets.List(datasets.Value("string")),
        image_id=datasets.Value("int64" if numbers else "string"),
    )
    if odd:
        features = with_odd(features)
        rows = [{**row, ODD: None} for row in rows] + [{**dict.fromkeys(features), ODD: why} for why in odd]
    # Kept on disk under a name that follows the file, so that later steps on these rows find their caches again.
    state = file.stat()
    fingerprint = Hasher.hash([str(file.resolve()), state.st_size, state.st_mtime_ns, split, image_dir is None])
    return datasets.Dataset.from_generator(partial(iter, rows), features, fingerprint=fingerprint)


def _captioned(
    images: list[Any], annotations: list[Any], folder: Path
) -> tuple[list[tuple[dict[str, Any], list[str | None]]], list[str]]:
    """Each image with its captions, where it has any, and what is wrong with other entries."""
    captions: dict[str, tuple[dict[str, Any], list[str | None]]] = {}
    wrong: dict[str, str] = {}
    odd = []
    for number, image in enumerate(images):
        why = _wrong(image, f"images[{number}]", id=(int, float, str), file_name=(str,))
        if not why:
            try:
                inside(folder, image["file_name"])
            except ValueError as error:
                why = f"images[{number}]: {error}"
        if not isinstance(image, dict) or "id" not in image:
            odd.append(why)
        elif why:
            wrong[_key(image["id"])] = why
        else:
            captions[_key(image["id"])] = image, []
    for number, annotation in enumerate(annotations):
        place = f"annotations[{number}]"
        why = _wrong(annotation, place, image_id=(int, float, str), caption=(str, NoneType))
        key = "" if why else _key(annotation["image_id"])
        if why:
            odd.append(why)
        elif key in captions:
            captions[key][1].append(annotation["caption"])
        elif key in wrong:
            odd.append(f"{place}: its image cannot be read: {wrong[key]}")
        else:
            odd.append(f"{place} has image_id {annotation['image_id']}; expected the id of an image")
    found = [entry for entry in captions.values() if entry[1]]
    return found, odd if found else [*wrong.values(), *odd]


def _key(number: int | float | str) -> str:
    """An id as it can be compared: ids are texts in one list and numbers in another."""
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)


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
    if not isinstance(content, dict):
        raise DuetError(f"{file}: a JSON {type(content).__name__}; expected COCO's object of images and annotations")
    if not isinstance(content.get(key), list):
        raise DuetError(
            f"{file}: one JSON object with the keys {cut(', '.join(content), 100)}; "
            "expected COCO captions (lists under images and annotations), a list of rows, or a row in each line"
        )
    return content[key]


def _wrong(entry: Any, place: str, **expected: tuple[type, ...]) -> str:
    """What is wrong with an entry, if anything is."""

    def is_odd(key: str) -> bool:
        return not isinstance(entry[key], expected[key]) or isinstance(entry[key], bool)

    if not isinstance(entry, dict):
        found = short(entry)
    elif not entry.keys() >= expected.keys():
        found = f"the keys {', '.join(entry)}"
    else:
        odd = next(filter(is_odd, expected), None)
        found = f"{short(entry[odd])} as its {odd}" if odd else ""
    if found:
        wanted = " and ".join(expected)
        return f"{place} has {found}; expected {wanted}, as in COCO's captions_train2017.json"
    for key in expected:
        if isinstance(entry[key], str) and not is_unicode(entry[key]):
            return f"{place} has a {key} that is no UTF-8"
    return ""
