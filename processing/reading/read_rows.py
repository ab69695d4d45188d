"""Rows that a program or a notebook holds become conversations, as the rows of any source do in a run."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import datasets
from transformers.utils import logging

from ..data_error_vlm import DuetError, NotFound
from ..image_files_vlm import ImagePolicy
from .conversations import Conversation, MalformedRow
from .items import SPLIT_TURNS, Reading, is_item, split_item
from .rows import undecoded


logger = logging.get_logger(__name__)


def read_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    image_dir: str | os.PathLike | None = None,
    columns: dict[str, str] | None = None,
    prompt: str = "",
    caption_choice: str = "all",
    choice_answer: str = "letter",
    split_turns: str = "none",
    allow_urls: bool = False,
    allow_local_urls: bool = False,
    allow_links: bool = False,
    source: str = "rows",
    on_bad_sample: str = "skip",
) -> list[Conversation]:
    """
    Rows of any known layout as the conversations that `VLMDataCollator` takes.

    Args:
        rows: dictionaries, or a data set of the `datasets` library, whose stored images stay undecoded.
        image_dir: the folder that image paths are relative to and may not lead out of; without it they may lead
            anywhere, relative ones from the working directory.
        columns: a known name -> the rows' own name for it, such as `{"image": "photo", "caption": "title"}`.
        prompt: the question that a caption answers; none for stage 1, where a caption stands alone.
        caption_choice: `"all"` captions of an image, each a conversation, or only the `"first"`.
        choice_answer: what answers a multiple choice, the `"letter"` of the right option or its `"text"`.
        split_turns: `"history"` makes each answer the last of a conversation of its own, `"questions"` each question
            with its answers a conversation without the turns before it, and with the images shown so far.
        allow_urls: whether images may be fetched; with `allow_local_urls` from networks of this machine, too.
        allow_links: whether links in `image_dir` may lead out of it.
        source: what to call the rows in messages and accounts.
        on_bad_sample: `"skip"` leaves out what cannot be read and says in one line how much that was; `"error"` raises.

    Raises:
        DuetError: none of the rows can be read, or one cannot with `on_bad_sample="error"`; one line that names it.
    """
    if isinstance(rows, (str, os.PathLike, Mapping)) or not isinstance(rows, Iterable):
        raise DuetError(
            f"read_rows was given a {type(rows).__name__}; expected rows: a list of dictionaries, or one split of a "
            'data set, such as datasets.load_dataset(...)["train"].'
        )
    if split_turns not in SPLIT_TURNS:
        raise DuetError(f"split_turns={split_turns!r}: expected one of {', '.join(SPLIT_TURNS)}.")
    folder = None if image_dir is None else Path(image_dir).expanduser().absolute()
    if folder is not None and not folder.is_dir():
        raise NotFound(f"{source}: no image folder {folder}; check image_dir.")
    if isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        rows = undecoded(rows.with_format(None))
    reading = Reading(
        source=source,
        prompt=prompt,
        caption_choice=caption_choice,
        choice_answer=choice_answer,
        split_turns=split_turns,
        columns=columns,
        images=ImagePolicy(
            None if folder is None else str(folder),
            allow_urls=allow_urls,
            allow_links=allow_links,
            allow_local_urls=allow_local_urls,
            own_paths=True,
        ),
    )
    found: list[Any] = []
    dropped: list[Any] = []
    for index, row in enumerate(rows):
        is_read = is_item(row)
        items = (
            split_item(cast(Conversation, {"source": source, "row": index, **row}), split_turns)
            if is_read
            else reading.items(row, index)
        )
        for item in items:
            (dropped if "dropped" in item else found).append(item)
        if dropped and on_bad_sample == "error":
            raise MalformedRow(dropped[0]["dropped"][1])
    if dropped:
        line = (
            f"{source}: {len(dropped):,} of {len(found) + len(dropped):,} samples cannot be read, such as "
            f"{dropped[0]['dropped'][1]}"
        )
        if not found:
            raise MalformedRow(line)
        logger.warning(line)
    notes = dict.fromkeys(note for item in found for note in item.get("notes", ()))
    if notes:
        logger.warning(f"{source}: " + "; ".join(notes))
    return found


__all__ = ["read_rows"]
