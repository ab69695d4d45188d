"""Samples in lines for a terminal, with its colours or with plain marks."""

import itertools

from .samples import KINDS, Sample, counted, runs_of


def write_terminal(samples: list[Sample], coloured: bool) -> str:
    """The samples in lines for a terminal, with its colours or with plain marks."""
    legend = (f"{_marked(kind, [kind], coloured)} {look.meaning}" for kind, look in KINDS.items())
    lines = ["   ".join(legend), ""]
    for number, sample in enumerate(samples, start=1):
        lines += [f"--- {number} of {len(samples)}: {sample.name}", sample.facts]
        if sample.pieces:
            runs = runs_of(sample.pieces)
            lines.append("".join(w + _marked(kind, map(counted, run), coloured) for kind, w, run in runs))
        lines.append("")
    return "\n".join(lines)


def _marked(kind, texts, coloured):
    look = KINDS[kind]
    if not coloured:
        return "".join(texts).join(look.marks)
    shown = ""
    for text, shade in zip(texts, itertools.cycle(look.shades)):
        colour = f"\x1b[38;5;16;48;5;{shade}m"
        # A colour that went on over the end of a line would fill the line.
        shown += colour + text.replace("\n", f"\x1b[0m\n{colour}") + "\x1b[0m"
    return shown
