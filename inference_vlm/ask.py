"""Ask a model from the shell; the answer appears as it is written.

    python -m inference_vlm.ask outputs/shapes/sft picture.png "Which colour is the circle?"
    python -m inference_vlm.ask MODEL before.png after.png "What has changed?" --json
    python -m inference_vlm.ask MODEL photos "What is in the picture?" --out answers.jsonl

What is special: what follows the model are pictures, and the last of it the question, unless it names a picture too: an
http URL, a `data:` URI, a file that is there or whose name ends like a picture's. Without a question the pictures are
captioned, which is all that a model of stage 1 can do; without a picture the language model is asked. A question `-` is
read from stdin. The exit code is 0, 1 for an error in one line, 2 for a command line that cannot be understood, 3 where
some pictures of a folder could not be read, and 130 after Ctrl-C.
"""

import argparse
import contextlib
import os
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from processing.data_error_vlm import DuetError
from processing.image_files_vlm import ImagePolicy, is_url

from .answering import Answerer, Prepared
from .asked import opened, reference_of
from .folder import PICTURES, Asked, answer_folder, plan_folder, written_by_one
from .loading import add_loading_arguments, loading_of
from .program import INTERRUPTED, ended_by, json_line, program, show_any_text
from .sampled import Settings, check_settings


ERROR, SOME_NOT_READ = 1, 3
"""Exit codes."""

BATCH_SIZE = 8
SAMPLING = ("top_p", "top_k", "min_p", "seed")
SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def pictures_and_question(inputs: Sequence[str], question: str | None = None) -> tuple[list[str], str | None]:
    """
    Which of the words behind a model are pictures, and the question.

    Args:
        inputs: as they were given.
        question: where it was given apart; then all of them are pictures.

    Raises:
        DuetError: one before the last is no picture.
    """
    pictures = list(inputs)
    if question is None and pictures and not _names_a_picture(pictures[-1], alone=len(pictures) == 1):
        question = pictures.pop()
    for picture in pictures:
        if not _names_a_picture(picture, alone=True):
            raise DuetError(
                f"{picture!r} names no picture that is there; expected the pictures and then one question, in quotes."
            )
    return pictures, question


def _names_a_picture(text: str, alone: bool) -> bool:
    """Whether a word is a picture, or where it stands `alone` a folder of them, and no question."""
    if is_url(text) or text.startswith("data:") or text.lower().endswith(PICTURES):
        return True
    try:
        return os.path.isfile(text) or (alone and os.path.isdir(text))
    except ValueError:  # no file can have such a name
        return False


def read_question(question: str | None) -> str | None:
    """The question itself; `-` is read from stdin.

    Raises:
        DuetError: it is empty, or no text.
    """
    if question == "-":
        try:
            question = sys.stdin.read().strip()
        except UnicodeDecodeError as error:
            raise DuetError(f"the question on stdin is no text ({error}); expected UTF-8.") from error
    if question is None:
        return None
    if not question.strip():
        raise DuetError("the question is empty; leave it out for a caption.")
    try:
        question.encode()
    except UnicodeEncodeError as error:  # bytes that are no UTF-8
        raise DuetError("the question is no text; expected UTF-8.") from error
    return question


def ask(answerer: Answerer, prepared: Prepared, settings: Settings, stop: Sequence[str], asked: dict | None) -> None:
    """
    Print what a model answers, as it is written; or as one JSON object with what it took.

    Args:
        asked: what the JSON object says of the question; `None` prints the answer alone.
    """
    started = time.perf_counter()
    stream = answerer.stream(prepared, settings, stop=stop)
    if asked is not None:
        answer = "".join(stream)
        finish = stream.finish
        assert finish is not None  # which it is, once there are no more pieces
        seconds = round(time.perf_counter() - started, 3)
        counts = {name: value for name, value in finish._asdict().items() if name != "reason"}
        found = {**asked, "answer": answer, "finish_reason": finish.reason, **counts, "seconds": seconds}
        print(json_line(found))
        return
    for piece in stream:
        print(_harmless(piece), end="", flush=True)
    print()
    if stream.finish is not None and stream.finish.reason == "length":
        is_full = stream.finish.completion_tokens < settings.config.max_new_tokens
        why = "the context is full" if is_full else "--max_new_tokens gives more room"
        print(f"note: cut after {stream.finish.completion_tokens:,} tokens; {why}.", file=sys.stderr)


def _harmless(text: str) -> str:
    """What a model wrote, with the control characters by which a picture's text could steer a terminal written out."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) == "Cc" and character not in "\n\t"
        else character
        for character in text
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("inference_vlm.ask"),
        description=(__doc__ or "").splitlines()[0],
        epilog="Exit code: 0; 1 an error, in one line; 2 a command line that cannot be understood; 3 some pictures of "
        "a folder could not be read; 130 interrupted.",
    )
    parser.add_argument("model", help="folder or Hub name of a model trained with Duet; its own code is run")
    parser.add_argument(
        "inputs", nargs="*", metavar="PICTURE ... QUESTION",
        help="image files or URLs, or a folder of them with --out; and one question, - for stdin. Without a question "
        "the pictures are captioned",
    )  # fmt: skip
    parser.add_argument("--question", help="the question, where it could be taken for a picture; - for stdin")
    parser.add_argument("--allow_urls", action="store_true", help="fetch pictures that are URLs")
    parser.add_argument("--allow_local_urls", action="store_true", help="from networks of this machine, too")
    parser.add_argument("--json", action="store_true", help="print the answer and what it took as one JSON object")
    parser.add_argument(
        "--out", type=Path, help="file of the answers about a folder's pictures, one JSON object a line"
    )
    parser.add_argument("--batch_size", type=int, help=f"pictures of a folder answered at a time ({BATCH_SIZE})")
    group = parser.add_argument_group("the answer", "what is not given is as the model's own settings have it")
    group.add_argument("--max_new_tokens", type=int, help="longest answer")
    group.add_argument("--temperature", type=float, help="0: the likeliest answer; above: sampled")
    group.add_argument("--top_p", type=float, help="sample from the likeliest tokens that have this share together")
    group.add_argument("--top_k", type=int, help="sample from so many tokens")
    group.add_argument("--min_p", type=float, help="sample from tokens at least this share as likely as the likeliest")
    group.add_argument("--repetition_penalty", type=float, help="above 1: what is there already is less likely")
    group.add_argument("--seed", type=int, help="the same seed samples the same answer")
    group.add_argument("--stop", action="append", default=[], help="text at which the answer ends; may be repeated")
    add_loading_arguments(parser)
    return parser


def _run(args: argparse.Namespace, held: contextlib.ExitStack) -> int:
    pictures, question = pictures_and_question(args.inputs, args.question)
    question = read_question(question)
    if not pictures and question is None:
        raise DuetError("nothing is asked; give a picture, a question, or both.")
    folders = [picture for picture in pictures if os.path.isdir(picture)]
    if folders and (args.out is None or len(pictures) > 1):
        raise DuetError(f"{folders[0]} is a folder; ask about its pictures alone, with --out answers.jsonl.")
    if args.out is not None and not folders:
        raise DuetError(
            "--out is for the pictures of a folder; name one, or leave it out and redirect what is printed."
        )
    batch_size = BATCH_SIZE if args.batch_size is None else args.batch_size
    if batch_size < 1:
        raise DuetError(f"batch_size={args.batch_size}: expected 1 or more.")
    if args.json and args.out is not None:
        raise DuetError("--json prints one answer, and the lines of --out are JSON; leave out one of them.")
    given: dict[str, Any] = {name: getattr(args, name) for name in SETTINGS}
    check_settings(given)
    plan, images = None, []  # what is wrong with them is found before a model is loaded
    if args.out is not None:
        numbers = {name: getattr(args, name) or None for name in ("dtype", "load_in_4bit", "load_in_8bit")}
        asked = {**given, "stop": args.stop or None, **numbers}
        known = {name: value for name, value in asked.items() if value is not None}
        held.enter_context(written_by_one(args.out))
        plan = plan_folder(folders[0], Asked(args.model, question, known), args.out)
        if not plan.left:
            return 0
    else:
        policy = ImagePolicy(allow_urls=args.allow_urls, allow_local_urls=args.allow_local_urls, own_paths=True)
        images = [opened(reference_of(picture, policy)) for picture in pictures]
    logging.disable_progress_bar()
    answerer = Answerer.load(args.model, **loading_of(args))
    settings = answerer.settings(**given)
    idle = [f"--{name}" for name in SAMPLING if given[name] is not None and not settings.config.do_sample]
    if idle:
        verb = "changes" if len(idle) == 1 else "change"
        print(
            f"note: {', '.join(idle)} {verb} nothing: the likeliest token is taken; --temperature samples.",
            file=sys.stderr,
        )
    if args.batch_size is not None and plan is None:
        print("note: --batch_size changes nothing: it is for a folder, with --out.", file=sys.stderr)
    if plan is not None:
        unread = answer_folder(answerer, plan, settings, args.stop, batch_size)
        return SOME_NOT_READ if unread else 0
    if question is None:
        prepared = answerer.read_caption(images)
    else:
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        prepared = answerer.read([{"role": "user", "content": parts}])
    shown = {"model": args.model, "images": pictures, "question": question} if args.json else None
    ask(answerer, prepared, settings, args.stop, shown)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; see above for the codes that it gives."""
    args = _parser().parse_intermixed_args(argv)
    show_any_text()
    try:
        with contextlib.ExitStack() as held:
            return _run(args, held)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except torch.OutOfMemoryError as error:
        line = str(error).partition("\n")[0].partition(". ")[0]
        print(
            f"error: the memory of the device is full ({line}); give a smaller --batch_size, fewer pictures, or "
            "--load_in_4bit.",
            file=sys.stderr,
        )
        return ERROR
    except Exception as error:
        return ended_by(error)


if __name__ == "__main__":
    sys.exit(main())
