"""What a person did wrong with data: one line that says what was found, where, what was expected, how to mend it.

Told from other errors by `is_duet_error`, because the model has a class of its own for what is wrong with it, and
because a checkpoint's copy of this file is another class. Whatever has no such mark is a mistake of the program and
keeps its stack trace. The file travels with every checkpoint.
"""

JOINERS = "\u200c\u200d"
"""What shapes the letters of Persian and of Indian scripts, and joins emoji to one; it turns and hides nothing."""


def printable(text: str) -> str:
    """A text with its control characters written out, so that a name that data chose steers no terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in text)


class DuetError(ValueError):
    """A mistake of a person's, in one line."""

    is_duet_error = True

    def __init__(self, message: str):
        # A `DataLoader` raises it anew with the worker's stack trace before its line.
        super().__init__("\n".join(map(printable, message.split("\n"))))


class NotFound(DuetError, FileNotFoundError):
    """A file, a folder or a name that is not there."""


class NotReached(DuetError, ConnectionError):
    """A server that does not answer."""


def in_a_line(error: BaseException, most: int = 300) -> str:
    """What a library says, in one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


__all__ = ["DuetError", "NotFound", "NotReached", "in_a_line", "printable"]
