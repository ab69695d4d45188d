"""The data of a run: opened, read for a first impression, encoded or left to be encoded, and accounted for.

What can be known to be wrong with the data is known here, before the first step: a first look counts what will be
learned, and refuses to go on where that is nothing.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from processing import VLMProcessor
from processing.batching.account import Account
from processing.batching.dataset import ConversationDataset, MixedDataset, Reading, StreamedDataset, encode_item
from processing.batching.encoding import Encode, encode_caption, encode_dialogue
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import check_image, is_url
from processing.reading.download import download_coco
from processing.reading.sources import HELD_OUT_ROWS, hold_out, open_source, split_names

from .arguments import DataArguments, SourceArguments, VLMTrainingArguments


ENCODED_AHEAD = 20_000
SURVEYED = 1_000
IMAGES_CHECKED = 200


@dataclass(frozen=True)
class Stage:
    """What makes a stage what it is: how a conversation is encoded, and whether captions answer a question."""

    number: int
    name: str
    encode: Encode
    asks: bool

    def encoder(self, data_args: DataArguments) -> Encode:
        """`encode`, with what the arguments say about it."""
        return partial(self.encode, **data_args.encoding_kwargs(self.asks))


PRETRAIN = Stage(1, "alignment", encode_caption, asks=False)
SFT = Stage(2, "instruction tuning", encode_dialogue, asks=True)


class Part(NamedTuple):
    """The rows of one source, and how they are read."""

    rows: datasets.Dataset | datasets.IterableDataset
    reading: Reading


@dataclass
class Data:
    """The rows of a run: to learn from, for the evaluation loss, and for the questions answered after training."""

    train: list[Part]
    eval: list[Part]
    test: Part | None
    weights: list[float] | None


def load_data(stage: Stage, data_args: DataArguments, training_args: VLMTrainingArguments) -> Data:
    """
    Open every split that the run reads.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: a data set that is not there, or not as expected.
    """
    sources = data_args.sources()
    if data_args.streaming and training_args.max_steps <= 0:
        raise DuetError("a streamed data set has no end that is known; say how far to train with --max_steps.")
    if data_args.streaming and (data_args.encode_ahead or _groups_by_length(training_args)):
        raise DuetError(
            "a streamed data set is not encoded ahead, so it cannot be grouped by length either; leave out "
            "--streaming, or --encode_ahead and --train_sampling_strategy group_by_length."
        )
    with training_args.main_process_first(desc="loading the data"):
        if data_args.download:
            named = filter(None, (data_args.train_split, data_args.eval_split, data_args.test_split))
            splits = {part for split in named for part in split_names(split)} or {"train2017"}
            download_coco(sources[0].path, sorted(splits))
        train, evaluation = [], []
        for source in sources:
            part = _open(stage, data_args, source, source.split, source.max_samples)
            if source.eval_split is not None:
                held = _open(stage, data_args, source, source.eval_split, data_args.max_eval_samples)
            else:
                rows, held = hold_out(part.rows, data_args.eval_share, data_args.sample_seed)
                held = _limited(held, data_args.max_eval_samples, data_args.sample_seed)
                part, held = part._replace(rows=rows), part._replace(rows=held)
            train.append(part)
            if held.rows is not None:
                choice = "first" if data_args.caption_choice == "random" else data_args.caption_choice
                evaluation.append(held._replace(reading=replace(held.reading, caption_choice=choice)))
        test = data_args.test_source()
        if test is not None:
            whole = replace(data_args, streaming=False, caption_choice="first")
            test = _open(stage, whole, test, test.split, test.max_samples)
    weights = [source.weight for source in sources]
    return Data(train, evaluation, test, None if None in weights else weights)


def _open(
    stage: Stage, data_args: DataArguments, source: SourceArguments, split: str | None, limit: int | None
) -> Part:
    found = open_source(
        source.path,
        name=source.name,
        split=split,
        revision=source.revision,
        image_dir=source.image_dir,
        streaming=data_args.streaming,
    )
    reading = Reading(
        source=found.name,
        prompt=data_args.prompt if stage.asks else "",
        caption_choice=data_args.caption_choice,
        columns=source.columns,
        image_dir=None if found.image_dir is None else str(found.image_dir),
        allow_urls=data_args.allow_urls,
    )
    return Part(_limited(found.rows, limit, data_args.sample_seed), reading)


def _limited(rows, limit, seed=None):
    """That many rows; of a stream, and without a seed, the first."""
    if rows is None or limit is None:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.take(limit)
    if limit >= len(rows):
        return rows
    return (rows if seed is None else rows.shuffle(seed=seed)).select(range(limit))


def _groups_by_length(training_args):
    return training_args.train_sampling_strategy == "group_by_length"


def training_texts(stage: Stage, data_args: DataArguments, data: Data, limit: int = 20_000) -> Iterator[str]:
    """Every text of the first rows, with the words that the default template adds: for a tokenizer that is trained."""
    parts = list(data.train)
    if data_args.tokenizer_dataset_name is not None:
        source = replace(data_args.sources()[0], name=data_args.tokenizer_dataset_name)
        parts.append(_open(stage, data_args, source, source.split, None))
    yield "User: \nAssistant: "
    for rows, reading in parts:
        plain = rows if isinstance(rows, datasets.IterableDataset) else rows.with_format(None)
        for index, row in enumerate(itertools.islice(plain, limit)):
            for item in reading.items(row, index):
                for message in item.get("messages", ()):
                    yield from (" " + part["text"] for part in message["content"] if part["type"] == "text")


class Survey(NamedTuple):
    """What a first look at a data set found: an account, and of what, if not of everything."""

    account: Account
    sampled: bool


TrainDataset = ConversationDataset | MixedDataset | StreamedDataset


def encode_data(
    stage: Stage, data: Data, processor: VLMProcessor, data_args: DataArguments, training_args, max_length: int
) -> tuple[TrainDataset, ConversationDataset | MixedDataset | list | None, dict[str, Survey]]:
    """
    The training and evaluation data, encoded ahead where that is quick or asked for, and what they hold.

    Raises:
        ValueError: nothing could be learned, or everything would be.
    """
    encode = stage.encoder(data_args)
    seed = training_args.data_seed if training_args.data_seed is not None else training_args.seed
    settings = {
        "processor": processor, "encode": encode, "max_length": max_length, "on_bad_sample": data_args.on_bad_sample
    }  # fmt: skip
    ahead, sizes_are_fetched = data_args.encode_ahead, data_args.allow_urls and processor.max_tiles > 1
    if ahead is None and not data_args.streaming:
        small = sum(len(rows) for rows, _ in data.train) <= ENCODED_AHEAD
        ahead = _groups_by_length(training_args) or (small and not sizes_are_fetched)
    if ahead and sizes_are_fetched:
        raise DuetError(
            "with --max_tiles the length of a sample follows from the sizes of its images, and with --allow_urls these "
            "are known when a batch is made; leave out --encode_ahead and --train_sampling_strategy group_by_length, "
            "or fetch the images and name their folder with --image_dir."
        )
    evaluation = None
    with training_args.main_process_first(desc="encoding the data"):
        train = joined(data.train, data.weights, seed, settings if ahead else None, data_args.shuffle_buffer)
        if isinstance(train, StreamedDataset):  # more workers than files would have nothing to read
            training_args.dataloader_num_workers = min(training_args.dataloader_num_workers, train.num_shards)
        if data.eval and data_args.streaming:
            evaluation = [
                item
                for rows, reading in data.eval
                for index, row in enumerate(rows.take(HELD_OUT_ROWS))
                for item in reading.items(row, index)
            ]
        elif data.eval:
            evaluation = joined(data.eval, None, seed, settings if ahead else None)
    surveys = {"training": _survey(train, processor, encode, max_length)}
    if evaluation:
        surveys["evaluation"] = _survey(evaluation, processor, encode, max_length)
    _check_account(stage, surveys["training"].account, data_args)
    if training_args.process_index == 0:
        _check_images(train, data_args.on_bad_sample)
    return train, evaluation, surveys


def encode_test(stage: Stage, test: Part, processor: VLMProcessor, max_length: int) -> ConversationDataset:
    """The questions that are answered after training; every answer counts, so all of them are supervised."""
    dataset = ConversationDataset(*test)
    dataset.encode_ahead(processor, stage.encode, max_length)
    return dataset


def joined(
    parts: list[Part],
    weights: list[float] | None,
    seed: int,
    encoding: dict[str, Any] | None = None,
    shuffle_buffer: int = 1,
) -> TrainDataset:
    """
    The rows of all sources as one data set.

    Args:
        encoding: arguments of `encode_ahead`, where that is wanted.
        shuffle_buffer: of a stream.
    """
    if any(isinstance(rows, datasets.IterableDataset) for rows, _ in parts):
        return StreamedDataset(parts, weights, seed, shuffle_buffer)
    found = [ConversationDataset(rows, reading, seed) for rows, reading in parts]
    for dataset in found if encoding is not None else ():
        dataset.encode_ahead(**encoding)
    return found[0] if len(found) == 1 else MixedDataset(found, weights, seed)


def _survey(dataset, processor: VLMProcessor, encode: Encode, max_length: int) -> Survey:
    """The account of what is encoded already, else of some items."""
    if getattr(dataset, "is_encoded", False):
        return Survey(dataset.account, sampled=False)
    account, items = Account(), some_items(dataset, SURVEYED)
    if processor.max_tiles > 1:  # how long a sample is whose images have to be fetched is known when it is learned from
        items = (item for item in items if not any(map(is_url, item.get("images") or ())))
    account.add(encode_item(item, processor, encode, max_length)[1] for item in items)
    return Survey(account, sampled=True)


def some_items(dataset, number: int) -> Iterator[dict[str, Any]]:
    """Items from all over a data set, as many of each of its sources; of a stream the first."""
    parts = getattr(dataset, "parts", None)
    if parts is not None and len(parts) > 1:
        parts = [StreamedDataset([part], None, dataset.seed) for part in parts] if _is_stream(dataset) else parts
        each = -(-number // len(parts))
        return itertools.islice(itertools.chain.from_iterable(some_items(part, each) for part in parts), number)
    if _is_stream(dataset):
        first = StreamedDataset(dataset.parts, dataset.weights, dataset.seed, shuffle_buffer=1)
        return itertools.islice(first, number)
    number = min(number, len(dataset))
    return (dataset[index * len(dataset) // number] for index in range(number))


def _is_stream(dataset):
    return isinstance(dataset, StreamedDataset)


def _check_account(stage: Stage, account: Account, data_args: DataArguments) -> None:
    total = account.total
    for source, counts in account.sources.items():
        if counts["learned from"]:
            continue
        reasons = [key for key in counts if key.startswith("dropped: ")]
        found = "; ".join(f"{key.removeprefix('dropped: ')} ({counts[key]:,} samples)" for key in reasons)
        details = (detail for (place, _), (_, detail) in account.named.items() if place == source and detail)
        example = next(details, "")
        raise DuetError(
            f"{source}: there is nothing to learn from: {found}" + (f", such as {example}" if example else "")
        )
    # Of every sequence the first token has nothing before it to be predicted from.
    everything = total["tokens"] - total["image_tokens"] - total["learned from"]
    if stage.asks and not data_args.supervise_prompt and 0 < everything <= total["supervised"]:
        raise DuetError(
            f"{', '.join(account.sources)}: every token of every sample would be learned, so nothing is asked; "
            "expected dialogues with a user message. If that is meant, add --supervise_prompt."
        )


def _check_images(dataset, on_bad_sample: str) -> None:
    """Open the headers of some images, so that a wrong folder is known now and not in the first epoch."""
    found, failed = 0, None
    for item in some_items(dataset, IMAGES_CHECKED):
        for reference in item.get("images", ()):
            if is_url(reference):
                continue
            found += 1
            try:
                check_image(reference)
            except ValueError as error:
                failed = failed or error
                if on_bad_sample == "error":
                    raise
                continue
            if on_bad_sample == "skip":
                return
    if found and failed is not None:
        raise failed


def report_data(surveys: dict[str, Survey]) -> str:
    """What will be learned from, in lines for a terminal."""
    lines = []
    for name, (account, sampled) in surveys.items():
        note = f" (a sample of {account.total['samples']:,})" if sampled else ""
        lines += [f"{name} data{note}", account.table(), ""]
    return "\n".join(lines)


def write_data_report(folder: Path, consumed: Account, train: TrainDataset) -> Account:
    """
    Write `data_report.json`: every sample that was learned from or dropped, as often as it was.

    What was dropped when the data were encoded ahead never came into a batch, and counts once.
    """
    if getattr(train, "is_encoded", False):
        consumed.merge(train.account.dropped_only())
    text = json.dumps(consumed.report(), indent=2, ensure_ascii=False)
    (folder / "data_report.json").write_text(text + "\n", encoding="utf-8")
    return consumed


__all__ = [
    "PRETRAIN",
    "SFT",
    "Data",
    "Stage",
    "encode_data",
    "encode_test",
    "joined",
    "load_data",
    "report_data",
    "some_items",
    "training_texts",
    "write_data_report",
]
