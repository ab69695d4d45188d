"""What a recipe will take, before any hardware is rented: memory by kind, operations, hours, the size of a cache.

    python -m training_vlm.estimate shapes
    python -m training_vlm.estimate recipe.yaml --memory 24GB --peak 312 --utilisation 0.4
    python -m training_vlm.estimate recipe.yaml --stage sft --tokens_per_sample 180/82 --samples 665000

What is special: no weight is read and no image is opened. Configs give the model's shape, and the run's own Trainer
takes two steps on it (`rehearsal.py`); of the data some rows are read for their lengths, or none where
--tokens_per_sample says them.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from inference_vlm.program import program
from processing.batching.account import number_of
from processing.data_error_vlm import DuetError

from .learning.originals import shown_size
from .learning.tuning import make_plan
from .run import one_line_errors
from .settings import Arguments, parse_arguments, split_config, stages_of
from .sketch import Sketch, StandIn
from .stages import PRETRAIN, SFT, STAGES, Stage
from .training_arguments import precision_of
from .weightless import KINDS


UNKNOWN = (
    "Not in it: the device's own context, workspaces of its kernels and gaps between tensors (1 to 2 GB on a GPU), "
    "buckets of gradients where processes share a step, and batches larger than those of the sample."
)


_PROVISO = {
    "auto": ", if the model proves itself (--padding_free off if it does not)",
    "on": ", if the model proves itself (--padding_free on is refused if it does not)",
    "off": "",
}


def largest_batch(sketch: Sketch, memory: int) -> int:
    """
    The most conversations of a batch, or positions where a batch is a number of these, whose step fits into a memory.

    Args:
        memory: bytes.

    Raises:
        DuetError: not even the smallest batch does.
    """
    least, most = sketch.least_batch(), sketch.most_batch()

    def peak(number: int) -> int:
        return sketch.with_batch(number).peak.total()

    low, high = 0, min(max(sketch.batch, least), most)
    while peak(high) <= memory and high < most:
        low, high = high, min(2 * high, most)
    if peak(high) <= memory:
        return high
    if low == 0:
        if peak(least) > memory:
            raise DuetError(
                f"a batch of {number_of(least, sketch.unit)} has {shown_size(peak(least))} alive, and --memory is "
                f"{shown_size(memory)}; let less learn, or add --gradient_checkpointing true or --frozen_dtype auto."
            )
        low = least
    near = False
    while high - low > (step := max(1, low // 50)):
        # It grows by nearly as much with each, so that a guess is right or close to it.
        share = (memory - peak(low)) / (peak(high) - peak(low))
        middle = low + step if near else min(max(low + int((high - low) * share), low + 1), high - 1)
        low, high = (middle, high) if peak(middle) <= memory else (low, middle)
        near = not near
    return low


def lines_of(sketch: Sketch, options: argparse.Namespace) -> Iterator[str]:
    """An estimate in lines for a terminal."""
    found = sketch.rehearsed
    args, account = sketch.arguments.training, found.account
    yield f"Stage {sketch.stage.number}, {sketch.stage.name}\n"
    yield f"{'part':<18}{'parameters':>16}{'learn':>16}   how"
    for part in make_plan(sketch.model, sketch.arguments.tuning, args).components():
        yield f"{part.name:<18}{part.parameters:>16,}{part.trained:>16,}   {part.policy}"
    learned = [record for record in account.records if record.dropped is None]
    supervised = sum(record.supervised for record in learned)
    yield f"\n{sketch.described}"
    yield f"Batches{_PROVISO[sketch.arguments.efficiency.padding_free]}: {found.savings}."
    yield (
        f"The largest of {number_of(found.batches, 'batch', 'batches')}: {number_of(len(learned), 'conversation')}, "
        f"{number_of(found.views, 'view of an image', 'views of images')}, {number_of(account.run, 'position')} run "
        f"({account.padding / max(1, account.run):.0%} padding), {supervised:,} supervised; "
        f"{precision_of(args)}, {OptimizerNames(args.optim).value}"
        + (", checkpointed" if args.gradient_checkpointing else "")
    )
    yield f"\n{'memory':<26}{'at the peak':>14}{'between steps':>16}"
    for kind in KINDS:
        yield f"{kind:<26}{shown_size(found.peak[kind]):>14}{shown_size(found.held[kind]):>16}"
    yield f"{'together':<26}{shown_size(found.peak.total()):>14}{shown_size(found.held.total()):>16}"
    yield UNKNOWN
    yield from _work_lines(sketch, options)
    if options.memory is not None:
        number = largest_batch(sketch, options.memory)
        more = "" if number < sketch.most_batch() else ", which is all that there is"
        yield f"\nThe largest batch in {shown_size(options.memory)}: --{sketch.option} {number}{more}"


def _work_lines(sketch: Sketch, options: argparse.Namespace) -> Iterator[str]:
    size = sketch.cache_bytes
    if size is not None:
        yield f"\nThe features of all images, cached: up to {shown_size(size)}"
    flops, conversations = sketch.flops, sketch.conversations
    if flops is None or conversations is None:
        yield "\nHow far the run goes is not known: name --samples, or --max_steps."
        return
    yield (
        f"\n{flops / 1e12:,.4g} TFLOP for {number_of(conversations, 'conversation')}, "
        f"{flops / max(1, conversations) / 1e9:,.4g} GFLOP each"
    )
    if options.peak is not None:
        hours = flops / (options.peak * 1e12 * options.utilisation * options.devices) / 3600
        yield (
            f"{hours:,.3g} hours at {options.utilisation:.0%} of {options.peak:g} TFLOP/s"
            + (f" on each of {options.devices} devices" if options.devices > 1 else "")
        )


def bytes_of(text: str) -> int:
    """`24GB`, `80GiB` or `512MB` in bytes."""
    match = re.fullmatch(r"([\d.]+)\s*([kMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or not re.fullmatch(r"\d+(\.\d+)?", match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 24GB")
    power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def tokens_of(text: str) -> StandIn:
    """`180`, or `180/82` where fewer are supervised."""
    match = re.fullmatch(r"(\d+)(?:/(\d+))?", text)
    if match is None or not 0 < int(match[2] or match[1]) <= int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected tokens of text, and how many are supervised, as 180/82")
    return StandIn(int(match[1]), int(match[2] or match[1]))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise DuetError(f"{message}; --help lists all options.")


def _parser() -> _Parser:
    parser = _Parser(
        prog=program("training_vlm.estimate"),
        usage="%(prog)s [RECIPE] [--stage STAGE] [--memory SIZE] [--tokens_per_sample N[/M]] [--samples N] [--peak "
        "TFLOPS] [--utilisation SHARE] [--devices N] [any option of the training scripts]",
        description=(__doc__ or "").splitlines()[0],
        epilog="RECIPE, which comes first, is the same as --config.",
        allow_abbrev=False,
    )
    parser.add_argument("--stage", choices=STAGES, help="the stage; those that the recipe has a section for, else sft")
    parser.add_argument("--memory", type=bytes_of, metavar="SIZE", help="find the largest batch in it, as 24GB")
    parser.add_argument(
        "--tokens_per_sample", type=tokens_of, metavar="N[/M]",
        help="tokens of text beside one image, and how many of them are supervised, in place of the data",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, help="conversations of an epoch, where the data do not say it")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="of a device, for the hours: 10^12 FLOP a second")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached; 0.4")
    parser.add_argument("--devices", type=int, default=1, help="devices that share the work")
    return parser


def settled(stage: Stage, argv: list[str]) -> Arguments:
    """The settings of a stage, whatever machine this is: 16 bits where an accelerator would have them."""
    asked: dict[str, Any] = {}

    def adjust(settings: dict[str, Any]) -> None:
        asked.update(settings)
        _on_any_machine(settings)

    arguments = parse_arguments(stage, argv, adjust)
    if asked["fp16"] and not asked["bf16"]:
        arguments.training.fp16, arguments.training.bf16 = True, False
    return arguments


def _on_any_machine(settings: dict[str, Any]) -> None:
    if settings["fp16"] and not settings["bf16"]:  # which this machine would refuse
        settings.update(fp16=False, bf16=True)
    elif settings["bf16"] is None and not settings["use_cpu"]:
        settings["bf16"] = True
    if settings["dataloader_num_workers"] is None:  # as many as this machine has a use for, which may be none
        settings.update(dataloader_persistent_workers=False, dataloader_prefetch_factor=None)
    settings.update(use_cpu=True, tf32=False, report_to="none")


def _maker(stage: Stage, arguments: Arguments, config: Path | None) -> Arguments | None:
    """The settings of stage 1, where its model is not there yet and the same recipe makes it."""
    name = arguments.model.model
    if stage is not SFT or name is None or Path(name).exists() or config is None or PRETRAIN not in stages_of(config):
        return None
    made = settled(PRETRAIN, ["--config", str(config)])
    return made if made.training.output_dir == name else None


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """The command line; without arguments its usage."""
    parser = _parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        parser.print_help()
        return
    if not argv[0].startswith("-"):
        argv.insert(0, "--config")
    options, others = parser.parse_known_args(argv)
    if not others:
        raise DuetError("no recipe is named, and no model; add one first, as in `estimate shapes`, or --model FOLDER.")
    for name in ("memory", "samples", "peak", "utilisation", "devices"):
        if (value := getattr(options, name)) is not None and not 0 < value < math.inf:
            raise DuetError(f"--{name} {value}: expected a finite number above 0.")
    if options.utilisation > 1:
        raise DuetError(f"--utilisation {options.utilisation:g}: expected a share of the peak, up to 1.")
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config, _ = split_config(others)
    stages = [STAGES[options.stage]] if options.stage else (config is not None and stages_of(config)) or [SFT]
    for number, stage in enumerate(stages):
        arguments = settled(stage, others)
        maker = _maker(stage, arguments, config)
        sketch = Sketch(stage, arguments, maker, options.tokens_per_sample, options.samples, options.devices)
        print("\n" * (number > 0) + "\n".join(lines_of(sketch, options)), flush=True)


if __name__ == "__main__":
    main()
