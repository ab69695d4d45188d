"""What a trained model answers: exact match on held-out questions, and a picture of some answers.

A question is cut out of an encoded conversation where its supervised answer begins, so the model is asked with the very
ids that it was trained to go on from, in both stages.
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import GenerationConfig, PreTrainedModel

from processing.batching.encoding import IGNORE
from processing.image_files_vlm import BadImage, load_image
from processing.processing_vlm import VLMProcessor


class Question(NamedTuple):
    """Ids up to an answer (one id an image), the images in them, the expected answer, and what it is counted under."""

    ids: list[int]
    images: list[Any]
    expected: str
    kind: str
    subset: str


def find_questions(items: Iterable[dict[str, Any]], processor: VLMProcessor, kinds=None) -> list[Question]:
    """
    Every supervised answer of encoded conversations as a question.

    Args:
        items: encoded conversations with their images.
        kinds: for each item the kind of its questions and the subset it is reported in.
    """
    questions = []
    for number, item in enumerate(items):
        kind, subset = kinds[number] if kinds else ("all", "all")
        ids, labels = item["input_ids"], item["labels"]
        starts = [i for i in range(1, len(ids)) if labels[i] != IGNORE and labels[i - 1] == IGNORE]
        for start in starts:
            end = next((i for i in range(start, len(ids)) if labels[i] == IGNORE), len(ids))
            images = item["images"][: ids[:start].count(processor.image_token_id)]
            questions.append(Question(ids[:start], images, _text(processor, ids[start:end]), kind, subset))
    return questions


def greedy(model: PreTrainedModel, processor: VLMProcessor, max_new_tokens: int) -> GenerationConfig:
    """Settings that take the likeliest token at each step: of the model's own only the token ids, and no penalty."""
    config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        max_new_tokens=max_new_tokens,
    )
    processor.update_generation_config(config)
    return config


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: VLMProcessor,
    questions: list[Question],
    batch_size: int,
    config: GenerationConfig,
) -> list[str | None]:
    """
    The model's answers, in the order of the questions; none where an image cannot be read, which is printed.

    An answer is as long as the positions of the language model allow, and empty where a question fills all of them.

    Args:
        batch_size: questions answered at a time; those of like length go together.
        config: the settings of generation, instead of the model's own.
    """
    model.eval()
    limit = model.model.max_positions
    answers: list[str | None] = [None] * len(questions)
    full = 0
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].ids))
    for begin in range(0, len(order), batch_size):
        groups: dict[int, list[tuple[int, list[int], list[Image.Image]]]] = {}
        for index in order[begin : begin + batch_size]:
            try:
                images = [load_image(reference) for reference in questions[index].images]
            except BadImage as error:
                print(f"a question is left out: {error}")
                continue
            counts = [processor.image_tokens(image.height, image.width) for image in images]
            (row,) = processor.expand_images(questions[index].ids, counts=counts)
            # Each has its own room, so those with less than the rest are answered apart.
            room = config.max_new_tokens if limit is None else min(config.max_new_tokens, limit - len(row))
            groups.setdefault(room, []).append((index, row, images))
        for room, group in groups.items():
            if room < 1:
                written = [[] for _ in group]
                full += len(group)
            else:
                written = _written(model, processor, [(row, images) for _, row, images in group], config, room)
            for (index, _, _), ids in zip(group, written):
                answers[index] = _text(processor, ids)
    if full:
        print(f"{full:,} of {len(questions):,} questions fill all {limit:,} positions: their answers are empty")
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


def _text(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def exact_match(questions: list[Question], answers: list[str]) -> dict[str, dict[str, float]]:
    """The share of answers that are exactly the expected ones: subset -> kind -> share, and `"mean"` over the kinds."""
    right: dict[str, dict[str, list[bool]]] = {}
    for question, answer in zip(questions, answers):
        right.setdefault(question.subset, {}).setdefault(question.kind, []).append(answer == question.expected)
    shares = {}
    for subset, kinds in right.items():
        shares[subset] = {kind: sum(hits) / len(hits) for kind, hits in sorted(kinds.items())}
        shares[subset]["mean"] = sum(shares[subset].values()) / len(kinds)
    return shares


def format_exact_match(shares: dict[str, dict[str, float]]) -> str:
    """The shares as a table: a line a kind, a column a subset."""
    kinds = [kind for kind in next(iter(shares.values())) if kind != "mean"] + ["mean"]
    width = max(len(kind) for kind in kinds)
    lines = [" ".join([" " * width, *(f"{subset:>14}" for subset in shares)])]
    for kind in kinds:
        lines.append(" ".join([f"{kind:<{width}}", *(f"{shares[subset].get(kind, 0):>13.1%} " for subset in shares)]))
    return "\n".join(lines)


def draw_samples(
    processor: VLMProcessor, questions: list[Question], answers: list[str], file: Path, columns: int = 2
) -> None:
    """A picture of images with question, expected and generated answer."""
    side, text_width, line = 168, 300, 17
    font = ImageFont.load_default(size=13)
    cells = []
    for question, answer in zip(questions, answers):
        asked = processor.tokenizer.decode(
            [id for id in question.ids if id != processor.image_token_id], skip_special_tokens=True
        ).strip()
        right = answer == question.expected
        texts = [(asked, "black"), (f"expected: {question.expected}", "dimgray")]
        texts.append((f"generated: {answer}", "darkgreen" if right else "firebrick"))
        lines = [
            (part, colour) for text, colour in texts for whole in text.split("\n") for part in textwrap.wrap(whole, 44)
        ]
        cell = Image.new("RGB", (side + text_width, max(side, line * len(lines)) + 16), "white")
        if question.images:
            image = load_image(question.images[-1])
            image = image.resize((side, max(1, round(image.height * side / image.width))), Image.Resampling.NEAREST)
            cell.paste(image.crop((0, 0, side, side)), (8, 8))
        draw = ImageDraw.Draw(cell)
        for number, (part, colour) in enumerate(lines):
            draw.text((side + 16, 8 + number * line), part, fill=colour, font=font)
        cells.append(cell)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", ((side + text_width) * columns, sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * (side + text_width), sum(heights[:number])))
    sheet.save(file)
