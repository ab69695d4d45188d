"""A model is loaded once, and answers many prompts.

What is special: prompts are ids, those that training goes on from, and of any length together; an image is encoded once
for all prompts that show it; an answer is never longer than the positions that its language model has; and an image
that cannot be read costs its own prompt alone. Memory holds a few batches, whatever the number of prompts.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from processing.batching.features import FeatureCache
from processing.data_error_vlm import DuetError, in_a_line
from processing.image_files_vlm import BadImage
from processing.processing_vlm import VLMProcessor

from .encoded_images import EncodedImages, name_of
from .weighing import Weighing


_BATCHES_NEAR = 8  # batches of prompts among which those of like length are put together


class Prompt(NamedTuple):
    """Ids that a model is to go on with, one id an image, and references to the images in their order."""

    ids: list[int]
    images: list[Any]


def load(name: str) -> tuple[PreTrainedModel, VLMProcessor]:
    """
    A composed model, ready to answer, and its processor.

    Args:
        name: folder or Hub name; its own code is run.

    Raises:
        DuetError: there is none, or its files cannot be read.
    """
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = in_a_line(error)
        raise DuetError(
            f"the model {name!r} could not be loaded: expected a folder that Duet saved, or a name on the Hub. {reason}"
        ) from error
    return model.eval(), processor


def greedy(model: PreTrainedModel, processor: VLMProcessor, max_new_tokens: int) -> GenerationConfig:
    """Settings that take the likeliest token at each step, with the model's own token ids and no penalty."""
    config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        max_new_tokens=max_new_tokens,
    )
    processor.update_generation_config(config)
    return config


@torch.no_grad()
def answer(
    model: Any,
    processor: VLMProcessor,
    prompts: Sequence[Prompt],
    batch_size: int,
    config: GenerationConfig,
    cache: FeatureCache | None = None,
    in_step: bool = False,
    weighing: Weighing | None = None,
) -> list[str | None]:
    """
    What the model says, in the order of the prompts; `None` where an image cannot be read, which is printed.

    An answer is as long as the positions of the language model allow, and empty where a prompt fills all of them, which
    is printed too. The model, its mode and its settings of generation are afterwards as they were.

    Args:
        model: a composed model, or one with adapters around it.
        batch_size: prompts answered at a time; those about an image come near each other, those of like length
            together.
        config: the settings of generation, instead of the model's own.
        cache: features of the images, read in place of encoding them.
        in_step: every process calls this with prompts of its own, and makes the same calls of the model: those that
            share its weights have to.
        weighing: weighs texts for the prompts, as each is answered; every process gives one or none does.

    Raises:
        DuetError: the model's code is of an earlier Duet, and this transformers needs today's.
    """
    composed = model.get_base_model() if hasattr(model, "get_base_model") else model
    _refuse_old_code(composed)
    names = [tuple(map(name_of, prompt.images)) for prompt in prompts]
    images = EncodedImages(model, processor, names, cache)
    asking = _Asking(prompts, names, images, processor, composed.model.max_positions, config.max_new_tokens)
    answers: list[str | None] = [None] * len(prompts)
    was_training, own = model.training, composed.generation_config
    model.eval()
    composed.generation_config = config  # which `generate` would take what is not said from
    try:
        for batch, room, encodes in _rounds(asking.batches(batch_size), images, in_step):
            written = _written(model, processor, images, batch, room, encodes, in_step)
            for index, ids in zip(batch.indices if batch else (), written):
                answers[index] = text_of(processor, ids)
            if weighing is not None:
                indices, rows, shown = ([], [], []) if batch is None else (batch.indices, batch.rows, batch.names)
                features = [images.of(names) for names in shown]
                weighing.weigh(model, processor, indices, rows, features, asking.limit, in_step)
            images.give_up()
    finally:
        composed.generation_config = own
        model.train(was_training)
    for index in asking.full:
        answers[index] = text_of(processor, [])
    if asking.full:
        print(
            f"{len(asking.full):,} of {len(prompts):,} questions fill all {asking.limit:,} positions: their answers "
            "are empty"
        )
    return answers


def _refuse_old_code(composed):
    """Refuse code of an earlier Duet where transformers does not drop features itself once the prompt has been read."""
    own = type(composed).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    if not own and not hasattr(GenerationMixin, "_expand_multimodal_outputs"):
        raise DuetError(
            "the model carries the code of an earlier Duet, with which this release of transformers cannot answer from "
            "encoded images; bring it up to date with `python -m inference_vlm.update FOLDER`, or update transformers."
        )


class _Batch(NamedTuple):
    """Prompts that are answered together, the names of their images, and the tokens that there is room for."""

    indices: list[int]
    rows: list[list[int]]
    shown: list[dict[Hashable, Any]]
    names: list[tuple[Hashable, ...]]
    room: int


class _Asking:
    """Prompts in the order in which they are answered, `limit` being the positions of the language model."""

    def __init__(self, prompts, names, images, processor, limit, max_new_tokens):
        self.prompts, self.names, self.images, self.processor = prompts, names, images, processor
        self.limit, self.max_new_tokens = limit, max_new_tokens
        self.full: list[int] = []

    def _together(self, batch_size) -> Iterator[list[int]]:
        """Numbers of prompts: those about the same images lie near each other, and in between lengths decide."""
        about: dict[tuple[Hashable, ...], list[int]] = {}
        for index, names in enumerate(self.names):
            about.setdefault(names, []).append(index)
        near: list[int] = []
        last = next(reversed(about), None)
        for names, indices in about.items():
            near += indices
            if len(near) >= _BATCHES_NEAR * batch_size or names == last:
                near.sort(key=lambda index: len(self.prompts[index].ids))
                yield from (near[start : start + batch_size] for start in range(0, len(near), batch_size))
                near = []

    def batches(self, batch_size: int) -> Iterator[_Batch]:
        """The batches, whose images are opened when it is their turn."""
        for indices in self._together(batch_size):
            # Each has its own room for an answer, so those with less than the rest are answered apart.
            of_room: dict[int, list[tuple[int, list[int], dict[Hashable, Any]]]] = {}
            for index in indices:
                shown = dict(zip(self.names[index], self.prompts[index].images))
                try:
                    counts = {name: self.images.tokens(name, reference) for name, reference in shown.items()}
                except BadImage as error:
                    print(f"a question is left out: {error}")
                    self.images.leave_out(self.names[index])
                    continue
                in_order = [counts[name] for name in self.names[index]]
                (row,) = self.processor.expand_images(self.prompts[index].ids, counts=in_order)
                room = self.max_new_tokens if self.limit is None else min(self.max_new_tokens, self.limit - len(row))
                if room < 1:
                    self.full.append(index)
                    self.images.leave_out(self.names[index])
                else:
                    of_room.setdefault(room, []).append((index, row, shown))
            for room, group in of_room.items():
                numbers, rows, shown_by = map(list, zip(*group))
                yield _Batch(numbers, rows, shown_by, [self.names[index] for index in numbers], room)


def _rounds(
    batches: Iterator[_Batch], images: EncodedImages, in_step: bool
) -> Iterator[tuple[_Batch | None, int, bool]]:
    """
    What is done at a time: a batch, the tokens that may be written, and whether images are encoded.

    In step, every process has as many rounds, and `None` in those in which it has no batch of the room of the others:
    who has written its answer goes on with the others, and would run out of positions.
    """
    batch = next(batches, None)
    while True:
        encodes = batch is not None and images.needs(name for names in batch.names for name in names)
        found = [(None if batch is None else batch.room, encodes)]
        if in_step:
            found = gather_object(found)
        least = min((room for room, _ in found if room is not None), default=None)
        if least is None:
            return
        encodes = any(encodes for room, encodes in found if room == least)
        if batch is None or batch.room != least:
            yield None, least, encodes
        else:
            yield batch, least, encodes
            batch = next(batches, None)


def _written(model, processor, images, batch, room, encodes, in_step) -> list[list[int]]:
    """The ids that the model goes on with, for each prompt of a batch."""
    if batch is not None:
        shown = {name: reference for of_prompt in batch.shown for name, reference in of_prompt.items()}
        if encodes and not images.needs(shown):
            images.encode_nothing()
        images.encode(shown)
        rows, features = batch.rows, images.take(name for names in batch.names for name in names)
    else:
        if encodes:
            images.encode_nothing()
        rows, features = [[processor.tokenizer.eos_token_id]], []
    length, pad, device = max(map(len, rows)), processor.tokenizer.pad_token_id, model.device
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device),
    }
    if features:
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    if in_step:
        inputs["synced_gpus"] = True
    return model.generate(**inputs, max_new_tokens=room)[:, length:].tolist()


def text_of(processor: VLMProcessor, ids: list[int]) -> str:
    """What ids say, without control tokens and the blanks around them."""
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


__all__ = ["Prompt", "answer", "greedy", "load", "text_of"]
