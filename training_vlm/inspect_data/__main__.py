"""See the data as the model will: every token coloured by what it is, and below the account that training prints.

    python -m training_vlm.inspect_data dialogues.jsonl --image_dir images \\
        --vision_model google/siglip-base-patch16-224 --text_model HuggingFaceTB/SmolLM2-135M-Instruct --html page.html
    python -m training_vlm.inspect_data captions.jsonl --stage pretrain --model outputs/aligned
    python -m training_vlm.inspect_data --config shapes --stage pretrain

What is special: the samples go through the data set, the encoder and the collator that train, as one batch, so that
what is shown is what is learned; and only processors and configs are read, never a model's weights.
"""

import argparse
import base64
import html
import io
import itertools
import os
import re
import string
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ViTConfig
from transformers.utils import logging

from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from modeling_vlm.compose_vlm import composed_config, shape_of
from modeling_vlm.own_projector_vlm import trusting
from processing import VLMDataCollator, VLMProcessor
from processing.batching.account import Record
from processing.batching.encoding import IGNORE, Encoder
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import load_image

from ..arguments import DataArguments, ModelArguments, VLMTrainingArguments, backbone_of
from ..data import Data, encode_data, joined, load_data
from ..load import check_composed, check_fit, choose_max_length, tokenizer_from_scratch
from ..run import one_line_errors
from ..settings import parse_arguments
from ..stages import STAGES, Stage
from ..survey import report_data, some_items, survey_data


# Nothing is trained, so a recipe for a machine with an accelerator can be looked at on any.
NO_TRAINING = ["--use_cpu", "--bf16", "False", "--fp16", "False", "--tf32", "False", "--report_to", "none"]
PICTURE_SIDE = 480
LONGEST_PIECE = 16


class Kind(NamedTuple):
    """What a token is to the model, and how it is shown: plain marks, two shades for a terminal, one for the page."""

    meaning: str
    marks: tuple[str, str]
    shades: tuple[int, int]
    colour: str


KINDS = {
    "image": Kind("the features of an image", ("{", "}"), (117, 117), "#a9d3ff"),
    "prompt": Kind("read, not learned", ("", ""), (254, 251), "#e6e8ec"),
    "supervised": Kind("learned", ("[[", "]]"), (157, 120), "#a5eab4"),
    "padding": Kind("fills up the batch", ("{", "}"), (223, 223), "#ffdfa0"),
}


@dataclass
class Piece:
    """Positions shown as one: a token, tokens whose bytes only decode together, an image, the padding."""

    kind: str
    text: str
    start: int
    ids: list[int]
    labels: list[int]
    weight: float

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.start + len(self.ids)

    @property
    def title(self) -> str:
        """Positions, ids and labels in a line; what is the same for all positions is said once."""
        last = f" to {self.end - 1}" if len(self.ids) > 1 else ""
        same = len(set(self.ids)) == 1 and len(set(self.labels)) == 1
        ids, labels = (values[:1] if same else values for values in (self.ids, self.labels))
        weight = f", weight {self.weight:g}" if self.kind == "supervised" and self.weight != 1 else ""
        return f"position {self.start}{last}, id {_listed(ids)}, label {_listed(labels)}{weight}"


def _listed(numbers):
    return " ".join(map(str, numbers))


class Sample(NamedTuple):
    """A sample of the batch: what became of it, images and tiles by name, and its pieces, none where it was dropped."""

    record: Record
    images: list[tuple[str, Image.Image]]
    pieces: list[Piece]

    @property
    def name(self) -> str:
        """The source and the row."""
        return f"{self.record.source}, row {self.record.row}"

    @property
    def facts(self) -> str:
        """Lengths and numbers in a line, or why the sample was dropped."""
        record = self.record
        if record.dropped is not None:
            return f"dropped: {record.dropped}" + (f" ({record.detail})" if record.detail else "")
        padding = sum(len(piece.ids) for piece in self.pieces if piece.kind == "padding")
        facts = [f"{record.tokens:,} positions"]
        if record.images:
            images = "1 image" if record.images == 1 else f"{record.images} images"
            facts.append(f"{record.image_tokens:,} for {images}")
        facts.append(f"{record.supervised:,} supervised")
        if padding:
            facts.append(f"then {padding:,} of padding")
        if record.cut is not None:
            facts.append(f"cut: {record.cut}")
        return ", ".join(facts)


# -- the processor, without a model ---------------------------------------------------------------------------------


def load_processor(
    stage: Stage, model_args: ModelArguments, data_args: DataArguments, data: Data
) -> tuple[VLMProcessor, int]:
    """
    The processor of the model that would train, and how many positions a sequence of it may have.

    The model itself is laid out without memory, on the meta device, which tells how many tokens an image takes. Without
    a vision encoder an image is one token.

    Raises:
        ValueError, OSError: no model is named, or what is named cannot be loaded.
    """
    if model_args.model is not None:
        check_composed(model_args)
        name, revision = model_args.model, model_args.model_revision
        with trusting(Path(name).is_dir() or model_args.trust_remote_code, revision=revision):
            model = shape_of(VLMForConditionalGeneration, VLMConfig.from_pretrained(name, revision=revision))
        processor = VLMProcessor.from_pretrained(name, revision=revision)
        if model_args.chat_template is not None:
            processor.set_chat_template(model_args.chat_template)
        check_fit(model, processor)
    elif model_args.text_model is not None:
        model, processor = _compose(stage, model_args, data_args, data)
    else:
        raise DuetError(
            "no model is named; add --model FOLDER (a composed model), or --text_model NAME, and --vision_model NAME "
            "where images are to be shown as the model sees them."
        )
    return processor, choose_max_length(model, data_args.max_length)


def _compose(stage, model_args, data_args, data):
    text = backbone_of("text_model", model_args.text_model)
    if model_args.vision_model is None:
        vision, settings = ViTConfig(), {"num_prefix_tokens": 0, "image_seq_length": 1, "vision_modules_left_out": []}
    else:
        vision, settings = model_args.vision_models(), model_args.composition()
    tokenizer = model_args.tokenizer
    if tokenizer is None and not isinstance(text, str):
        tokenizer = tokenizer_from_scratch(stage, data_args, data, text)
    shared = {
        "tokenizer": tokenizer,
        "image_token": model_args.image_token,
        "vision_kwargs": model_args.backbone_kwargs("vision"),
        "text_kwargs": model_args.backbone_kwargs("text"),
    }
    model = shape_of(VLMForConditionalGeneration, composed_config(vision, text, **shared, **settings))
    processor = VLMProcessor.from_backbones(
        vision,
        text,
        model.config,
        chat_template=model_args.chat_template,
        image_mode=model_args.image_mode,
        **shared,
    )
    return model, processor


# -- the batch, taken apart -----------------------------------------------------------------------------------------


def read_samples(
    encoder: Encoder,
    items: list[dict[str, Any]],
    sees_images: bool = True,
    pad_to_multiple_of: int | None = None,
) -> list[Sample]:
    """
    Items of a data set as one batch of the collator that trains, taken apart again.

    Args:
        sees_images: show images as the vision encoder gets them, else as they are stored.
    """
    processor = encoder.processor
    collator = VLMDataCollator(encoder, pad_to_multiple_of=pad_to_multiple_of, account=True)
    batch = collator(items)
    encodings = zip(*(batch[name].tolist() for name in ("input_ids", "labels", "attention_mask")))
    weights = itertools.repeat(None)
    if "loss_weights" in batch:  # they lie where a token is predicted, and are shown at the token
        weights = iter(batch["loss_weights"].roll(1, dims=1).tolist())
    pictures = iter(batch.get("pixel_values", ()))
    grids = iter(batch["image_grids"].tolist() if "image_grids" in batch else itertools.repeat((1, 1)))
    samples = []
    for item, record in zip(items, batch["account"].records):
        if record.dropped is not None:
            samples.append(Sample(record, [], []))
            continue
        shapes = list(itertools.islice(grids, record.images))
        if sees_images:
            names = [name for place, shape in enumerate(shapes, start=1) for name in _view_names(place, *shape)]
            images = [(name, _as_image(next(pictures), processor.image_processor)) for name in names]
        else:
            opened = enumerate(map(load_image, item.get("images") or ()), start=1)
            images = [(f"image {place}", image) for place, image in opened]
        counts = [processor.tile_tokens(*shape) for shape in shapes]
        samples.append(Sample(record, images, list(_pieces(processor, counts, *next(encodings), next(weights)))))
    return samples


def _view_names(place: int, rows: int, columns: int) -> list[str]:
    """What the views of an image are called, in their order."""
    tiles = [f"row {row}, column {column}" for row in range(1, rows + 1) for column in range(1, columns + 1)]
    return [f"image {place}", *(f"image {place}, tile in {tile}" for tile in tiles if len(tiles) > 1)]


def _as_image(pixels_CHW: torch.Tensor, image_processor) -> Image.Image:
    """What the vision encoder is given, its normalisation undone."""
    values = pixels_CHW.float()
    if getattr(image_processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(image_processor, f"image_{name}")).view(-1, 1, 1) for name in ("mean", "std"))
        values = values * std + mean
    if getattr(image_processor, "do_rescale", False):
        values = values / image_processor.rescale_factor
    pixels_HWC = values.round().clamp(0, 255).byte().permute(1, 2, 0)
    return Image.fromarray(pixels_HWC.numpy())


def _pieces(processor, counts, ids, labels, mask, weights) -> Iterator[Piece]:
    """
    A row of a batch in pieces that can be read.

    Args:
        counts: positions of each image of it.
    """
    counts = iter(counts)
    kinds = [
        "padding" if not there else "image" if id == processor.image_token_id
        else "prompt" if label == IGNORE else "supervised"
        for id, label, there in zip(ids, labels, mask)
    ]  # fmt: skip
    before = start = 0
    of_image = next(counts, 0)
    for end in range(1, len(ids) + 1):
        kind = kinds[start]
        if kind == "image":
            text, whole = processor.image_token, end - start == of_image
            of_image = next(counts, 0) if whole else of_image
        elif kind == "padding":
            text, whole = "padding", end == len(ids)
        else:
            text = _text_of(processor.tokenizer, ids[before:start], ids[start:end])
            # A character whose bytes are not all there yet is decoded as this one.
            whole = not text.endswith("\ufffd") or end == len(ids) or kinds[end] != kind or end - start == LONGEST_PIECE
        if whole:
            yield Piece(kind, text, start, ids[start:end], labels[start:end], weights[start] if weights else 1.0)
            before, start = start, end


def _text_of(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """The text of ids behind others: decoded alone, many tokenizers leave out the blank at their beginning."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    left, both = tokenizer.decode(before, **options), tokenizer.decode(before + ids, **options)
    return both[len(left) :] if both.startswith(left) else tokenizer.decode(ids, **options)


def _visible(text: str) -> str:
    """Blanks, tabs and ends of lines as characters; whatever else would act on a terminal, as its escape."""
    shown = {" ": "·", "\t": "→", "\n": "↵\n"}
    return "".join(shown.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def _counted(piece: Piece) -> str:
    many = len(piece.ids) > 1 and piece.kind in ("image", "padding")
    return _visible(piece.text) + (f" x {len(piece.ids)}" if many else "")


def _runs(pieces: list[Piece]) -> Iterable[tuple[str, str, list[Piece]]]:
    """Neighbours of one kind and weight; the weight as a mark, empty where it is 1. Each image is a run of its own."""
    for (kind, weight, _), run in itertools.groupby(
        pieces, lambda p: (p.kind, p.weight, p.start if p.kind == "image" else None)
    ):
        yield kind, f"×{weight:g}" if kind == "supervised" and weight != 1 else "", list(run)


# -- in the terminal ------------------------------------------------------------------------------------------------


def write_terminal(samples: list[Sample], coloured: bool) -> str:
    """The samples in lines for a terminal, with its colours or with plain marks."""
    legend = (f"{_marked(kind, [kind], coloured)} {look.meaning}" for kind, look in KINDS.items())
    lines = ["   ".join(legend), ""]
    for number, sample in enumerate(samples, start=1):
        lines += [f"--- {number} of {len(samples)}: {sample.name}", sample.facts]
        if sample.pieces:
            runs = _runs(sample.pieces)
            lines.append("".join(w + _marked(kind, map(_counted, run), coloured) for kind, w, run in runs))
        lines.append("")
    return "\n".join(lines)


def _marked(kind, texts, coloured):
    look = KINDS[kind]
    if not coloured:
        return "".join(texts).join(look.marks)
    shown = ""
    for text, shade in zip(texts, itertools.cycle(look.shades)):
        colour = f"\x1b[38;5;16;48;5;{shade}m"
        # A colour that went on over the end of a line would fill the line.
        shown += colour + text.replace("\n", f"\x1b[0m\n{colour}") + "\x1b[0m"
    return shown


# -- as a page ------------------------------------------------------------------------------------------------------

_PAGE = string.Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 1120px; padding: 28px 32px 48px; background: #f7f8fa; color: #1c2430;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 16px; overflow-wrap: anywhere; }
p { margin: 4px 0 0; color: #5b6675; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 8px 24px; margin: 18px 0; padding: 12px 16px; background: #fff;
  border: 1px solid #dfe3e9; border-radius: 10px; position: sticky; top: 0; z-index: 1; }
.legend b { padding: 2px 10px; border-radius: 4px; color: #1c2430; font-weight: 600; }
section { margin: 16px 0; padding: 16px 20px 20px; background: #fff; border: 1px solid #dfe3e9; border-radius: 10px; }
section.dropped { border-left: 5px solid #d64545; }
section.dropped p { color: #b02a2a; }
.sample { display: flex; gap: 20px; align-items: flex-start; margin-top: 14px; }
.images { flex: none; display: flex; flex-direction: column; gap: 10px; width: 240px; }
.images img { display: block; max-width: 240px; max-height: 240px; min-height: 120px; object-fit: contain;
  border: 1px solid #dfe3e9; border-radius: 6px; }
.images small { color: #5b6675; }
.tokens { flex: 1; min-width: 0; overflow-wrap: anywhere; font: 14px/2 ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
.tokens span { padding: 3px 0; box-shadow: inset -1px 0 #ffffffd0; border-radius: 2px; }
.tokens span:hover { outline: 2px solid #1c2430; }
.tokens i { font-style: normal; opacity: .45; }
.tokens .image, .tokens .padding { padding: 3px 8px; border-radius: 4px; margin: 0 2px; white-space: nowrap; }
sup { margin: 0 2px; padding: 0 4px; border-radius: 4px; background: #1c7c3a; color: #fff; font-size: 11px; }
$colours
pre { margin: 10px 0 0; overflow-x: auto; font: 13px/1.6 ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
</style>
</head>
<body>
<h1>$title</h1>
$lines
<div class="legend">$legend</div>
$samples
<section><h2>The data</h2><pre>$account</pre></section>
</body>
</html>
""")


def write_page(title: str, lines: list[str], samples: list[Sample], account: str) -> str:
    """The samples and the account as one HTML page that needs nothing else."""
    legend = (f'<span><b class="{kind}">{kind}</b> {html.escape(look.meaning)}</span>' for kind, look in KINDS.items())
    sections = (_section(sample, f"{number} of {len(samples)}") for number, sample in enumerate(samples, start=1))
    return _PAGE.substitute(
        title=html.escape(title),
        lines="\n".join(f"<p>{html.escape(line)}</p>" for line in lines),
        colours="\n".join(f".{kind} {{ background: {look.colour}; }}" for kind, look in KINDS.items()),
        legend="\n".join(legend),
        samples="\n".join(sections),
        account=html.escape(account),
    )


def _section(sample, number):
    head = f"<h2>{number}: {html.escape(sample.name)}</h2><p>{html.escape(sample.facts)}</p>"
    if not sample.pieces:
        return f'<section class="dropped">{head}</section>'
    figures = "".join(
        f'<div><img src="{_data_uri(image)}" alt="{name}"><small>{name}, {image.width} x {image.height}</small></div>'
        for name, image in sample.images
    )
    images = f'<div class="images">{figures}</div>' if figures else ""
    tokens = "".join(_spans(sample.pieces))
    return f'<section>{head}<div class="sample">{images}<div class="tokens">{tokens}</div></div></section>'


def _spans(pieces) -> Iterator[str]:
    for kind, weight, run in _runs(pieces):
        if weight:
            yield f"<sup>{weight}</sup>"
        for piece in run:
            text = re.sub("([·→↵])", r"<i>\1</i>", html.escape(_counted(piece))).replace("\n", "<br>")
            # A line may be broken behind every token.
            yield f'<span class="{kind}" title="{html.escape(piece.title)}">{text}</span><wbr>'


def _data_uri(image):
    image = image.copy()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


# -- the command line -----------------------------------------------------------------------------------------------


def inspect(
    stage: Stage,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: VLMTrainingArguments,
    number: int,
    page: Path | None,
) -> None:
    """
    Print samples and account, and write them as a page where one is named.

    Raises:
        ValueError, OSError: what training would end with before its first step; the samples are shown all the same
            where there are any.
    """
    training_args.max_steps = max(1, training_args.max_steps)  # how far a stream is read, which matters to training
    data = load_data(stage, data_args, training_args)
    processor, max_length = load_processor(stage, model_args, data_args, data)
    encoder = stage.encoder(processor, data_args, max_length)
    sees_images = model_args.model is not None or model_args.vision_model is not None
    seed = training_args.data_seed if training_args.data_seed is not None else training_args.seed
    items = list(some_items(joined(data.train, data.weights, seed), number))  # not encoded, so that those dropped show
    samples = read_samples(encoder, items, sees_images, data_args.pad_to_multiple_of)

    title = ", ".join(part.reading.source for part in data.train)
    lines = [f"Stage {stage.number}, {stage.name}; sequences of at most {max_length:,} positions."]
    if sees_images:
        tokens, tiles = f"{processor.tile_tokens(1, 1):,} of them", processor.max_tiles
        if tiles > 1:
            most = processor.tile_tokens(tiles, 1)
            tokens += f", or up to {most:,} where it is cut into up to {tiles} tiles as well,"
        lines.append(f"An image takes {tokens} and is shown as the model gets it.")
    else:
        lines.append("No vision model is named, so an image is shown as one token, and as it is stored.")
    print("\n".join([title, *lines, "", write_terminal(samples, _shows_colours())]), flush=True)

    failure = None
    try:
        sets = encode_data(data, encoder, data_args, training_args)
        account = report_data(survey_data(stage, *sets, encoder, data_args, training_args))
    except (ValueError, OSError) as error:
        account, failure = f"training would end here: {' '.join(str(error).split())}", error
    if page is not None:
        page.write_text(write_page(title, lines, samples, account), encoding="utf-8")
    if failure is not None:
        raise failure
    print(account)
    if page is not None:
        print(f"\nThe page is {page}.")


def _shows_colours():
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """The command line; without arguments its usage."""
    parser = argparse.ArgumentParser(
        prog="python -m training_vlm.inspect_data",
        usage="%(prog)s [DATA] [--n N] [--html FILE] [--stage STAGE] (--model FOLDER | --text_model NAME "
        "[--vision_model NAME]) [--config FILE] [any option of the training scripts]",
        description=__doc__.splitlines()[0],
        epilog="DATA, which comes first, is the same as --dataset. With --text_model alone an image is one token.",
        allow_abbrev=False,
    )
    parser.add_argument("--n", type=int, default=5, help="samples to show, from all over the training data")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write them as one HTML page as well")
    parser.add_argument("--stage", choices=STAGES, default="sft", help="the stage whose data it is; sft if not given")
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        parser.print_help()
        return
    if not argv[0].startswith("-"):
        argv.insert(0, "--dataset")
    options, others = parser.parse_known_args(argv)
    if options.n < 1:
        raise DuetError(f"--n {options.n}: expected 1 or more samples.")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a text may hold what the terminal cannot show
    logging.disable_progress_bar()
    stage = STAGES[options.stage]
    model_args, data_args, _, training_args = parse_arguments(stage, [*others, *NO_TRAINING])
    inspect(stage, model_args, data_args, training_args, options.n, options.html)


if __name__ == "__main__":
    main()
