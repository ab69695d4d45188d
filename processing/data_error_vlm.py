"""What a person did wrong with data: one line that says what was found, where, what was expected, how to mend it.

Told from other errors by `is_duet_error`, because the model has a class of its own for what is wrong with it, and
because a checkpoint's copy of this file is another class. Whatever has no such mark is a mistake of the program and
keeps its stack trace. The file travels with every checkpoint.
"""


class DuetError(ValueError):
    """A mistake of a person's, in one line."""

    is_duet_error = True


class NotFound(DuetError, FileNotFoundError):
    """A file, a folder or a name that is not there."""


class NotReached(DuetError, ConnectionError):
    """A server that does not answer."""


def in_a_line(error: BaseException, most: int = 300) -> str:
    """What a library says, in one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


__all__ = ["DuetError", "NotFound", "NotReached", "in_a_line"]
