"""The rows of one source become items: conversations, and in the place of what cannot be read the reason why."""

import dataclasses
from typing import Any

from .conversations import ROW, Conversation, Dropped, MalformedRow, caption_column, conversations_from_row


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the rows of a source are read; the fields are those of `conversations_from_row`."""

    source: str = ""
    prompt: str = ""
    caption_choice: str = "all"
    columns: dict[str, str] | None = None
    image_dir: str | None = None
    allow_urls: bool = False

    def conversations(self, row: dict[str, Any], index: int) -> list[Conversation | Dropped]:
        """The conversations of a row, named by the number that its source gave it; see `conversations_from_row`."""
        return conversations_from_row(row, index=row.get(ROW, index), **dataclasses.asdict(self))

    def items(self, row: dict[str, Any], index: int) -> list[Conversation | Dropped]:
        """The same; of a row that cannot be read as many items with the reason as it would have given."""
        try:
            return self.conversations(row, index)
        except MalformedRow as error:
            column = caption_column(row, self.columns) if self.caption_choice == "all" else None
            captions = row.get(column)
            count = max(1, len(captions)) if isinstance(captions, list) else 1
            row_number = row.get(ROW, index)
            return [{"source": self.source, "row": row_number, "dropped": ("malformed row", str(error))}] * count


__all__ = ["Reading"]
