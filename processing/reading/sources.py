"""A name becomes rows: a Hub repository, a folder, files or COCO's captions, as a `Source`, streamed or not.

The `datasets` library does the reading. Added are image columns that stay undecoded (one broken file must not end a
run, and pixels belong in no cache), the number that each row has where it is stored (`rows.py`), the folder that image
paths are relative to, and errors of one line each for what goes wrong with a name. COCO's own layout is read in
`coco.py`, the built-in data set is drawn in `drawn.py`.

Whatever it is, a source is first a mapping from split names to functions that open them, so that a split is chosen and
checked before anything large is read. Streamed, nothing large is read at all: rows come as they are asked for.
"""

import glob
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import yaml
from datasets.utils.file_utils import xopen
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import httpx

from ..data_error_vlm import DuetError, NotFound, NotReached
from .binary_readers import ArchiveReader, ImageFolderReader, ParquetReader
from .captioned import captioned_splits, is_captioned
from .coco import coco_files, coco_root, coco_rows
from .csv_reader import CsvReader, csv_header, csv_separator
from .drawn import drawn_splits, with_drawings
from .json_reader import JsonReader
from .odd import reason, with_odd, without_odd
from .rows import Rows, Splits, joined, leaves, numbered, undecoded


CONVERTED = "refs/convert/parquet"
"""The branch in which the Hub keeps its own parquet copy of a dataset repository."""

FILE_FORMATS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tar": "webdataset",
}

_TABLES = (".xlsx", ".xls", ".ods", ".numbers", ".txt")

OWN_SETTINGS = ("README.md", ".huggingface.yaml")
"""Where a data set may say which of its files are what."""

STREAM_SHARDS = 64
"""Into how many parts rows that lie on this machine are streamed: at most so many workers can share them."""


class Source(NamedTuple):
    """Rows, and what is needed to make conversations of them."""

    name: str
    """What to call it in messages: its path, and the configuration and the split where they were given."""
    rows: Rows
    """Their images are references, never decoded. In the column `ROW` each has its number in its split as stored; in a
    stream, which knows no better, the number in which its reader came to it."""
    image_dir: Path | None
    """The folder that image paths in the rows are relative to, where there is one; always absolute."""
    caches: tuple[str, ...] = ()
    """The folders of this machine in which the libraries keep what they fetched of a dataset on the Hub."""


def open_source(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    image_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    streaming: bool = False,
) -> Source:
    """Open a data set.

    Args:
        path: what exists on this machine (a parquet, JSON, JSONL or CSV file or a WebDataset's tar; a pattern such as
            `data/*.tar` or a list for several; a folder of them, of images, or saved by `datasets`; COCO's captions
            JSON or the folder that holds its `annotations`), "shapes" for the built-in one, else a dataset on the Hub.
        name: the configuration of a Hub dataset that has several.
        split: a split, or a part of one as `datasets` writes it ("train[:90%]"); without it "train", or the only one.
        revision: branch, tag or commit of a Hub dataset.
        image_dir: the folder that image paths in the rows are relative to; without it the folder of a local file, and
            for COCO the one beside `annotations` with the split's name.
        token: for private and gated Hub datasets.
        streaming: read rows as they are asked for, from the disk or the Hub, instead of converting or fetching all of
            them first. (A JSON file that is one list can only be read as a whole: it is converted once all the same.)

    Every cell of a CSV file on this machine is text as it stands there (007, N/A and None too), an empty one is null.

    Raises:
        DuetError, NotFound, NotReached: one line each: what was found, where, and how to mend it.
    """
    folder, caches = Path(image_dir).expanduser() if image_dir else None, tuple[str, ...]()
    where = _where(path)
    if folder is not None and not folder.is_dir():
        raise NotFound(f"{where}: no image folder {folder}; check --image_dir")
    if where == "shapes":
        splits = drawn_splits(name)
    elif files := _named_files(path):
        splits = _file_splits(where, files, streaming)
        folder = folder or Path(os.path.commonpath([file.absolute().parent for file in files]))
    else:
        local = Path(where).expanduser()
        if captions := coco_files(local):
            splits = {part: partial(coco_rows, file, part, folder) for part, file in captions.items()}
            folder = folder or coco_root(local)
        elif local.is_file():
            splits = _file_splits(where, [local], streaming)
            folder = folder or local.parent
        elif local.exists():
            splits = _folder_splits(local, name, streaming)
            folder = folder or local
        elif local.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1 or _format(local):
            raise NotFound(
                f"{where}: no such file or folder (from {Path.cwd()}); check the path (COCO comes with --download)"
            )
        else:
            splits, caches = _hub_splits(where, name, revision, token, streaming), _hub_caches(where)
    rows = _take(splits, split, where)
    if isinstance(rows, datasets.Dataset):
        if not len(rows):
            raise DuetError(f"{where}: no rows in split {split or 'train'!r}; expected at least one")
        if streaming:
            rows = rows.to_iterable_dataset(num_shards=min(len(rows), STREAM_SHARDS))
    if where == "shapes":
        rows = with_drawings(rows)
    given = ", ".join(filter(None, (name, split)))
    return Source(f"{where} ({given})" if given else where, rows, folder and folder.absolute(), caches)


def _where(path: str | os.PathLike | Sequence[str | os.PathLike]) -> str:
    """What to call a path in messages."""
    if isinstance(path, (str, os.PathLike)):
        return str(path)
    if not path:
        raise DuetError("an empty list names no data set; expected paths of files in it")
    return str(path[0]) if len(path) == 1 else f"{path[0]} and {len(path) - 1} more"


def split_names(split: str) -> list[str]:
    """The splits that an expression such as "train[:90%]+validation" names."""
    return [part.split("[")[0].split("(")[0].strip() for part in split.split("+")]


def _take(splits: Splits, split: str | None, where: str) -> Rows:
    """The rows of a split expression."""
    if split is None:
        candidates = list(splits) if len(splits) == 1 else [part for part in splits if part.startswith("train")]
        if len(candidates) != 1 and "train" not in candidates:
            raise DuetError(f"{where}: found the splits {', '.join(splits)}; choose one with --train_split")
        split = "train" if "train" in candidates else candidates[0]
    unknown = [part for part in split_names(split) if part not in splits]
    if unknown:
        raise DuetError(f"{where}: no split {unknown[0]!r}; expected one of {', '.join(splits)}")
    opened = {part: numbered(undecoded(splits[part]())) for part in split_names(split)}
    if any(isinstance(rows, datasets.IterableDataset) for rows in opened.values()):
        if "[" in split:
            raise DuetError(
                f"{where}: {split!r} is a part of a split, and how long that is nobody knows while it is streamed; "
                "name whole splits, or do not stream it"
            )
        return joined([opened[part] for part in split_names(split)])
    try:
        lengths = {part: len(rows) for part, rows in opened.items()}
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DuetError(f"{where}: no split {split!r} ({reason(error)}); expected e.g. train[:90%]") from None
    return joined([opened[piece.splitname].select(range(piece.from_, piece.to)) for piece in pieces])


# --- what lies on this machine


def _named_files(path: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    """The files that a pattern or a list names; none where `path` is one name."""
    if isinstance(path, (str, os.PathLike)):
        where = os.path.expanduser(path)
        if os.path.exists(where) or not glob.has_magic(where):
            return []
        files = sorted(Path(file) for file in glob.glob(where, recursive=True) if os.path.isfile(file))
        if not files:
            raise NotFound(f"{path}: no file has a name like this (from {Path.cwd()}); check the pattern")
        return files
    files = [file for each in path for file in _named_files(each) or [Path(each).expanduser()]]
    if missing := [file for file in files if not file.is_file()]:
        raise NotFound(f"{missing[0]}: no such file (from {Path.cwd()}); check the path")
    return files


def _format(file: Path) -> str | None:
    """In which of the `FILE_FORMATS` a file is, by its name."""
    return next((kind for suffix, kind in FILE_FORMATS.items() if file.name.endswith(suffix)), None)


def _file_splits(where: str, files: list[Path], streaming: bool) -> Splits:
    """The only split of some files of one kind."""
    for file in files:
        if _format(file) is None:
            table = "; save a table as CSV, with the name .csv" if file.suffix.lower() in _TABLES else ""
            kinds = f"expected one of {', '.join(FILE_FORMATS)}, or a folder{table}"
            raise DuetError(f"{file}: a file of unknown kind; {kinds}")
    if not any(file.stat().st_size for file in files):
        raise DuetError(f"{files[0]}: an empty file; expected rows")
    formats = sorted({str(_format(file)) for file in files})
    if len(formats) > 1:
        raise DuetError(f"{where}: files of several kinds ({', '.join(formats)}); name those of one kind")
    build = partial(datasets.load_dataset_builder, formats[0], data_files=[glob.escape(str(file)) for file in files])
    return _built_splits(where, build, streaming)


def _folder_splits(path: Path, name: str | None, streaming: bool) -> Splits:
    """The splits of a folder, in any form that `datasets` reads."""
    own = [_reading(path, partial(_settings, path / settings)) for settings in OWN_SETTINGS]
    _check_own_files(path, own)
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):  # saved with save_to_disk
        for state in (path / "state.json", *path.glob("*/state.json")):
            _check_own_files(path, _reading(path, partial(_settings, state)))
        _check_own_files(path, _reading(path, partial(_settings, path / "dataset_dict.json")), "splits")  # folders
        return _reading(path, lambda: _saved_splits(datasets.load_from_disk(str(path))))
    if not any(own) and is_captioned(path):
        return _reading(path, partial(captioned_splits, path))
    return _built_splits(path, partial(datasets.load_dataset_builder, str(path), name), streaming)


def _settings(file: Path) -> Any:
    """What a file of a data set says about it; what stands before the text of a README."""
    if not file.is_file():
        return None
    if file.suffix == ".md":
        return huggingface_hub.metadata_load(file)
    return yaml.safe_load(file.read_text(encoding="utf-8"))  # which reads JSON, too


def _check_own_files(where: str | Path, settings: Any, key: str = "") -> None:
    """Refuse settings of a data set that name files outside of it."""
    if isinstance(settings, dict):
        for inner, value in settings.items():
            _check_own_files(where, value, inner if inner in ("data_files", "_data_files", "data_dir") else key)
    elif isinstance(settings, list):
        for value in settings:
            _check_own_files(where, value, key)
    elif key and isinstance(settings, str):
        path = settings.replace("\\", "/")
        if os.path.isabs(path) or "://" in path or "::" in path or path[1:2] == ":" or ".." in path.split("/"):
            raise DuetError(
                f"{where}: its own settings name {settings} as its data, which lies outside of it; if that is meant, "
                "name these files themselves with --dataset"
            )


def _saved_splits(saved: datasets.Dataset | datasets.DatasetDict) -> Splits:
    parts = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    return {name: partial(_as_it_is, rows) for name, rows in parts.items()}


def _as_it_is(rows: datasets.Dataset) -> datasets.Dataset:
    return rows


def _built_splits(
    where: str | Path, build: Callable[..., datasets.DatasetBuilder], streaming: bool, token: str | bool | None = None
) -> Splits:
    """The splits of what `build` makes, prepared when they are opened, or streamed."""

    def checked(**options: Any) -> datasets.DatasetBuilder:
        return _with_our_reader(build(**options))

    builder = _reading(where, checked)

    def opened(split: str) -> Rows:
        options = _text_options(builder, split)
        rows = read(checked(**options) if options else builder, split)
        # Where a field is a text in one row and a list in the next, `datasets` stores JSON and takes a text that is
        # itself JSON for what it says: the answer "42" becomes a number. Stored as JSON from the top of its column,
        # every text stays a text.
        mixed = [
            column
            for column, feature in (rows.features or {}).items()
            if any(isinstance(leaf, datasets.Json) for leaf in leaves(feature) if leaf is not feature)
        ]
        if mixed and hasattr(builder.config, "on_mixed_types"):
            features = {**rows.features, **{column: datasets.Json() for column in mixed}}
            rows = read(checked(features=datasets.Features(features)), split)
        return rows

    def read(builder: datasets.DatasetBuilder, split: str) -> Rows:
        if streaming:
            rows = builder.as_streaming_dataset(split=split)
            features, rows = rows.features, undecoded(rows)
            if rows.num_shards == 1:  # a parquet file is divided by its row groups, for several workers
                rows = rows.reshard()
            if features is not None and hasattr(builder.config, "drop_metadata"):  # a folder of images
                rows = _with_contents(rows, features, token)
            # The library knows no features of JSON that is one list before it has read all of it.
            if rows.features is not None or not hasattr(builder.config, "on_mixed_types"):
                return rows
        builder.download_and_prepare()
        return without_odd(builder.as_dataset(split=split))

    names = map(str, builder.info.splits or builder.config.data_files)
    return {name: partial(_reading, where, partial(opened, name)) for name in names}


def _with_our_reader(builder: datasets.DatasetBuilder) -> datasets.DatasetBuilder:
    """The same builder, with all that was found for it, reading as the reader of ours that is made of its kind."""
    readers = (JsonReader, CsvReader, ParquetReader, ArchiveReader, ImageFolderReader)
    reader = next((reader for reader in readers if isinstance(builder, reader.__base__)), None)
    if reader is not None:
        builder.__class__ = reader
    return builder


def _text_options(builder: datasets.DatasetBuilder, split: str) -> dict[str, Any]:
    """With what text files of this machine are read: every cell of CSV is the text it is.

    Files on the Hub get none: options give a cached copy another name, under which it is not found offline.
    """
    first = str(builder.config.data_files[split][0]) if builder.config.data_files else "://"
    if "://" in first or getattr(builder.config, "features", None) is not None:
        return {}
    if isinstance(builder, JsonReader):
        return {"encoding_errors": "strict"}  # as it is; but what the library's own reader has cached is none of ours
    if not isinstance(builder, CsvReader) or not {".csv", ".tsv"} & set(Path(first).suffixes):
        return {}
    sep = csv_separator(first, builder.config.sep)
    features = datasets.Features({name: datasets.Value("string") for name in csv_header(first, sep)})
    return {"features": with_odd(features), "sep": sep}


def _with_contents(
    rows: datasets.IterableDataset, features: datasets.Features, token: str | bool | None
) -> datasets.IterableDataset:
    """The same rows of a folder of images, with the content of images that are no file of this machine."""
    return rows.map(_row_with_contents, fn_kwargs={"feature": dict(features), "token": token}, features=rows.features)


def _row_with_contents(value: Any, feature: Any, token: str | bool | None) -> Any:
    """A value with contents where its feature, as the folder's reader has it, is an image.

    Such a path was made of a file's name inside the folder. What only looks like an image is data's own word for a
    place, which could be any file or address.
    """
    if isinstance(value, list):
        inner = getattr(feature, "feature", None)
        return [_row_with_contents(item, inner, token) for item in value]
    if not isinstance(value, dict):
        return value
    if isinstance(feature, datasets.Image):
        if value["bytes"] is not None or "://" not in (value["path"] or ""):
            return value
        with xopen(value["path"], "rb", download_config=datasets.DownloadConfig(token=token)) as file:
            return {"bytes": file.read(), "path": value["path"]}
    inner = feature if isinstance(feature, dict) else {}
    return {key: _row_with_contents(item, inner.get(key), token) for key, item in value.items()}


def _reading(where: str | Path, read: Callable[[], Any]) -> Any:
    """What `read` gives; where the library cannot read it, its reason in one line."""
    try:
        return read()
    except (ConnectionError, httpx.TransportError) as error:
        raise NotReached(
            f"{where}: no such file or folder here, and the Hub cannot be reached ({reason(error)}); "
            "check the path, or the network and HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # the formats' readers raise their own kinds, down to StopIteration for an empty file
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, DuetError):
            raise cause from None
        kind = NotFound if isinstance(error, FileNotFoundError) else DuetError
        raise kind(f"{where}: not readable as a data set ({reason(error)}); check its format and name") from error


# --- what lies on the Hub


def _hub_splits(repo: str, name: str | None, revision: str | None, token: str | bool | None, streaming: bool) -> Splits:
    """The splits of a dataset repository on the Hub, or of its copy in the cache when the Hub is out of reach."""
    at = f"{repo} at revision {revision}" if revision else repo
    try:
        # Asked first because `datasets`, when anything is wrong, takes whatever older copy it finds in its cache.
        info = huggingface_hub.dataset_info(repo, revision=revision, token=token)
        files = [file.rfilename for file in info.siblings or ()]
    except RevisionNotFoundError:
        raise NotFound(f"{at}: the Hub has no such revision; check --dataset_revision") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise NotFound(
            f"{repo}: neither a file or folder here nor a dataset on the Hub; check the name, "
            "and for a private or gated one log in with `hf auth login`"
        ) from None
    except (OSError, httpx.HTTPError):
        files = []  # no network: what follows reads the cache, or says that there is none
    if f"{repo.split('/')[-1]}.py" in files:
        raise DuetError(
            f"{at}: a script repository, which the datasets library no longer runs; "
            f"read the Hub's parquet copy of it with --dataset_revision {CONVERTED}"
        )
    for settings in set(OWN_SETTINGS).intersection(files):
        own = huggingface_hub.hf_hub_download(repo, settings, repo_type="dataset", revision=revision, token=token)
        _check_own_files(at, _reading(at, partial(_settings, Path(own))))
    # In the Hub's parquet copy a configuration is a folder.
    config = {"data_dir": name} if name and revision == CONVERTED else {"name": name}
    build = partial(datasets.load_dataset_builder, repo, **config, revision=revision, token=token)
    return _built_splits(at, build, streaming, token)


def _hub_caches(repo: str) -> tuple[str, ...]:
    """Where what is fetched of a dataset repository lies: its own folder in the Hub's cache, and unpacked archives."""
    own = os.path.join(huggingface_hub.constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="dataset"))
    return os.path.abspath(own), os.path.abspath(datasets.config.EXTRACTED_DATASETS_PATH)
