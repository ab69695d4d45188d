"""A name becomes rows: a Hub repository, a folder, a file or COCO's captions, as one `datasets.Dataset`.

The `datasets` library does the reading. Added here are COCO's own layout (a captions JSON beside a folder of images),
image columns that stay undecoded (one broken file must not end a run, and pixels belong in no cache), image paths that
cannot leave their folder, and errors of one line each for what goes wrong with a name.

Whatever it is, a source is first a mapping from split names to functions that open them, so that a split is chosen and
checked before anything large is read.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets.fingerprint import Hasher
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx

from . import shapes
from .conversations import IMAGE_COLUMNS


CONVERTED = "refs/convert/parquet"
"""The branch in which the Hub keeps its own parquet copy of a dataset repository."""

FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}

Splits = dict[str, Callable[[], datasets.Dataset]]


def load_rows(
    path: str | os.PathLike,
    *,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    image_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
) -> datasets.Dataset:
    """The rows of a data set; their images are references, never decoded.

    Args:
        path: what exists on this machine (a parquet, JSON, JSONL or CSV file; a folder of them, of images, or saved by
            `datasets`; COCO's captions JSON or the folder that holds its `annotations`), else a dataset on the Hub.
        name: the configuration of a Hub dataset that has several.
        split: a split, or a part of one as `datasets` writes it ("train[:90%]"); without it "train", or the only one.
        revision: branch, tag or commit of a Hub dataset.
        image_dir: the folder that image paths in the rows are relative to; without it the folder of a local file, and
            for COCO the one beside `annotations` with the split's name.
        token: for private and gated Hub datasets.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: one line each: what was found, where, and how to mend it.
    """
    where, local = str(path), Path(path).expanduser()
    if where == "shapes":
        splits = _drawn_splits(name)
    elif captions := _coco_files(local):
        splits = {part: partial(_coco_rows, file, part, image_dir) for part, file in captions.items()}
    elif local.exists():
        splits = _local_splits(local, name)
        image_dir = image_dir or (local if local.is_dir() else local.parent)
    elif local.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1 or local.suffix in FILE_FORMATS:
        raise FileNotFoundError(
            f"{where}: no such file or folder (from {Path.cwd()}); check the path (COCO comes with --download)"
        )
    else:
        splits = _hub_splits(where, name, revision, token)
    rows = _take(splits, split, where)
    if not len(rows):
        raise ValueError(f"{where}: no rows in split {split or 'train'!r}; expected at least one")
    if where == "shapes":
        return rows.with_transform(_draw, columns=["image"], output_all_columns=True)
    return _with_image_paths(rows, image_dir, where)


def split_names(split: str) -> list[str]:
    """The splits that an expression such as "train[:90%]+validation" names."""
    return [part.split("[")[0].split("(")[0].strip() for part in split.split("+")]


def _take(splits: Splits, split: str | None, where: str) -> datasets.Dataset:
    """The rows of a split expression."""
    if split is None:
        candidates = list(splits) if len(splits) == 1 else [part for part in splits if part.startswith("train")]
        if len(candidates) != 1 and "train" not in candidates:
            raise ValueError(f"{where}: found the splits {', '.join(splits)}; choose one with --train_split")
        split = "train" if "train" in candidates else candidates[0]
    unknown = [part for part in split_names(split) if part not in splits]
    if unknown:
        raise ValueError(f"{where}: no split {unknown[0]!r}; expected one of {', '.join(splits)}")
    opened = {part: _undecoded(splits[part]()) for part in split_names(split)}
    try:
        lengths = {part: len(rows) for part, rows in opened.items()}
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{where}: no split {split!r} ({_reason(error)}); expected e.g. train[:90%]") from None
    return datasets.concatenate_datasets(
        [opened[piece.splitname].select(range(piece.from_, piece.to)) for piece in pieces]
    )


# --- what is drawn on the fly


DRAWN_ROWS = {"train": 20_000, "validation": 500, "test": 2_000}
DRAWN_SIZE = 64


def _drawn_splits(name: str | None) -> Splits:
    """The built-in data set: `captions` of scenes, or `dialogues` about them (in the test split single questions)."""
    read = {"captions": _drawn_captions, "dialogues": _drawn_dialogues}.get(name or "captions")
    if read is None:
        raise ValueError(f"shapes: no configuration {name!r}; expected captions or dialogues in --dataset_name")
    return {split: partial(read, split, count) for split, count in DRAWN_ROWS.items()}


def _drawn_captions(split: str, count: int) -> datasets.Dataset:
    scenes = [shapes.scene(split, index) for index in range(count)]
    return _drawn(scenes, {"caption": [scene.captions() for scene in scenes]})


def _drawn_dialogues(split: str, count: int) -> datasets.Dataset:
    if split != "test":
        scenes = [shapes.scene(split, index) for index in range(count)]
        return _drawn(scenes, {"messages": [_turns(scene.dialogue()) for scene in scenes]})
    scenes, turns = zip(*shapes.questions(split, count))
    columns = {
        "messages": [_turns([turn]) for turn in turns],
        "kind": [turn.kind for turn in turns],
        "subset": ["unseen pairs" if turn.unseen else "seen pairs" for turn in turns],
    }
    return _drawn(scenes, columns)


def _turns(turns: list[shapes.Turn]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]


def _drawn(scenes: list[shapes.Scene], columns: dict[str, list]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": [json.dumps(dataclasses.asdict(s)) for s in scenes], **columns})


def _draw(batch: dict[str, list]) -> dict[str, list]:
    """The images of scenes that are looked at; what is stored of an image is only what is in it."""
    return {"image": [_scene(description).draw(DRAWN_SIZE) for description in batch["image"]]}


def _scene(description: str) -> shapes.Scene:
    fields = json.loads(description)
    return shapes.Scene(**{**fields, "objects": tuple(shapes.Object(**thing) for thing in fields["objects"])})


# --- what lies on this machine


def _local_splits(path: Path, name: str | None) -> Splits:
    """The splits of a local file or folder, in any form that `datasets` reads."""
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):  # saved with save_to_disk
        return _reading(path, lambda: _saved_splits(datasets.load_from_disk(str(path))))
    if path.is_dir():
        return _built_splits(path, partial(datasets.load_dataset_builder, str(path), name))
    if path.suffix not in FILE_FORMATS:
        raise ValueError(f"{path}: a file of unknown kind; expected one of {', '.join(FILE_FORMATS)}, or a folder")
    if not path.stat().st_size:
        raise ValueError(f"{path}: an empty file; expected rows")
    builder = partial(datasets.load_dataset_builder, FILE_FORMATS[path.suffix], data_files=str(path))
    return _built_splits(path, builder)


def _saved_splits(saved: datasets.Dataset | datasets.DatasetDict) -> Splits:
    parts = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    return {name: lambda rows=rows: rows for name, rows in parts.items()}


def _built_splits(where: str | Path, build: Callable[..., datasets.DatasetBuilder]) -> Splits:
    """The splits of what `build` makes, prepared when they are opened."""
    builder = _reading(where, build)

    def opened(split: str) -> datasets.Dataset:
        rows = prepared(builder, split)
        # Where a field is a text in one row and a list in the next, `datasets` stores JSON and takes a text that is
        # itself JSON for what it says: the answer "42" becomes a number. Stored as JSON from the top of its column,
        # every text stays a text.
        mixed = [
            column
            for column, feature in rows.features.items()
            if any(isinstance(leaf, datasets.Json) for leaf in _leaves(feature) if leaf is not feature)
        ]
        if mixed and hasattr(builder.config, "on_mixed_types"):
            features = {**rows.features, **{column: datasets.Json() for column in mixed}}
            rows = prepared(build(features=datasets.Features(features)), split)
        return rows

    def prepared(builder: datasets.DatasetBuilder, split: str) -> datasets.Dataset:
        builder.download_and_prepare()
        return builder.as_dataset(split=split)

    names = map(str, builder.info.splits or builder.config.data_files)
    return {name: partial(_reading, where, partial(opened, name)) for name in names}


def _reading(where: str | Path, read: Callable[[], Any]) -> Any:
    """What `read` gives; where the library cannot read it, its reason in one line."""
    try:
        return read()
    except (ConnectionError, httpx.TransportError) as error:
        raise ConnectionError(
            f"{where}: no such file or folder here, and the Hub cannot be reached ({_reason(error)}); "
            "check the path, or the network and HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # the formats' readers raise their own kinds, down to StopIteration for an empty file
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{where}: not readable as a data set ({_reason(error)}); check its format and name") from error


# --- what lies on the Hub


def _hub_splits(repo: str, name: str | None, revision: str | None, token: str | bool | None) -> Splits:
    """The splits of a dataset repository on the Hub, or of its copy in the cache when the Hub is out of reach."""
    at = f"{repo} at revision {revision}" if revision else repo
    try:
        # Asked first because `datasets`, when anything is wrong, takes whatever older copy it finds in its cache.
        files = [file.rfilename for file in huggingface_hub.dataset_info(repo, revision=revision, token=token).siblings]
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{at}: the Hub has no such revision; check --dataset_revision") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"{repo}: neither a file or folder here nor a dataset on the Hub; check the name, "
            "and for a private or gated one log in with `hf auth login`"
        ) from None
    except (OSError, httpx.HTTPError):
        files = []  # no network: what follows reads the cache, or says that there is none
    if f"{repo.split('/')[-1]}.py" in files:
        raise ValueError(
            f"{at}: a script repository, which the datasets library no longer runs; "
            f"read the Hub's parquet copy of it with --dataset_revision {CONVERTED}"
        )
    # In the Hub's parquet copy a configuration is a folder.
    config = {"data_dir": name} if name and revision == CONVERTED else {"name": name}
    return _built_splits(at, partial(datasets.load_dataset_builder, repo, **config, revision=revision, token=token))


# --- COCO's captions


def _coco_files(path: Path) -> dict[str, Path]:
    """Split name -> captions JSON in COCO's layout, `path` being the file or the folder above `annotations`."""
    if path.is_dir():
        files = sorted(path.glob("annotations/captions_*.json"))
        return {file.stem.removeprefix("captions_"): file for file in files}
    if path.suffix == ".json" and path.is_file() and _is_one_object(path):
        return {path.stem.removeprefix("captions_"): path}
    return {}


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


def _coco_rows(path: Path, split: str, image_dir: str | os.PathLike | None) -> datasets.Dataset:
    """One row for each captioned image of a COCO captions file: `image` (its path), `caption` (a list), `image_id`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({_reason(error)}); was it copied or fetched to its end?") from None
    images, annotations = (_coco_list(content, key, path) for key in ("images", "annotations"))
    folder = Path(image_dir).expanduser() if image_dir else path.parent.parent / split
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path}: its images are not in {folder}; give their folder with --image_dir, or fetch COCO with --download"
        )
    captions = {}
    for number, image in enumerate(images):
        _coco_check(image, {"id": int, "file_name": str}, f"{path}: images[{number}]")
        captions[image["id"]] = (_inside(folder, image["file_name"], f"{path}: images[{number}]"), [])
    for number, annotation in enumerate(annotations):
        _coco_check(annotation, {"image_id": int, "caption": str}, f"{path}: annotations[{number}]")
        if annotation["image_id"] not in captions:
            raise ValueError(
                f"{path}: annotations[{number}] has image_id {annotation['image_id']}; expected the id of an image"
            )
        captions[annotation["image_id"]][1].append(annotation["caption"])
    rows = [{"image": image, "caption": texts, "image_id": key} for key, (image, texts) in captions.items() if texts]
    if not rows:
        raise ValueError(f"{path}: no captions; expected at least one in annotations")
    features = datasets.Features(
        image=datasets.Image(decode=False),
        caption=datasets.List(datasets.Value("string")),
        image_id=datasets.Value("int64"),
    )
    # Kept on disk under a name that follows the file, so that later steps on these rows find their caches again.
    state = path.stat()
    fingerprint = Hasher.hash([str(path.resolve()), state.st_size, state.st_mtime_ns, str(folder.resolve())])
    return datasets.Dataset.from_generator(lambda: iter(rows), features, fingerprint=fingerprint)


def _coco_list(content: dict[str, Any], key: str, path: Path) -> list[Any]:
    if not isinstance(content.get(key), list):
        raise ValueError(
            f"{path}: one JSON object with the keys {', '.join(content)}; "
            "expected COCO captions (lists under images and annotations), a list of rows, or a row in each line"
        )
    return content[key]


def _coco_check(entry: Any, expected: dict[str, type], place: str) -> None:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in expected.items()):
        found = f"the keys {', '.join(entry)}" if isinstance(entry, dict) else repr(entry)[:80]
        wanted = " and ".join(f"{key} ({kind.__name__})" for key, kind in expected.items())
        raise ValueError(f"{place} has {found}; expected {wanted}, as in COCO's captions_train2017.json")


# --- images stay references


def _undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows with every image, in lists too, given as {"bytes", "path"}."""

    def undecoded(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, (datasets.List, datasets.LargeList)):
            return dataclasses.replace(feature, feature=undecoded(feature.feature))
        if isinstance(feature, dict):
            return {key: undecoded(value) for key, value in feature.items()}
        return feature

    # Only the reading changes, not what is stored: `cast` would copy every image of a list column.
    info = rows.info.copy()
    info.features = datasets.Features(undecoded(dict(rows.features)))
    return datasets.Dataset(rows.data, info=info, split=rows.split)


def _with_image_paths(rows: datasets.Dataset, image_dir: str | os.PathLike | None, where: str) -> datasets.Dataset:
    """The same rows with image paths that can be opened from anywhere."""
    columns = [column for column in IMAGE_COLUMNS if _holds_paths(rows.features.get(column))]
    if not columns:
        return rows
    folder = Path(image_dir).expanduser() if image_dir else None
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{where}: no image folder {folder}; check --image_dir")

    place = {"columns": columns, "folder": folder, "where": where}
    return rows.map(_row_with_image_paths, with_indices=True, fn_kwargs=place, desc="Finding image files")


def _row_with_image_paths(
    row: dict[str, Any], index: int, *, columns: list[str], folder: Path | None, where: str
) -> dict[str, Any]:
    def resolved(value: Any, place: str) -> Any:
        if isinstance(value, list):
            return [resolved(item, place) for item in value]
        return _inside(folder, value, place) if isinstance(value, str) and value else value

    return {column: resolved(row[column], f"{where}, row {index}, {column}") for column in columns}


def _leaves(feature: Any) -> Iterator[Any]:
    """The features at the bottom of a column's feature: in its lists and structs, or itself."""
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        yield from _leaves(feature.feature)
    elif isinstance(feature, dict):
        for inner in feature.values():
            yield from _leaves(inner)
    else:
        yield feature


def _holds_paths(feature: Any) -> bool:
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return isinstance(feature, datasets.Json) or feature in (datasets.Value("string"), datasets.Value("large_string"))


def _inside(folder: Path | None, name: str, place: str) -> str:
    """The absolute path of an image named by a data set, which may not lead out of the image folder."""
    if re.match(r"[a-z]+://", name):
        raise ValueError(f"{place}: the image {name} is a URL; fetch the images and name their folder with --image_dir")
    if folder is None:
        raise ValueError(f"{place}: the image is the path {name}; name the folder it is relative to with --image_dir")
    base = os.path.abspath(folder)
    full = os.path.normpath(os.path.join(base, name))
    if os.path.commonpath([base, full]) != base:
        raise ValueError(f"{place}: the image {name} lies outside {base}; give a folder that holds all as --image_dir")
    return full


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom, with its kind where it says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
