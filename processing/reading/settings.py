"""The settings that name a data set, as a command line and a yaml file give them."""

from dataclasses import dataclass
from typing import Any

from ..data_error_vlm import DuetError


@dataclass
class SourceSettings:
    """
    One data set: where it is, what of it is read, and how.

    Args:
        path, name, split, revision, image_dir: what `open_source` takes.
        eval_split: the split of its evaluation.
        columns: what its columns are, where their names do not say it; see `conversations_from_row`.
        max_samples: so many of its rows.
        weight: its share of a mix.

    Raises:
        DuetError: less than one row.
    """

    path: str
    name: str | None = None
    split: str | None = None
    eval_split: str | None = None
    revision: str | None = None
    image_dir: str | None = None
    columns: dict[str, str] | None = None
    max_samples: int | None = None
    weight: float | None = None

    def __post_init__(self):
        if self.max_samples is not None and self.max_samples < 1:
            raise DuetError(f"max_samples={self.max_samples}: expected 1 or more.")


def parse_columns(columns: Any) -> dict[str, str] | None:
    """
    What each column is: `image=photo,caption=text`, or a mapping.

    Raises:
        DuetError: something else.
    """
    if columns is None:
        return None
    given = columns
    if isinstance(columns, str):
        pairs = (pair.partition("=") for pair in columns.split(","))
        columns = {name: column if equals else None for name, equals, column in pairs}
    if not isinstance(columns, dict) or not columns or not all(isinstance(v, str) for v in columns.values()):
        raise DuetError(f"columns={given!r}: expected what each is called, such as image=photo,caption=text.")
    return {str(name).strip(): column.strip() for name, column in columns.items()}
