"""Questions of a data set, asked of a model by every process, each of which then knows all answers.

What is special: an image that is stored in its row stays there until its question is asked, so that thousands of
questions take no more memory than their ids. Questions about one image are asked by one process, which encodes it once.
"""

import contextlib
import functools
import operator
import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.fsdp import FullyShardedDataParallel, register_fsdp_forward_method
from transformers import GenerationConfig

from inference_vlm.answering import answer
from inference_vlm.encoded_images import name_of
from inference_vlm.weighing import Weighing, answer_ids
from processing.batching.account import Record
from processing.batching.encoding import IGNORE, Encoded, Encoder, encode_item
from processing.batching.features import FeatureCache
from processing.image_files_vlm import BadImage, check_image
from processing.processing_vlm import VLMProcessor

from .predictions import Prediction
from .questions import Question, find_questions


class StoredImages(Sequence[Any]):
    """
    The images of an item of a data set, read whenever they are looked at, so that none stays in memory.

    Args:
        dataset: whose items hold them.
        item: number of the item.
        shown: how many of its images.
    """

    def __init__(self, dataset: Any, item: int, shown: int):
        self.dataset, self.item, self.shown = dataset, item, shown

    def __len__(self) -> int:
        return self.shown

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice) and not (place.start or place.step):  # as a question asks for
            return StoredImages(self.dataset, self.item, place.indices(self.shown)[1])
        return list(self)[place]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset[self.item]["images"][: self.shown])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def questions_of(dataset: Any, encoder: Encoder, most: int | None = None) -> list[Question]:
    """
    The questions of a data set whose images are there; of each that is not a line is printed, and one of those that ask
    nothing.

    What is asked has to fit into the encoder's `max_length`; what is right is whole, however long.

    Args:
        dataset: items, encoded or not, in a data set or a list.
        encoder: how conversations are encoded; what it makes of the long ones, or learns of prompts, is of no account.
        most: items that are looked at, the first; all if not given.
    """
    options = {name: value for name, value in encoder.options.items() if name == "supervise"}
    fitting, whole = (
        Encoder(encoder.processor, encoder.encode, limit, **options) for limit in (encoder.max_length, None)
    )
    count = len(dataset) if most is None else min(most, len(dataset))
    dropped: list[Record] = []

    def readable() -> Iterator[dict[str, Any]]:
        for index in range(count):
            item = dataset[index]
            encoded, record = encode_item(item, fitting)
            if encoded is None:
                dropped.append(record)
                continue
            if encoded.get("cut"):
                conversation = item if "messages" in item else _conversation(dataset, index)
                encoded = _with_whole_answer(encoded, encode_item(conversation, whole)[0])
            images = encoded["images"]
            try:
                for reference in images:
                    check_image(reference)
            except BadImage as error:
                say(f"left out of the questions: {error}")
                continue
            stored = any(isinstance(reference, dict) for reference in images)
            yield {**encoded, "images": StoredImages(dataset, index, len(images)) if stored else images}

    questions = find_questions(readable(), encoder.processor)
    if dropped:
        such_as = dropped[0].detail or f"{dropped[0].source}, row {dropped[0].row}: {dropped[0].dropped}"
        say(f"left out of the questions: {len(dropped):,} of {count:,} samples, such as {such_as}")
    return questions


def _conversation(dataset: Any, index: int) -> Any:
    """An item of a data set before it was encoded, where the data set knows it."""
    return dataset.conversation(index) if hasattr(dataset, "conversation") else dataset[index]


def _with_whole_answer(cut: Encoded, whole: Encoded | None) -> Encoded:
    """A conversation that was cut, with the rest of the answer that it was cut in."""
    if whole is None:  # its images have gone meanwhile
        return cut
    end, labels = len(cut["input_ids"]), whole["labels"]
    if cut["labels"][-1] != IGNORE:
        end = next((place for place in range(end, len(labels)) if labels[place] == IGNORE), len(labels))
    return cast(Encoded, {**whole, "input_ids": whole["input_ids"][:end], "labels": labels[:end]})


def say(line: str) -> None:
    """Print a line, where all processes would: in the main one."""
    if PartialState().is_main_process:
        print(line)


def answer_questions(
    model: Any,
    processor: VLMProcessor,
    questions: Sequence[Question],
    batch_size: int,
    config: GenerationConfig,
    cache: FeatureCache | None = None,
    in_step: bool = False,
    weighs: bool = False,
    progress: bool = False,
) -> list[Prediction]:
    """
    What a model answers: every process asks its share, and gets the answers of all, in the order of the questions.

    Those whose images cannot be read are left out, and named in a line each. The model and its settings, and what is
    random, are afterwards as they were.

    Args:
        model: a composed model, or one with adapters around it.
        batch_size: questions that a process asks at a time.
        config: the settings of generation.
        cache: features of the images, read in place of encoding them.
        in_step: the processes share the model's weights (FSDP, ZeRO-3), so they have to run it together.
        weighs: the predictions tell how likely the model finds each choice of a question.
        progress: draw a bar on stderr, in the main process.
    """
    state = PartialState()
    mine = _shares(questions, state.num_processes)[state.process_index]
    prompts, weighing = [questions[i].prompt for i in mine], None
    if weighs:
        ids_of = functools.cache(functools.partial(answer_ids, processor))
        weighing = Weighing([[ids_of(choice) for choice in questions[i].choices] for i in mine], batch_size)
    with whole_weights(model) if in_step else contextlib.nullcontext(), untouched_randomness():
        said = answer(
            model, processor, prompts, batch_size, config, cache, in_step, weighing, progress and state.is_main_process
        )
    weights = {} if weighing is None else weighing.found
    answered = [(index, text, weights.get(place)) for place, (index, text) in enumerate(zip(mine, said))]
    if state.num_processes > 1:
        answered = gather_object(answered)
    answered.sort(key=operator.itemgetter(0))
    return [Prediction(questions[index], text, found) for index, text, found in answered if text is not None]


def _shares(questions: Sequence[Question], processes: int) -> list[list[int]]:
    """For each process the numbers of its questions, about as many as the others': those about an image go together."""
    if processes == 1:
        return [list(range(len(questions)))]
    about: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        first = next(iter(question.prompt.images), None)
        about.setdefault(("alone", number) if first is None else name_of(first), []).append(number)
    shares: list[list[int]] = [[] for _ in range(processes)]
    fair = -(-len(questions) // processes)
    parts = [numbers[at : at + fair] for numbers in about.values() for at in range(0, len(numbers), fair)]
    for numbers in sorted(parts, key=len, reverse=True):
        min(shares, key=len).extend(numbers)
    return [sorted(share) for share in shares]


@contextlib.contextmanager
def untouched_randomness() -> Iterator[None]:
    """What is random goes on afterwards as if nothing had been drawn."""
    own, numbers = random.getstate(), np.random.get_state()
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    current = getattr(torch.get_device_module(kind), "current_device", None) if kind is not None else None
    devices = [] if current is None else [current()]
    with torch.random.fork_rng(devices, device_type="cuda" if kind is None else kind.type):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numbers)


@contextlib.contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """A model of which each process has a part, ready to write."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
        return
    for name in ("generate", "get_image_features"):
        if not hasattr(vars(model).get(name), "__wrapped__"):  # registered before
            register_fsdp_forward_method(model, name)  # does nothing where FSDP2 is not at work
    yield


__all__ = ["StoredImages", "answer_questions", "questions_of", "untouched_randomness", "whole_weights"]
