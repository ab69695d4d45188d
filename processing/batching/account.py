"""The account of a run's data: what was learned from, what was dropped or cut and why, to the last sample.

A record says what became of one sample (one conversation). The collator makes records where samples become batches, in
whatever process that is, and sends them along with the batch; the Trainer adds up those of the batches that it really
consumed. So nothing is counted that was only fetched ahead, and the sums over sources, reasons, workers and processes
are the input, exactly.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..data_error_vlm import printable


DROP_REASONS = (
    "no token of it is supervised",
    "an image does not fit into max_length",
    "no supervised token fits into max_length",
    "longer than max_length",
    "the chat template refuses it",
    "malformed row",
    "missing image file",
    "unreadable image",
    "image too large",
    "image could not be fetched",
)
"""Every reason for which a sample can be dropped."""

BAD_SAMPLE_REASONS = DROP_REASONS[4:]
"""Those that say that something is wrong with the sample; the others are what was asked for."""

CUT_REASONS = ("text cut at its end", "first turns left out")
"""Every way in which a sample can be shortened to fit into `max_length`."""

PERCENTILES = (5, 50, 95, 99, 100)
NAMED_AT_MOST = 100_000
_COUNTED = ("samples", "learned from", "images", "tokens", "image_tokens", "supervised")


class Record(NamedTuple):
    """
    What became of one sample.

    Lengths are positions of the expanded sequence, image tokens included; `supervised` counts tokens that are
    predicted. A dropped sample has none of them, but a reason, and a detail that names what was wrong. `notes` say what
    else a person should know of a sample, dropped or not, in sentences that many samples share, one as often as there
    is something to say it of.
    """

    source: str
    row: int | str | None
    dropped: str | None = None
    detail: str = ""
    cut: str | None = None
    images: int = 0
    tokens: int = 0
    image_tokens: int = 0
    supervised: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchAccount:
    """
    What travels with a batch: a record a sample, and positions of the batch.

    No tuple or mapping, so that whatever moves a batch to a device leaves it as it is.

    Args:
        records: of every sample that the batch was made of, dropped ones too.
        padding: positions that are padding.
        positions: all that are run, padding and all; fewer than samples have where they share some. Those of the
            samples and the padding if not given.
        rows: for each record the number of the row that it comes from, in the list that the collator was given.
    """

    records: list[Record]
    padding: int
    positions: int | None = None
    rows: list[int] | None = None

    @property
    def tokens(self) -> int:
        """Positions of the samples, as if each were run on its own."""
        return sum(record.tokens for record in self.records)

    @property
    def run(self) -> int:
        """Positions that are run."""
        return self.tokens + self.padding if self.positions is None else self.positions


class Account:
    """Records, added up. Memory grows with the number of sources, lengths and dropped samples, not of samples."""

    def __init__(self):
        self.sources: dict[str, Counter] = {}
        self.lengths: Counter[int] = Counter()
        self.padding = 0
        self.shared = 0  # positions that are not run, because another sample's are the same
        self.named: dict[tuple[str, str], tuple[str, str]] = {}

    def add_batch(self, batch: BatchAccount) -> None:
        """Count a batch."""
        self.add(batch.records, batch.padding)
        self.shared += batch.tokens + batch.padding - batch.run

    def add(self, records: Iterable[Record], padding: int = 0) -> None:
        """Count records, and positions of padding."""
        self.padding += padding
        for record in records:
            counts = self.sources.setdefault(record.source, Counter())
            counts["samples"] += 1
            state = "learned" if record.dropped is None else "dropped"
            for note in record.notes:
                counts[f"{state} with note: {note}"] += 1
            if record.dropped is not None:
                counts[f"dropped: {record.dropped}"] += 1
                if len(self.named) < NAMED_AT_MOST:
                    self.named[record.source, str(record.row)] = record.dropped, record.detail
                continue
            counts["learned from"] += 1
            if record.cut is not None:
                counts[f"cut: {record.cut}"] += 1
            for name in ("images", "tokens", "image_tokens", "supervised"):
                counts[name] += getattr(record, name)
            self.lengths[record.tokens] += 1

    def merge(self, other: "Account") -> None:
        """Add what another worker, process or run counted."""
        for source, counts in other.sources.items():
            self.sources.setdefault(source, Counter()).update(counts)
        self.lengths.update(other.lengths)
        self.padding += other.padding
        self.shared += other.shared
        self.named.update(other.named)

    def state(self) -> dict[str, Any]:
        """Everything, as JSON takes it; see `from_state`."""
        return {
            "sources": self.sources,
            "lengths": sorted(self.lengths.items()),
            "padding": self.padding,
            "shared": self.shared,
            "named": [[*place, *why] for place, why in self.named.items()],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Account":
        """The account whose `state` this is."""
        account = cls()
        account.sources = {source: Counter(counts) for source, counts in state["sources"].items()}
        account.lengths = Counter(dict(map(tuple, state["lengths"])))
        account.padding = state["padding"]
        account.shared = state.get("shared", 0)  # nothing was, before it could be
        account.named = {(source, row): (reason, detail) for source, row, reason, detail in state["named"]}
        return account

    def dropped_only(self) -> "Account":
        """The samples that were dropped, without those that were learned from."""
        account = Account()
        for source, counts in self.sources.items():
            dropped = Counter({key: count for key, count in counts.items() if key.startswith("dropped")})
            account.sources[source] = dropped + Counter(samples=counts["samples"] - counts["learned from"])
        account.named = dict(self.named)
        return account

    @property
    def total(self) -> Counter:
        """The counts of all sources together."""
        return sum(self.sources.values(), Counter())

    @property
    def positions(self) -> int:
        """All that were run, padding and all; what samples share once."""
        return self.total["tokens"] + self.padding - self.shared

    def percentiles(self) -> dict[int, int]:
        """Lengths of the samples that were learned from: the smallest that so many percent do not exceed."""
        number, found, seen = self.lengths.total(), {}, 0
        wanted = list(PERCENTILES)
        for length, count in sorted(self.lengths.items()):
            seen += count
            while wanted and seen * 100 >= wanted[0] * number:
                found[wanted.pop(0)] = length
        return found

    def report(self) -> dict[str, Any]:
        """What `data_report.json` holds."""
        return {
            "total": {**_counts(self.total), "positions": self.positions, **self._shares()},
            "sources": {source: _counts(counts) for source, counts in self.sources.items()},
            "length percentiles": {f"{percent} %": length for percent, length in self.percentiles().items()},
            "dropped samples": [
                {"source": source, "row": row, "reason": reason, "detail": detail}
                for (source, row), (reason, detail) in sorted(self.named.items())
            ],
        }

    def _shares(self) -> dict[str, float]:
        total = self.total
        return {
            "supervised share": round(total["supervised"] / max(1, total["tokens"]), 4),
            "padding share": round(self.padding / max(1, self.positions), 4),
        }

    def table(self) -> str:
        """The account in lines for a terminal."""
        total, named = self.total, {source: _short(source) for source in self.sources}
        width = max([18, *(len(name) + 2 for name in named.values())])
        rows = list(self.sources.items())
        if len(rows) > 1:
            rows.append(("together", total))
        lines = [f"{'source':<{width}}" + "".join(f"{name.replace('_', ' '):>14}" for name in _COUNTED)]
        for source, counts in rows:
            lines.append(f"{named.get(source, source):<{width}}" + "".join(f"{counts[name]:>14,}" for name in _COUNTED))
        shares, lengths = self._shares(), self.percentiles()
        if lengths:
            shown = ", ".join(f"{length:,} ({percent} %)" for percent, length in lengths.items())
            lines.append(
                f"\n{shares['supervised share']:.1%} of the tokens are supervised; lengths up to {shown}"
                + (f"; {shares['padding share']:.1%} of the positions were padding" if self.padding else "")
                + (f"; {self.shared:,} positions that samples share were run once" if self.shared else "")
            )
        for key in sorted(key for key in total if key.startswith(("dropped: ", "cut: "))):
            lines.append(f"{total[key]:,} {key}{self._example(key)}")
        for note, number in _notes(total).items():
            lines.append(f"{number:,} noted: {note}")
        return "\n".join(lines)

    def _example(self, key: str) -> str:
        reason = key.removeprefix("dropped: ")
        for (source, row), (why, detail) in self.named.items():
            if why == reason:
                return printable(f" (such as {detail or f'{source}, row {row}'})")
        return ""


def number_of(number: int, thing: str, things: str | None = None) -> str:
    """A number of things for a reader: `1 image`, `2,000 images`."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def _short(source: str) -> str:
    """A source's name, or the end of a long path."""
    source = printable(source)
    return source if len(source) <= 32 else f"...{source[-29:]}"


def _counts(counts: Counter) -> dict[str, Any]:
    """Counts by their kind, those that a report always has among them."""
    found: dict[str, Any] = {name: counts[name] for name in _COUNTED}
    for kind in ("dropped", "cut"):
        prefix = f"{kind}: "
        found[kind] = {key.removeprefix(prefix): n for key, n in sorted(counts.items()) if key.startswith(prefix)}
    return {**found, "notes": _notes(counts)}


def _notes(counts: Counter) -> dict[str, int]:
    """How many samples have each note; which of them were dropped, `dropped_only` has to know."""
    found: Counter[str] = Counter()
    for key, number in counts.items():
        state, is_note, note = key.partition(" with note: ")
        if is_note and state in ("learned", "dropped"):
            found[note] += number
    return dict(sorted(found.items()))
