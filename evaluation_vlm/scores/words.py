"""Captions as words, as COCO's metrics count them: by PTB's tokenizer, which needs Java, or by one of ours, so named.

What is special: the tokenizer is run as pycocoevalcap runs it, in lower case and without punctuation, but reads and
writes through pipes and in UTF-8, so that it needs no folder to write in and no locale.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path

from processing.data_error_vlm import in_a_line


OWN_WORDS = "words split without PTB's tokenizer, which needs Java: not comparable with published values"

_LONGEST_RUN_SECONDS = 600

# What PTB's tokenizer makes words of their own of, inside of words.
_CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_PAIRS = {
    **{"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"},
    **{"gimme": "gim me", "lemme": "lem me"},
}
_WORDS = re.compile(
    r"n't\b|'(?:s|re|ve|ll|d|m)\b"
    r"|(?:[^\W\d_]\.){2,}"  # u.s.
    r"|\d+(?:[.,:]\d+)+"  # 3.5 and 10:30
    r"|[^\W_]+(?:[-'/][^\W_]+)*"
    r"|[$€£¥%&@#*+=<>^~|]"
)


@functools.lru_cache(maxsize=1)  # three metrics ask for the same
def split_words(texts: tuple[str, ...]) -> tuple[list[str], str]:
    """
    Texts as words with blanks between them.

    Returns:
        the texts, and what they were split with where that was not PTB's tokenizer.
    """
    lines = [" ".join(text.split()) for text in texts]  # whatever ends a line anywhere would end one there
    if shutil.which("java") is None:
        return [own_words(line) for line in lines], OWN_WORDS
    try:
        return _ptb_words(lines), ""
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [own_words(line) for line in lines], f"{OWN_WORDS} (Java failed: {in_a_line(error, 100)})"


def _ptb_words(lines: list[str]) -> list[str]:
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    found = subprocess.run(
        [*command, "-charset", "utf-8"],
        input="".join(f"{line}\n" for line in lines).encode(errors="replace"),
        capture_output=True,
        check=True,
        timeout=_LONGEST_RUN_SECONDS,
    ).stdout.decode(errors="replace")
    split = found.split("\n")[: len(lines)]
    if len(split) < len(lines):
        raise ValueError(f"{len(split):,} lines came back of {len(lines):,}")
    dropped = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in dropped) for line in split]


def own_words(line: str) -> str:
    """A text as words as PTB's tokenizer splits plain English, in lower case and without punctuation."""
    words = _WORDS.findall(_CLITICS.sub(r" \1", line.lower().replace("\u2019", "'")))
    return " ".join(_PAIRS.get(word, word) for word in words)


__all__ = ["OWN_WORDS", "own_words", "split_words"]
