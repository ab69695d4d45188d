"""What was measured, for a reader: ratios with their spread, a table, a plot, and a place in results.md."""

import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
HEADING = "## Speed of training"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def summary(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """
    A line for each runner of a case.

    Returns:
        `runner`; CPU and wall `seconds` a sample, medians; `ratio`, the CPU time of the first runner over this one's,
        as quartiles over the rounds; `over` and `memory`, MiB at the most over that before the first step and in all,
        with `over_ratio`, `memory_ratio` to the first runner's; `use`, the share of the GEMM peak of the same round
        that necessary FLOPs are, where those are known.
    """
    steps, lines = measured["steps"], []
    first = measured["runners"][0]
    for name in measured["runners"]:
        rounds = list(zip(steps[name], steps[first], steps["gemm"], measured.get("flops") or [{}] * len(steps[name])))
        rounds = rounds[1:] or rounds
        peak, base = steps[name][-1], steps[first][-1]
        kind = "cached" if "cache" in name else "whole"
        uses = [flops[kind] / own["cpu"] / gemm["loss"] for own, _, gemm, flops in rounds if flops]
        lines.append(
            {
                "runner": name,
                "cpu": statistics.median(own["cpu"] for own, *_ in rounds) / measured["batch"],
                "wall": statistics.median(own["wall"] for own, *_ in rounds) / measured["batch"],
                "ratio": quartiles([other["cpu"] / own["cpu"] for own, other, *_ in rounds]),
                "over": peak["over"],
                "memory": peak["peak"],
                "over_ratio": peak["over"] / base["over"],
                "memory_ratio": peak["peak"] / base["peak"],
                "use": statistics.median(uses) if uses else None,
                "loss": steps[name][0]["loss"],
                "norm": steps[name][0]["norm"],
            }
        )
    return lines


def table(measured: dict[str, Any]) -> str:
    """A case as a markdown table."""
    gemm = statistics.median(step["loss"] for step in measured["steps"]["gemm"]) / 1e9
    lines = [
        f"{measured['case']}: {measured['batch']} texts of {measured['images']} images a step, "
        f"{len(measured['steps']['gemm']) - 1} rounds, GEMM peak {gemm:,.0f} GFLOP/s",
        "",
        "| runner | times as fast (quartiles) | CPU ms a sample | wall ms | use of the peak | peak memory, MiB "
        "| over the start, MiB | first loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in summary(measured):
        low, median, high = line["ratio"]
        use = "" if line["use"] is None else f"{line['use']:.0%}"
        lines.append(
            f"| {line['runner']} | **{median:.2f}** ({low:.2f} to {high:.2f}) | {line['cpu'] * 1e3:,.0f} "
            f"| {line['wall'] * 1e3:,.0f} | {use} | {line['memory']:,.0f} ({line['memory_ratio']:.2f}) "
            f"| {line['over']:,.0f} ({line['over_ratio']:.2f}) | {line['loss']:.6f} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """This machine and what runs on it, as a sentence without its end."""
    import torch
    import transformers

    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    cores = f"{len(names)} cores of {names[0].strip()}" if names else platform.processor()
    return (
        f"{cores}, Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}, "
        f"transformers {transformers.__version__}"
    )


def commit() -> str:
    """The commit that is checked out, with a plus sign where files differ from it."""

    def git(*words):
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def write_results(cases: list[dict[str, Any]], command: str, day: str) -> None:
    """Put the tables into results.md, in place of the ones there."""
    file = HERE / "results.md"
    body = (
        f"{HEADING}\n\n`{command}`, {machine()}, one thread each, {day} ({commit()}). {_EXPLANATION}\n\n"
        + "\n\n".join(table(case) for case in cases)
        + "\n\n![ladder](ladder.svg)\n"
    )
    text = file.read_text()
    start = text.find(HEADING)
    if start < 0:
        file.write_text(text.rstrip("\n") + "\n\n" + body)
        return
    end = text.find("\n## ", start + 1)
    file.write_text(text[:start] + body + ("" if end < 0 else text[end:]))


_EXPLANATION = (
    "Ratios are of CPU seconds within a round, medians and quartiles; peak memory is the highest resident size of the "
    "process, with the ratio to the first runner's. Losses and gradient norms of the first step agree, or nothing is "
    "written."
)


def draw_ladder(cases: list[dict[str, Any]], file: Path) -> None:
    """For each case a group of bars, one a runner: how many times as fast as the first."""
    width, left, row, gap = 760, 190, 18, 34
    lines = [(case, summary(case)) for case in cases]
    most = max(line["ratio"][2] for _, group in lines for line in group)
    across = (width - left - 90) / most
    shapes, y = [], 16
    for case, group in lines:
        y += gap - 8
        shapes.append(f'<text x="10" y="{y}" font-weight="bold">{case["case"]}</text>')
        y += 8
        for line in group:
            low, median, high = (left + value * across for value in line["ratio"])
            colour = "#1f6fb5" if line["runner"].startswith("duet") else "#999"
            shapes += [
                f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">{line["runner"]}</text>',
                f'<rect x="{left}" y="{y + 2}" width="{median - left:.1f}" height="{row - 5}" fill="{colour}"/>',
                f'<path d="M{low:.1f},{y + row / 2} H{high:.1f}" stroke="#222"/>',
                f'<text x="{high + 6:.1f}" y="{y + 12}">{line["ratio"][1]:.2f}</text>',
            ]
            y += row
    height = y + 20
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="10" y="18">times as fast as the first of each group, CPU seconds; the dark line spans the middle '
        f"half of the rounds</text>{''.join(shapes)}</svg>\n"
    )
