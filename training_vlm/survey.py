"""A first look at the data of a run, before the first step: what will be learned, and whether that is anything.

An account of what is encoded, else of some samples; the headers of some images; and a refusal where nothing could be
learned, or everything would be.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from processing.batching.account import Account, Record, number_of
from processing.batching.dataset import ConversationDataset, StreamedDataset
from processing.batching.encoding import Encoded, Encoder, encode_item
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import BadImage, check_image, is_url

from .arguments import DataArguments
from .data import EvalDataset, TrainDataset, evaluation_is_asked
from .private import public_account
from .stages import Stage
from .training_arguments import VLMTrainingArguments


SURVEYED = 1_000
IMAGES_CHECKED = 200


class Survey(NamedTuple):
    """What a first look at a data set found: an account, of what, if not of everything, and what images are no good."""

    account: Account
    sampled: bool
    images: str = ""


def survey_data(
    stage: Stage,
    train: TrainDataset,
    evaluation: EvalDataset,
    test: ConversationDataset | None,
    encoder: Encoder,
    data_args: DataArguments,
    training_args: VLMTrainingArguments,
) -> dict[str, Survey]:
    """
    What the training, evaluation and test data hold.

    Raises:
        DuetError: nothing could be learned or asked, or everything would be learned.
    """
    first = training_args.process_index == 0
    surveys = {"training": survey_training(stage, train, encoder, data_args)}
    if first:
        bad = _check_images(train, data_args.on_bad_sample)
        surveys["training"] = surveys["training"]._replace(images=bad)
    if evaluation is not None:
        surveys["evaluation"] = _survey(evaluation, encoder)
        if evaluation_is_asked(data_args, training_args):
            _check_account(evaluation, surveys["evaluation"], "evaluate on")
            if first:
                bad = _check_images(evaluation, data_args.on_bad_sample)
                surveys["evaluation"] = surveys["evaluation"]._replace(images=bad)
    if test is not None:
        surveys["test"] = Survey(_without_bad_images(test, encoder) if first else test.account, sampled=False)
        _check_account(test, surveys["test"], "ask")
    return surveys


def survey_training(
    stage: Stage, train: TrainDataset, encoder: Encoder, data_args: DataArguments, is_part: bool = False
) -> Survey:
    """
    What the training data hold; no image is looked at.

    Args:
        is_part: there are more of them than `train`, so that a source of which nothing is learned here may have others.

    Raises:
        DuetError: nothing could be learned, or everything would be.
    """
    found = _survey(train, encoder)
    found = found._replace(sampled=found.sampled or is_part)
    if not (is_part and found.account.total["learned from"]):
        _check_account(train, found, "learn from")
    _check_questions(stage, found, data_args)
    return found


def _survey(dataset, encoder: Encoder) -> Survey:
    """The account of what is encoded already, else of some items."""
    if getattr(dataset, "is_encoded", False):
        return Survey(dataset.account, sampled=False)
    account, sampled = Account(), False
    sources, each = _in_shares(dataset, SURVEYED)
    for source in sources:
        for number, item in enumerate(some_items(source, each + 1)):
            if number == each or length_is_fetched(item, encoder):
                sampled = True
            else:
                account.add([encode_item(item, encoder)[1]])
    return Survey(account, sampled)


def some_items(dataset, number: int) -> Iterator[dict[str, Any]]:
    """Items from all over a data set, none twice, as many of each of its sources; of a stream the first."""
    sources, each = _in_shares(dataset, number)
    if len(sources) > 1:
        return itertools.islice(itertools.chain.from_iterable(some_items(source, each) for source in sources), number)
    if isinstance(dataset, StreamedDataset):
        return itertools.islice(cast(Iterator[dict[str, Any]], dataset.once()), number)
    number = min(number, len(dataset))
    return (dataset[index * len(dataset) // number] for index in range(number))


def length_is_fetched(item: Any, encoder: Encoder) -> bool:
    """Whether how long a sample is will be known when it is learned from: images are tiled, and it has to fetch one."""
    return encoder.processor.max_tiles > 1 and any(map(is_url, item.get("images") or ()))


def _in_shares(dataset, number):
    """The sources of a data set, and how many items of each are so many together, or some more."""
    sources = sources_of(dataset)
    return sources, -(-number // len(sources))


def sources_of(dataset) -> list[Any]:
    """The data sets that a mix is made of, or the one that is none."""
    if isinstance(dataset, StreamedDataset):
        return [StreamedDataset([source], None, dataset.seed) for source in dataset.sources]
    return getattr(dataset, "sources", [dataset])


def _without_bad_images(test: ConversationDataset, encoder: Encoder) -> Account:
    """The account of test questions, in which those count as dropped whose images are not there or no images."""
    account = Account()
    account.merge(test.account.dropped_only())
    for index in range(len(test)):
        item = cast(Encoded, test[index])  # as all of a test are, ahead
        record = encode_item(item, encoder)[1]
        try:
            for reference in item["images"]:
                if not is_url(reference):
                    check_image(reference)
        except BadImage as error:
            record = Record(record.source, item["row"], error.reason, str(error))
        account.add([record])
    return account


def _check_account(dataset, survey: Survey, purpose: str) -> None:
    account = survey.account
    if not account.sources and next(some_items(dataset, 1), None) is None:
        raise DuetError(f"there is nothing to {purpose}: the data set has no rows.")
    for source, counts in account.sources.items():
        if counts["learned from"]:
            continue
        reasons = [key for key in counts if key.startswith("dropped: ")]
        found = "; ".join(f"{key.removeprefix('dropped: ')} ({number_of(counts[key], 'sample')})" for key in reasons)
        details = (detail for (place, _), (_, detail) in account.named.items() if place == source and detail)
        example = next(details, "")
        sample = _sampled(survey, counts)
        raise DuetError(
            f"{source}: there is nothing to {purpose}{sample}: {found}" + (f", such as {example}" if example else "")
        )


def _sampled(survey, counts):
    return f" in a sample of {counts['samples']:,}" if survey.sampled else ""


def _check_questions(stage: Stage, survey: Survey, data_args: DataArguments) -> None:
    total = survey.account.total
    # The first token of a sequence has nothing before it to be predicted from.
    everything = total["tokens"] - total["image_tokens"] - total["learned from"]
    if stage.asks and not data_args.supervise_prompt and 0 < everything <= total["supervised"]:
        raise DuetError(
            f"{', '.join(survey.account.sources)}: every token of every sample{_sampled(survey, total)} would be "
            "learned, so nothing is asked; expected dialogues with a user message. If that is meant, add "
            "--supervise_prompt."
        )


def _check_images(dataset, on_bad_sample: str) -> str:
    """Open the headers of some images, so that a wrong folder is known now; a line that says how many are no good."""
    failed: dict[str | None, list[BadImage]] = {}
    readable, looked_at = set(), 0
    for item in some_items(dataset, IMAGES_CHECKED):
        source = item.get("source")
        for reference in item.get("images") or ():
            if is_url(reference):
                continue
            looked_at += 1
            try:
                check_image(reference)
            except BadImage as error:
                if on_bad_sample == "error":
                    raise
                failed.setdefault(source, []).append(error)
            else:
                readable.add(source)
    for source, errors in failed.items():
        if source not in readable:
            raise errors[0]
    bad = [error for errors in failed.values() for error in errors]
    if not bad:
        return ""
    found = f"{len(bad):,} of {looked_at:,} images that were looked at cannot be read"
    return f"{found} (such as {bad[0]}); a sample without its image is dropped when its turn comes"


def report_data(surveys: dict[str, Survey]) -> str:
    """What will be learned from, in lines for a terminal."""
    lines = []
    for name, (account, sampled, images) in surveys.items():
        note = f" (a sample of {account.total['samples']:,})" if sampled else ""
        lines += [f"{name} data{note}", account.table(), *([images] if images else []), ""]
    return "\n".join(lines)


def write_data_report(folder: Path, consumed: Account, train: TrainDataset) -> Account:
    """
    Write `data_report.json`: every sample that was learned from or dropped, as often as it was; its sources are named
    without the folders that they lie in, as it lies beside the model.

    What was dropped when the data were encoded ahead never came into a batch, and counts once.
    """
    if not isinstance(train, StreamedDataset) and train.is_encoded:
        consumed.merge(train.account.dropped_only())
    text = json.dumps(public_account(consumed).report(), indent=2, ensure_ascii=False)
    (folder / "data_report.json").write_text(text + "\n", encoding="utf-8")
    return consumed


__all__ = [
    "Survey", "length_is_fetched", "report_data", "some_items", "sources_of", "survey_data", "survey_training",
    "write_data_report",
]  # fmt: skip
