"""See the data as the model will: every token coloured by what it is, and below the account that training prints.

    python -m training_vlm.inspect_data dialogues.jsonl --image_dir images \\
        --vision_model google/siglip-base-patch16-224 --text_model HuggingFaceTB/SmolLM2-135M-Instruct --html page.html
    python -m training_vlm.inspect_data captions.jsonl --stage pretrain --model outputs/aligned
    python -m training_vlm.inspect_data --config shapes --stage pretrain

What is special: the samples go through the data set, the encoder and the collator that train, as one batch, so that
what is shown is what is learned; and only processors and configs are read, never a model's weights.
"""

import argparse
import os
import sys
from pathlib import Path

from transformers.utils import logging

from inference_vlm.program import program
from processing.data_error_vlm import DuetError

from ..arguments import DataArguments, ModelArguments
from ..data import encode_data, encode_test, joined, load_data
from ..learning.sampling import order_seed
from ..run import one_line_errors
from ..settings import parse_arguments
from ..stages import STAGES, Stage
from ..survey import report_data, some_items, survey_data
from ..training_arguments import VLMTrainingArguments
from .page import write_page
from .processor import load_processor
from .samples import read_samples
from .terminal import write_terminal


# Nothing is trained, so a recipe for a machine with an accelerator can be looked at on any.
NO_TRAINING = ["--use_cpu", "--bf16", "False", "--fp16", "False", "--tf32", "False", "--report_to", "none"]


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
        DuetError: what training would end with before its first step; the samples are shown all the same where there
            are any.
    """
    training_args.max_steps = max(1, training_args.max_steps)  # how far a stream is read, which matters to training
    data = load_data(stage, data_args, training_args)
    processor, max_length = load_processor(stage, model_args, data_args, data)
    encoder = stage.encoder(processor, data_args, max_length)
    sees_images = model_args.model is not None or model_args.vision_model is not None
    rows = joined(data.train, data.weights, order_seed(training_args))  # not encoded, so that those dropped show
    samples = read_samples(encoder, list(some_items(rows, number)), sees_images, data_args.pad_to_multiple_of)

    lines = [f"Stage {stage.number}, {stage.name}; sequences of at most {max_length:,} positions."]
    if sees_images:
        tokens, tiles = f"{processor.tile_tokens(1, 1):,} of them", processor.max_tiles
        if tiles > 1:
            most = processor.tile_tokens(tiles, 1)
            tokens += f", or up to {most:,} where it is cut into up to {tiles} tiles as well,"
        lines.append(f"An image takes {tokens} and is shown as the model gets it.")
    else:
        lines.append("No vision model is named, so an image is shown as one token, and as it is stored.")
    print("\n".join([data.name, *lines, "", write_terminal(samples, _shows_colours())]), flush=True)

    failure = None
    try:
        train, evaluation = encode_data(data, encoder, data_args, training_args)
        test = encode_test(data, encoder, training_args)
        account = report_data(survey_data(stage, train, evaluation, test, encoder, data_args, training_args))
    except (ValueError, OSError) as error:
        account, failure = f"training would end here: {' '.join(str(error).split())}", error
    if page is not None:
        page.write_text(write_page(data.name, lines, samples, account), encoding="utf-8")
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
        prog=program("training_vlm.inspect_data"),
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
    logging.disable_progress_bar()
    stage = STAGES[options.stage]
    arguments = parse_arguments(stage, [*others, *NO_TRAINING])
    inspect(stage, arguments.model, arguments.data, arguments.training, options.n, options.html)


if __name__ == "__main__":
    main()
