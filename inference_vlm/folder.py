"""One question about every picture of a folder, in a file with a line for each answer.

What is special: the file is the memory of what was asked. What is in it is not asked again, unless it was another
question, model, setting or picture; a line that a kill left half written is taken out. A picture that cannot be read
has a line that says why, and is tried again the next time. Each picture is answered as if it were asked alone, whatever
is answered beside it, and draws with a seed of its own.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from processing.data_error_vlm import DuetError, NotFound
from processing.image_files_vlm import FORMATS, BadImage

from .answering import Answerer, Prepared
from .asked import PromptTooLong
from .program import json_line
from .sampled import Settings, fresh_seed


try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

PICTURES = tuple(sorted(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS))
"""What the names of pictures end in."""

_ADAPTER, _BASE = "adapter_config.json", "base"

_READ = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    _ADAPTER,
    "*processor_config.json",
    "tokenizer*.json",
    "*.jinja",
)
"""Files of a model on which its answers depend."""

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
        names: the pictures of the folder, as paths from there, with what tells each from itself after a change; `left`
            those without an answer.
        unread: pictures with what the file says is wrong with them.
    """

    folder: Path
    out: Path
    asked: Asked
    names: dict[str, str | None]
    left: list[str]
    unread: set[tuple[str, str]]


def plan_folder(folder: str | os.PathLike, asked: Asked, out: Path) -> Plan:
    """
    Which pictures of a folder, and of those in it, a file has no answer about.

    Raises:
        DuetError: there is no picture, or the file is another program's or cannot be read.
    """
    names, others = _pictures(Path(folder), out)
    done, unread = _answered(out, asked.as_json(), names)
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
                        state = plan.names[line["image"]]
                        lines.write(json_line({**line, "picture": state, **about}) + "\n")
                    bar.update()
                lines.flush()
    except OSError as error:
        raise DuetError(f"{out} could not be written: {error}.") from error
    unread = f"; {count:,} picture{'s' * (count > 1)} could not be read" if count else ""
    print(f"{out} has {len(plan.names) - count:,} answers about {len(plan.names):,} pictures{unread}.")
    return count


@contextlib.contextmanager
def written_by_one(out: Path) -> Iterator[None]:
    """
    While no other run writes a file.

    Raises:
        DuetError: one does, or the file cannot be written.
    """
    is_new = not out.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = open(out, "ab")
    except OSError as error:
        raise DuetError(f"{out} could not be written: {error}.") from error
    with file:
        if fcntl is not None:  # Windows has none
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DuetError(
                    f"{out} is being written by another run; wait for its end, or name another file."
                ) from error
            except OSError:  # a file system without locks
                pass
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it is gone already
                if is_new and not out.stat().st_size:
                    out.unlink()


def _pictures(folder: Path, out: Path) -> tuple[dict[str, str | None], int]:
    """The pictures of a folder and of those in it, as paths from there, and how many other files there are."""
    found, others = {}, 0
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(PICTURES) and not name.startswith("."):
                file = Path(at) / name
                found[file.relative_to(folder).as_posix()] = _state([file])
            else:
                others += (Path(at) / name).absolute() != out.absolute()
    if not found:
        raise NotFound(f"{folder} holds no picture; expected files that end in {', '.join(PICTURES)}.")
    return dict(sorted(found.items())), others


def _answered(out: Path, about: dict[str, Any], names: dict[str, str | None]) -> tuple[set[str], set[tuple[str, str]]]:
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
            name, wrong, state = line["image"], line.get("error"), line.get("picture")
            if not {"answer", "error"} & line.keys() or "model" not in line or not isinstance(name, str):
                raise ValueError  # a data set's
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _no_answer(out, number) from error
        if any(line.get(key) != value for key, value in about.items()) or state != names.get(name, state):
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
            f"note: {otherwise:,} lines of {out} are answers to another question, of another model, with other "
            "settings or about pictures that have changed; they stay, and their pictures are asked again.",
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
    """What tells a model from what a later training, or hand, makes of it: its own files, and those of its base."""
    folder = Path(model)
    if not folder.is_dir():
        return _commit(model, None)
    files = sorted(file for pattern in _READ for file in folder.glob(pattern))
    stamps = [_state(files)]
    if (folder / _ADAPTER).is_file():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # which loading it will tell
            settings = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
            named, revision = settings.get("base_model_name_or_path") or _BASE, settings.get("revision")
            bases = [base for base in (folder / named, folder / _BASE, folder.parent / _BASE) if base.is_dir()]
            stamps += [_stamp(str(base)) for base in bases if base != folder] or [_commit(named, revision)]
    return stamps[0] if len(stamps) == 1 else hashlib.blake2b(str(stamps).encode(), digest_size=8).hexdigest()


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a name on the Hub stands for; `None` where it cannot be had, as loading the model will tell."""
    for file in ("config.json", _ADAPTER):
        with contextlib.suppress(OSError, ValueError):
            return extract_commit_hash(cached_file(name, file, revision=revision), None)
    return None


def _state(files: list[Path]) -> str | None:
    """What tells files from themselves after a change, with none of them read."""
    try:
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:  # a link that leads nowhere
        return None
    return hashlib.blake2b(json.dumps(states).encode(), digest_size=8).hexdigest()


__all__ = ["PICTURES", "Asked", "Plan", "answer_folder", "plan_folder", "written_by_one"]
