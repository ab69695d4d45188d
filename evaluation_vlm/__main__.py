"""Judge finished models on a data set: what they answer, how good that is, how sure, and whether two differ.

    python -m evaluation_vlm outputs/sft --dataset questions.jsonl --image_dir images
    python -m evaluation_vlm outputs/sft outputs/lora --dataset lmms-lab/VQAv2 --split validation --max_samples 5000
    python -m evaluation_vlm outputs/aligned --stage pretrain --dataset coco --metrics cider,bleu4
    accelerate launch -m evaluation_vlm outputs/sft --dataset questions.jsonl

The folder of `--output_dir` then holds results.json, and of each model every answer (predictions.jsonl) and a page of
some (samples.html). See docs/evaluation.md.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils import logging

from inference_vlm.answering import greedy, load
from inference_vlm.loading import add_loading_arguments, loading_of, place
from inference_vlm.program import ended_by, program, show_any_text
from processing.batching.dataset import ConversationDataset
from processing.batching.encoding import Encoder, encode_caption, encode_dialogue
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import ImagePolicy
from processing.reading.items import SPLIT_TURNS, Reading
from processing.reading.layouts import CHOICE_ANSWERS
from processing.reading.rows import limited
from processing.reading.settings import SourceSettings, parse_columns
from processing.reading.sources import open_source

from .asking import answer_questions, questions_of
from .compare import CONFIDENCE, RESAMPLES, SEED, Draws, difference_of, interval_of, row_of, sentence
from .files import make_folder, replace_text
from .judgement import Judgement, judge, judge_together
from .metrics import METRICS, choose_metrics, named_metrics
from .showing import Wording
from .writing import last_part, write_gallery, write_predictions


RESULTS = "results.json"
FOLDERS = ("first", "second")
"""Where the answers of two models are."""
ENCODE = {"pretrain": encode_caption, "sft": encode_dialogue}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("evaluation_vlm"), description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="one or two: folder or Hub name; its code is run")
    parser.add_argument("--dataset", required=True, help="Hub name, folder, file, COCO, or shapes; as in training")
    parser.add_argument("--dataset_name", help="configuration of a data set that has several")
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a Hub data set")
    parser.add_argument("--split", help="the split that is asked; `train`, or the only one, if not given")
    parser.add_argument("--image_dir", help="folder that image paths are relative to")
    parser.add_argument("--columns", help="what a column is: image=photo,caption=description")
    parser.add_argument("--max_samples", type=int, help="that many rows, chosen with --sample_seed")
    parser.add_argument("--sample_seed", type=int, default=42)
    parser.add_argument("--stage", choices=list(ENCODE), default="sft", help="pretrain asks with the image alone")
    parser.add_argument("--prompt", default="Describe the image.", help="the question that a caption answers")
    parser.add_argument("--choice_answer", choices=CHOICE_ANSWERS, default="letter", help="how a choice is answered")
    parser.add_argument("--split_turns", choices=SPLIT_TURNS, default="none", help="turns of a dialogue by themselves")
    parser.add_argument("--max_length", type=int, help="positions of a question and its answer")
    parser.add_argument("--allow_urls", action="store_true", help="fetch images that are URLs")
    parser.add_argument("--allow_local_urls", action="store_true", help="from networks of this machine, too")
    parser.add_argument("--allow_links", action="store_true", help="follow links that lead out of the images' folder")
    parser.add_argument(
        "--metrics",
        help=f"{', '.join(METRICS)}, or FILE.py:FUNCTION, with commas; those that follow from the data if not given",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="questions answered at a time")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"), help="where results are written")
    add_loading_arguments(parser, dtype="as saved")
    return parser


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """
    Ask the models, judge them, and write what came of it.

    Returns:
        what `results.json` holds; in the main process, which alone writes.

    Raises:
        DuetError: a model, the data or a metric is not there, or not as expected.
    """
    if args.metrics is not None:
        named_metrics(args.metrics)  # before a model is loaded
    if PartialState().is_main_process:
        make_folder(args.output_dir)
    source = SourceSettings(args.dataset, columns=parse_columns(args.columns), max_samples=args.max_samples)
    found = open_source(
        source.path,
        name=args.dataset_name,
        split=args.split,
        revision=args.dataset_revision,
        image_dir=args.image_dir,
    )
    reading = Reading(
        source=found.name,
        prompt=args.prompt if args.stage == "sft" else "",
        choice_answer=args.choice_answer,
        split_turns=args.split_turns,
        columns=source.columns,
        images=ImagePolicy(
            None if found.image_dir is None else str(found.image_dir),
            allow_urls=args.allow_urls,
            allow_links=args.allow_links,
            allow_local_urls=args.allow_local_urls,
            caches=found.caches,
        ),
    )
    rows = limited(found.rows, source.max_samples, args.sample_seed)
    judged, models = [], []
    for number, name in enumerate(args.models):
        started = time.perf_counter()
        judgement, wording = _judged(name, ConversationDataset(rows, reading), args)
        judged.append(judgement)
        if not PartialState().is_main_process:
            continue
        folder = args.output_dir / FOLDERS[number] if len(args.models) > 1 else args.output_dir
        write_predictions(judgement, wording, folder)
        write_gallery(judgement, wording, folder, f"What {last_part(name)} answers", last_part(found.name))
        seconds, draws = round(time.perf_counter() - started, 1), Draws(judgement.predictions)
        about = {"model": name, "questions": len(judgement.predictions), "groups": len(draws.groups)}
        about["seconds"] = seconds
        models.append({**about, "metrics": _values(judgement, draws), "by_name": judgement.by_name()})
        print(f"\n{name}: {len(judgement.predictions):,} questions of {found.name}, {seconds:,} s")
        print(_report(judgement, models[-1]["metrics"]), flush=True)
    if not PartialState().is_main_process:
        return {}
    results: dict[str, Any] = {
        "dataset": found.name,
        "asked": {name: value for name, value in vars(args).items() if name not in ("models", "dataset", "output_dir")},
        "interval": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED, "drawn": "images and rows"},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "models": models,
    }
    if len(judged) > 1:
        results["difference"] = _compared(judged, args.models)
        print("\n" + "\n".join(one["sentence"] for one in results["difference"].values()))
    replace_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", args.output_dir / RESULTS)
    print(f"\n{args.output_dir / RESULTS} has all of it.")
    return results


def _placed(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """How a model is loaded: by each process to its device, in the numbers that were saved, unless it is asked for."""
    given = loading_of(args)
    if given["device"] is None and given["device_map"] is None:
        given["device"] = PartialState().device
    options = place(name, **given)
    if args.dtype is None:  # what was trained is judged, and not a rounding of it
        options.pop("dtype", None)
    return options


def _judged(name: str, dataset: ConversationDataset, args: argparse.Namespace) -> tuple[Judgement, Wording]:
    """What a model answers, judged."""
    model: Any
    model, processor = load(name, **_placed(name, args))
    limit = args.max_length or model.model.max_positions
    questions = questions_of(dataset, Encoder(processor, ENCODE[args.stage], limit))
    if not questions:
        raise DuetError(
            f"{args.dataset}: no question was found in {len(dataset):,} rows; expected rows with an answer, and images "
            f"that can be read ({program('training_vlm.inspect_data')} {args.dataset} shows what they are)."
        )
    metrics = choose_metrics(questions, args.metrics)
    weighs, config = any(metric.likelihoods for metric in metrics), greedy(model, processor, args.max_new_tokens)
    predictions = answer_questions(model, processor, questions, args.batch_size, config, weighs=weighs, progress=True)
    if not predictions:
        raise DuetError(f"{args.dataset}: no question could be asked, because no image could be read.")
    return judge_together(predictions, metrics), Wording(processor)


def _values(judgement: Judgement, draws: Draws) -> dict[str, dict[str, Any]]:
    """Every metric's value, between what it lies, and what it was counted with."""
    found: dict[str, dict[str, Any]] = {}
    for name, scores in judgement.scores.items():
        number = len(judgement.predictions)
        if scores.each is not None:
            number = sum(score is not None for score in scores.each)
        found[name] = {"value": scores.value, "questions": number}
        if (interval := interval_of(scores, draws)) is not None:
            found[name]["interval"] = list(interval)
        if scores.note:
            found[name]["note"] = scores.note
    return found


def _report(judgement: Judgement, values: dict[str, dict[str, Any]]) -> str:
    """Every metric's value with its interval, and by kind where there are several."""
    lines = []
    for metric in judgement.metrics:
        one, shares = values[metric.name], judgement.shares(metric.name)
        line = f"{metric.name} {one['value']:{metric.shown}}"
        if "interval" in one:
            low, high = one["interval"]
            line += f" (95 %: {low:{metric.shown}} to {high:{metric.shown}})"
        lines.append(f"{line}; {one['note']}" if "note" in one else line)
        if sum(map(len, shares.values())) > 1:
            lines.append(judgement.table(metric.name))
    return "\n".join(lines)


def _compared(judged: list[Judgement], names: list[str]) -> dict[str, dict[str, Any]]:
    """Of each metric whether the two models differ, on the questions that both were asked."""
    first, second = _in_common(*judged)
    draws, found = Draws(first.predictions), dict[str, dict[str, Any]]()
    for metric in first.metrics:
        if metric.name not in second.scores:
            continue
        difference = difference_of(first.scores[metric.name], second.scores[metric.name], draws)
        if difference is None:
            said = f"{metric.name} has one value for all questions, so whether the models differ cannot be told."
            found[metric.name] = {"sentence": said}
        else:
            said = sentence(metric.name, metric.shown, difference, (names[0], names[1]))
            found[metric.name] = {
                "value": difference.value, "interval": list(difference.interval), "is_sure": difference.is_sure,
                "questions": len(first.predictions), "sentence": said,
            }  # fmt: skip
    return found


def _in_common(first: Judgement, second: Judgement) -> tuple[Judgement, Judgement]:
    """Two judgements of the rows of which both models were asked as many questions."""
    counts = [Counter(row_of(prediction.question) for prediction in one.predictions) for one in (first, second)]
    kept = [
        [p for p in one.predictions if counts[0][row_of(p.question)] == counts[1][row_of(p.question)]]
        for one in (first, second)
    ]
    if len(kept[0]) == len(first.predictions) == len(second.predictions):
        return first, second
    print(f"{len(kept[0]):,} questions were asked of both models; these are compared.")
    return judge(kept[0], first.metrics), judge(kept[1], second.metrics)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where a person's mistake ends it."""
    args = _parser().parse_args(argv)
    show_any_text()
    logging.disable_progress_bar()
    try:
        if len(args.models) > 2:
            raise DuetError(f"{len(args.models)} models: expected one, or two to be compared.")
        for name in ("batch_size", "max_new_tokens", "max_samples", "max_length"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise DuetError(f"{name}={value}: expected 1 or more.")
        if args.sample_seed < 0:
            raise DuetError(f"sample_seed={args.sample_seed}: expected 0 or more.")
        PartialState(cpu=not torch.accelerator.is_available())
        evaluate(args)
        PartialState().destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        return ended_by(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
