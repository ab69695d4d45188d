"""A model is loaded once, and answers many prompts.

What is special: prompts are ids, those that training goes on from, and of any length together; an answer is never
longer than the positions that its language model has; and an image that cannot be read costs its own prompt alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel

from processing.data_error_vlm import DuetError, in_a_line
from processing.image_files_vlm import BadImage, load_image
from processing.processing_vlm import VLMProcessor


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
    model: PreTrainedModel,
    processor: VLMProcessor,
    prompts: Sequence[Prompt],
    batch_size: int,
    config: GenerationConfig,
) -> list[str | None]:
    """
    What the model says, in the order of the prompts; `None` where an image cannot be read, which is printed.

    An answer is as long as the positions of the language model allow, and empty where a prompt fills all of them, which
    is printed too.

    Args:
        batch_size: prompts answered at a time; those of like length go together.
        config: the settings of generation, instead of the model's own.
    """
    model.eval()
    limit = model.model.max_positions
    answers: list[str | None] = [None] * len(prompts)
    full = 0
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    for begin in range(0, len(order), batch_size):
        # Each has its own room for an answer, so those with less than the rest are answered apart.
        groups: dict[int, list[tuple[int, list[int], list[Any]]]] = {}
        for index in order[begin : begin + batch_size]:
            try:
                images = [load_image(reference) for reference in prompts[index].images]
            except BadImage as error:
                print(f"a question is left out: {error}")
                continue
            counts = [processor.image_tokens(image.height, image.width) for image in images]
            (row,) = processor.expand_images(prompts[index].ids, counts=counts)
            room = config.max_new_tokens if limit is None else min(config.max_new_tokens, limit - len(row))
            groups.setdefault(room, []).append((index, row, images))
        for room, group in groups.items():
            if room < 1:
                written: list[list[int]] = [[] for _ in group]
                full += len(group)
            else:
                written = _written(model, processor, [(row, images) for _, row, images in group], config, room)
            for (index, _, _), ids in zip(group, written):
                answers[index] = text_of(processor, ids)
    if full:
        print(f"{full:,} of {len(prompts):,} questions fill all {limit:,} positions: their answers are empty")
    return answers


def _written(model, processor, asked, config, max_new_tokens) -> list[list[int]]:
    """The ids that the model goes on with, for each prompt and its images."""
    length = max(len(row) for row, _ in asked)
    pad = processor.tokenizer.pad_token_id
    inputs = {
        "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row, _ in asked]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row, _ in asked]),
    }
    images = [image for _, of_row in asked for image in of_row]
    if images:
        inputs.update(processor.process_images(images).to(model.dtype))
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    own, model.generation_config = model.generation_config, config  # which `generate` would take what is not said from
    try:
        return model.generate(**inputs, max_new_tokens=max_new_tokens)[:, length:].tolist()
    finally:
        model.generation_config = own


def text_of(processor: VLMProcessor, ids: list[int]) -> str:
    """What ids say, without control tokens and the blanks around them."""
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


__all__ = ["Prompt", "answer", "greedy", "load", "text_of"]
