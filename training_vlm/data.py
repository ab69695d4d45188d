"""The data of a run: every split opened, and encoded or left to be encoded when a batch is made."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import datasets
from transformers.trainer_utils import IntervalStrategy

from processing.batching.dataset import ConversationDataset, MixedDataset, Reading, StreamedDataset
from processing.batching.encoding import Encoder
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import ImagePolicy
from processing.reading.download import download_coco
from processing.reading.rows import HELD_OUT_ROWS, hold_out, limited
from processing.reading.settings import SourceSettings
from processing.reading.sources import open_source, split_names

from .arguments import DataArguments
from .learning.sampling import order_seed
from .stages import Stage
from .training_arguments import VLMTrainingArguments


ENCODED_AHEAD = 20_000


class StreamedItems(list):
    """
    Items of rows that were streamed.

    Attributes:
        asked (`list`): the items of the same rows, with every answer of each.
    """

    asked: list[Any]


TrainDataset = ConversationDataset | MixedDataset | StreamedDataset
EvalDataset = ConversationDataset | MixedDataset | StreamedItems | None


class Opened(NamedTuple):
    """The rows of one source, and how they are read."""

    rows: datasets.Dataset | datasets.IterableDataset
    reading: Reading


@dataclass
class Data:
    """The rows of a run: to learn from, for the evaluation loss, and for the questions answered after training."""

    train: list[Opened]
    eval: list[Opened]
    test: Opened | None
    weights: list[float] | None

    @property
    def name(self) -> str:
        """The sources that are learned from, by name."""
        return ", ".join(part.reading.source for part in self.train)


def load_data(stage: Stage, data_args: DataArguments, training_args: VLMTrainingArguments, asks: bool = False) -> Data:
    """
    Open every split that the run reads.

    Args:
        asks: evaluations ask questions; where nothing is held out, the loss is that of the test data they come from.

    Raises:
        DuetError: a data set that is not there, or not as expected.
    """
    sources = data_args.sources()
    if data_args.streaming and training_args.max_steps <= 0:
        raise DuetError("a streamed data set has no end that is known; say how far to train with --max_steps.")
    if data_args.streaming and (data_args.encode_ahead or _groups_by_length(training_args)):
        raise DuetError(
            "a streamed data set is not encoded ahead, so it cannot be grouped by length either; leave out "
            "--streaming, or --encode_ahead and --train_sampling_strategy group_by_length."
        )
    asked = evaluation_is_asked(data_args, training_args)
    with training_args.main_process_first(desc="loading the data"):
        if data_args.download:
            named = filter(None, (data_args.train_split, data_args.eval_split, data_args.test_split))
            splits = {name for split in named for name in split_names(split)} or {"train2017"}
            download_coco(sources[0].path, sorted(splits))
        train, evaluation = [], []
        for source in sources:
            opened = _open(stage, data_args, source, source.split, source.max_samples)
            held: Opened | None
            if source.eval_split is not None:
                held = _open(stage, data_args, source, source.eval_split, data_args.max_eval_samples)
            else:
                share, at_least = data_args.held_out_share, 1 if asked and data_args.held_out_share else 0
                rows, others = hold_out(opened.rows, share, data_args.sample_seed, at_least)
                others = limited(others, data_args.max_eval_samples, data_args.sample_seed)
                held = None if others is None else opened._replace(rows=others)
                opened = opened._replace(rows=rows)
            train.append(opened)
            if held is not None:
                choice = "first" if data_args.caption_choice == "random" else data_args.caption_choice
                evaluation.append(held._replace(reading=replace(held.reading, caption_choice=choice)))
        test, source_of_test = None, data_args.test_source()
        if source_of_test is not None:
            whole = replace(data_args, streaming=False, caption_choice="all", split_turns="none")
            test = _open(stage, whole, source_of_test, source_of_test.split, source_of_test.max_samples)
    if asked and not evaluation and asks and test is not None:
        evaluation = [test]
    if asked and not evaluation:
        raise DuetError(_nothing_held_out(data_args, training_args))
    weights = [source.weight for source in sources if source.weight is not None]
    return Data(train, evaluation, test, weights if len(weights) == len(sources) else None)


def evaluation_is_asked(data_args: DataArguments, training_args: VLMTrainingArguments) -> bool:
    """Whether an evaluation was asked for, so that a run without one would not be what was asked for."""
    asked = training_args.eval_on_start or IntervalStrategy(training_args.eval_strategy).value != "no"
    return asked or bool(data_args.eval_share) or any(source.eval_split for source in data_args.sources())


def _nothing_held_out(data_args, training_args):
    if training_args.eval_on_start:
        name, value = "eval_on_start", "True"
    elif (strategy := training_args.eval_strategy.value) != "no":
        name, value = "eval_strategy", strategy
    else:
        name, value = "eval_share", data_args.eval_share
    if data_args.held_out_share:
        reason = "a single training row cannot be held out"
    elif data_args.eval_share is None:
        reason = "nothing of a streamed data set is held out unless a share is named"
    else:
        reason = "eval_share=0 holds nothing out"
    return (
        f"{name}={value} asks for an evaluation, and there is nothing to evaluate on: {reason}; name an --eval_split, "
        f"hold out a share with --eval_share 0.01, or leave out --{name}."
    )


def _open(
    stage: Stage, data_args: DataArguments, source: SourceSettings, split: str | None, limit: int | None
) -> Opened:
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
        choice_answer=data_args.choice_answer,
        split_turns=data_args.split_turns,
        columns=source.columns,
        images=ImagePolicy(
            None if found.image_dir is None else str(found.image_dir),
            allow_urls=data_args.allow_urls,
            allow_links=data_args.allow_links,
            allow_local_urls=data_args.allow_local_urls,
            caches=found.caches,
        ),
    )
    return Opened(limited(found.rows, limit, data_args.sample_seed), reading)


def _groups_by_length(training_args):
    return training_args.train_sampling_strategy == "group_by_length"


def training_texts(stage: Stage, data_args: DataArguments, data: Data, limit: int = 20_000) -> Iterator[str]:
    """Every text of the first rows, with the words that the default template adds: for a tokenizer that is trained."""
    sources = list(data.train)
    if data_args.tokenizer_dataset_name is not None:
        source = replace(data_args.sources()[0], name=data_args.tokenizer_dataset_name)
        sources.append(_open(stage, data_args, source, source.split, None))
    yield "User: \nAssistant: "
    for rows, reading in sources:
        plain = rows if isinstance(rows, datasets.IterableDataset) else rows.with_format(None)
        for index, row in enumerate(itertools.islice(plain, limit)):
            for item in reading.items(row, index):
                for message in item["messages"] if "dropped" not in item else ():
                    yield from (" " + part["text"] for part in message["content"] if part["type"] == "text")


def encode_data(
    data: Data, encoder: Encoder, data_args: DataArguments, training_args: VLMTrainingArguments
) -> tuple[TrainDataset, EvalDataset]:
    """
    The training and evaluation data, encoded ahead where that is quick or asked for.

    Raises:
        DuetError: they are to be encoded ahead, and cannot be.
    """
    seed = order_seed(training_args)
    settings = {"encoder": encoder, "on_bad_sample": data_args.on_bad_sample}
    ahead, sizes_are_fetched = data_args.encode_ahead, data_args.allow_urls and encoder.processor.max_tiles > 1
    if ahead is None and not data_args.streaming:
        small = sum(len(rows) for rows, _ in data.train) <= ENCODED_AHEAD
        ahead = _groups_by_length(training_args) or (small and not sizes_are_fetched)
    if ahead and sizes_are_fetched:
        raise DuetError(
            "with --max_tiles the length of a sample follows from the sizes of its images, and with --allow_urls these "
            "are known when a batch is made; leave out --encode_ahead and --train_sampling_strategy group_by_length, "
            "or fetch the images and name their folder with --image_dir."
        )
    evaluation: EvalDataset = None
    with training_args.main_process_first(desc="encoding the data"):
        train = joined(data.train, data.weights, seed, settings if ahead else None, data_args.shuffle_buffer)
        if isinstance(train, StreamedDataset):  # more workers than files would have nothing to read
            workers = training_args.dataloader_num_workers or 0
            training_args.dataloader_num_workers = min(workers, train.num_shards)
        if data.eval and data_args.streaming:
            evaluation = _streamed_items(data.eval)
        elif data.eval:
            whole = joined(data.eval, None, seed, settings if ahead else None)
            evaluation = cast(ConversationDataset | MixedDataset, whole)  # none of its sources is streamed
    return train, evaluation


def _streamed_items(sources: list[Opened]) -> StreamedItems:
    items, asked = StreamedItems(), []
    for rows, reading in sources:
        for index, row in enumerate(rows.take(HELD_OUT_ROWS)):
            items += reading.items(row, index)
            asked += _asked(reading).items(row, index)
    items.asked = asked
    return items


def _asked(reading: Reading) -> Reading:
    return replace(reading, caption_choice="all")


def items_to_ask(dataset: Any, most: int | None = None) -> Any:
    """
    What is asked about of data that are learned from or that the loss is of: every answer of their rows, not encoded.

    Args:
        dataset: that data; a list is taken as it is.
        most: items, where the data have no end.
    """
    if isinstance(dataset, ConversationDataset):
        return ConversationDataset(dataset.rows, _asked(dataset.reading))
    if isinstance(dataset, MixedDataset):
        return MixedDataset([items_to_ask(source, most) for source in dataset.sources])
    if isinstance(dataset, StreamedDataset):
        stream = StreamedDataset(
            [(rows, _asked(reading)) for rows, reading in dataset.sources],
            dataset.weights, dataset.seed, dataset.shuffle_buffer,
        )  # fmt: skip
        stream.keeps_rows = True
        return list(itertools.islice(stream, most))
    return dataset.asked if isinstance(dataset, StreamedItems) else dataset


def encode_test(data: Data, encoder: Encoder, training_args: VLMTrainingArguments) -> ConversationDataset | None:
    """
    The questions that are answered after training, where there is a test set.

    Every answer counts, so all of them are supervised.
    """
    if data.test is None:
        return None
    dataset = ConversationDataset(*data.test)
    with training_args.main_process_first(desc="encoding the test data"):
        dataset.encode_ahead(Encoder(encoder.processor, encoder.encode, encoder.max_length))
    return dataset


def joined(
    sources: list[Opened],
    weights: list[float] | None,
    seed: int,
    encoding: dict[str, Any] | None = None,
    shuffle_buffer: int = 1,
) -> TrainDataset:
    """
    The rows of all sources as one data set.

    Args:
        encoding: arguments of `encode_ahead`, where that is wanted.
        shuffle_buffer: samples of a stream among which the next is drawn.
    """
    if any(isinstance(rows, datasets.IterableDataset) for rows, _ in sources):
        return StreamedDataset(sources, weights, seed, shuffle_buffer)
    found = [ConversationDataset(rows, reading, seed) for rows, reading in sources]
    if encoding is not None:
        for dataset in found:
            dataset.encode_ahead(**encoding)
    return found[0] if len(found) == 1 else MixedDataset(found, weights, seed)


__all__ = [
    "Data",
    "EvalDataset",
    "Opened",
    "TrainDataset",
    "encode_data",
    "encode_test",
    "evaluation_is_asked",
    "items_to_ask",
    "joined",
    "load_data",
    "training_texts",
]
