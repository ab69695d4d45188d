"""One question about every picture of a folder, in a file with a line for each answer.

What is special: the file is the memory of what was asked. What is in it is not asked again, unless it was another
question, model or setting; a line that a kill left half written is taken out. A picture that cannot be read has a line
that says why, and is tried again the next time. Each picture is answered as if it were asked alone, whatever is
answered beside it, and draws with a seed of its own.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from processing.data_error_vlm import DuetError, NotFound
from processing.image_files_vlm import FORMATS, BadImage

from .answering import Answerer, Prepared
from .asked import PromptTooLong
from .sampled import Settings, fresh_seed


PICTURES = tuple(sorted(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS))
"""What the names of pictures end in."""

_WEIGHTS = ("*.safetensors", "config.json")
_BEGINNING = b'{"image": '


class Asked(NamedTuple):
    """What was asked: of which model, which question (`None`: a caption), and with which settings."""

    model: str
    question: str | None
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """What each line says of it."""
        return {
            "model": self.model,
            "weights": _stamp(self.model),
            "question": self.question,
            "settings": self.settings,
        }


class Plan(NamedTuple):
    """
    What is to be asked.

    Attributes:
        names: the pictures of the folder, as paths from there; `left` those without an answer.
        unread: pictures with what the file says is wrong with them.
    """

    folder: Path
    out: Path
    asked: Asked
    names: list[str]
    left: list[str]
    unread: set[tuple[str, str]]


def plan_folder(folder: str | os.PathLike, asked: Asked, out: Path) -> Plan:
    """
    Which pictures of a folder, and of those in it, a file has no answer about.

    Raises:
        DuetError: there is no picture, or the file is another program's or cannot be read.
    """
    names, others = _pictures(Path(folder), out)
    done, unread = _answered(out, asked.as_json())
    left = [name for name in names if name not in done]
    if others:
        print(f"note: {others:,} other files of {folder} are no pictures by their names.", file=sys.stderr)
    if len(left) < len(names):
        print(f"{out} has {len(names) - len(left):,} of {len(names):,} answers already.", file=sys.stderr)
    return Plan(Path(folder), out, asked, names, left, unread)


def answer_folder(answerer: Answerer, plan: Plan, settings: Settings, stop: Sequence[str], batch_size: int) -> int:
    """
    Ask about each picture that is left, and add a line for it to the file.

    Args:
        batch_size: pictures answered at a time.

    Returns:
        `int`: how many pictures could not be read.

    Raises:
        DuetError: the question cannot be asked, or the file cannot be written.
    """
    question, about, out = plan.asked.question, plan.asked.as_json(), plan.out
    if question is not None:  # what is wrong with it is not wrong with every picture
        answerer.read([{"role": "user", "content": question}])
    seed = fresh_seed() if settings.seed is None else settings.seed
    count = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(out, "a", encoding="utf-8", errors="surrogatepass") as lines,
            tqdm(total=len(plan.left), unit="picture") as bar,
        ):
            for batch in _batches(answerer, plan.folder, plan.left, question, batch_size):
                for line in _lines(answerer, batch, settings, stop, seed):
                    if "error" in line:
                        count += 1
                        bar.write(f"left out: {line['error']}", file=sys.stderr)
                    if (line["image"], line.get("error")) not in plan.unread:
                        lines.write(json.dumps({**line, **about}, ensure_ascii=False) + "\n")
                    bar.update()
                lines.flush()
    except OSError as error:
        raise DuetError(f"{out} could not be written: {error}.") from error
    unread = f"; {count:,} picture{'s' * (count > 1)} could not be read" if count else ""
    print(f"{out} has {len(plan.names) - count:,} answers about {len(plan.names):,} pictures{unread}.")
    return count


def _pictures(folder: Path, out: Path) -> tuple[list[str], int]:
    """The pictures of a folder and of those in it, as paths from there, and how many other files there are."""
    found, others = [], 0
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(PICTURES) and not name.startswith("."):
                found.append((Path(at) / name).relative_to(folder).as_posix())
            else:
                others += (Path(at) / name).absolute() != out.absolute()
    if not found:
        raise NotFound(f"{folder} holds no picture; expected files that end in {', '.join(PICTURES)}.")
    return sorted(found), others


def _answered(out: Path, about: dict[str, Any]) -> tuple[set[str], set[tuple[str, str]]]:
    """The pictures that a file has answers about, and those with what is wrong; what was asked otherwise is told."""
    done: set[str] = set()
    unread: set[tuple[str, str]] = set()
    otherwise = 0
    if not out.exists():
        return done, unread
    try:
        *whole, half = out.read_bytes().split(b"\n")
    except OSError as error:
        raise DuetError(f"{out} could not be read: {error}.") from error
    if not (half.startswith(_BEGINNING) or _BEGINNING.startswith(half)):
        raise _no_answer(out, len(whole) + 1)
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            name, wrong = line["image"], line.get("error")
            if not {"answer", "error"} & line.keys() or "model" not in line or not isinstance(name, str):
                raise ValueError  # a data set's
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _no_answer(out, number) from error
        if any(line.get(key) != value for key, value in about.items()):
            otherwise += 1
        elif wrong is None:
            done.add(name)
        else:
            unread.add((name, wrong))
    if half:  # every other line was written here, so this one was
        print(f"{out}: its last line was not written to the end, and is taken out.", file=sys.stderr)
        try:
            os.truncate(out, out.stat().st_size - len(half))
        except OSError as error:
            raise DuetError(f"{out} could not be written: {error}.") from error
    if otherwise:
        print(
            f"note: {otherwise:,} lines of {out} are answers to another question, of another model or with other "
            "settings; they stay, and their pictures are asked again.",
            file=sys.stderr,
        )
    return done, unread


def _no_answer(out, number):
    return DuetError(f"{out}, line {number}, is no answer about a picture; name another file.")


def _batches(answerer, folder, names, question, batch_size) -> Iterator[list[tuple[str, Prepared | DuetError]]]:
    """Pictures with their prompts, or with what is wrong, so many of the former at a time."""
    batch: list[tuple[str, Prepared | DuetError]] = []
    readable = 0
    for name in names:
        try:
            if question is None:
                prepared = answerer.read_caption([folder / name])
            else:
                image = {"type": "image", "image": folder / name}
                content = [image, {"type": "text", "text": question}]
                prepared = answerer.read([{"role": "user", "content": content}])
            batch.append((name, prepared))
            readable += 1
        except (BadImage, PromptTooLong) as error:
            batch.append((name, error))
        if readable == batch_size:
            yield batch
            batch, readable = [], 0
    yield batch


def _lines(answerer, batch, settings, stop, seed) -> Iterator[dict[str, Any]]:
    """What the file says of each picture of a batch."""
    asked = [(name, prepared) for name, prepared in batch if isinstance(prepared, Prepared)]
    pieces: list[list[str]] = [[] for _ in asked]
    finishes = answerer.write_together(
        [prepared for _, prepared in asked],
        settings,
        stop=stop,
        seeds=[_seed_of(seed, name) for name, _ in asked],
        tell=lambda number, piece: pieces[number].append(piece),
    )
    answers = iter(zip(pieces, finishes))
    for name, prepared in batch:
        if isinstance(prepared, DuetError):
            yield {"image": name, "error": str(prepared)}
            continue
        written, finish = next(answers)
        counts = {key: value for key, value in finish._asdict().items() if key not in ("reason", "cached_tokens")}
        yield {"image": name, "answer": "".join(written), "finish_reason": finish.reason, **counts}


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {name}".encode(errors="surrogatepass"), digest_size=8).digest(), "little"
    )


def _stamp(model: str) -> str | None:
    """What tells the weights of a folder from those that a later training writes there."""
    files = sorted(file for pattern in _WEIGHTS for file in Path(model).glob(pattern))
    if not files:  # a name on the Hub
        return None
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(json.dumps(states).encode(), digest_size=8).hexdigest()


__all__ = ["PICTURES", "Asked", "Plan", "answer_folder", "plan_folder"]
