"""The benchmarks of the speed of training run, compare what computes the same, and would say so if it did not."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest


ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
WITHOUT_DATASETS = """
import runpy, sys
sys.modules["datasets"] = None
sys.path.insert(0, sys.argv[1])
sys.argv = ["gpu.py", "--out", sys.argv[2], "--device", "cpu", "--images", "1"]
runpy.run_path(f"{sys.path[0]}/gpu.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the small shape gives in fp32, LLaVA beside Duet with its savings and without."""
    file = tmp_path_factory.mktemp("speed") / "measured.json"
    command = [sys.executable, BENCHMARKS / "train_speed.py", "--shape", "small", "--precision", "fp32"]
    names = "llava;duet, nothing saved;duet, shared prefix"
    command += ["--rounds", "2", "--images", "2", "--runners", names, "--json", file]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (case,) = json.loads(file.read_text())
    return case


@pytest.fixture(scope="module")
def modules():
    """The benchmark's modules, which are scripts and no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import speed_report
        import train_speed

        yield train_speed, speed_report
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_runner_takes_every_step_and_the_first_losses_agree(measured, modules):
    train_speed, _ = modules
    assert [len(steps) for steps in measured["steps"].values()] == [3] * 4
    assert train_speed.disagreements(measured) == []
    losses = [measured["steps"][name][0]["loss"] for name in measured["runners"]]
    assert max(losses) - min(losses) <= 1e-5 * losses[0] and losses[0] > 1


@pytest.mark.parametrize(("what", "off"), [("loss", 2e-5), ("norm", 2e-4), ("loss", float("nan"))])
def test_a_runner_that_computes_something_else_is_named(measured, modules, what, off):
    train_speed, _ = modules
    changed = copy.deepcopy(measured)
    step = changed["steps"]["duet, shared prefix"][0]
    step[what] = changed["steps"]["llava"][0][what] * (1 + off)
    (line,) = train_speed.disagreements(changed)
    assert f"{what} of duet, shared prefix" in line


def test_nothing_is_written_where_runners_disagree(measured, modules, monkeypatch, capsys):
    train_speed, _ = modules
    changed = copy.deepcopy(measured)
    changed["steps"]["llava"][0]["loss"] *= 1.001
    monkeypatch.setattr(train_speed, "measure", lambda *args: changed)
    monkeypatch.setattr(train_speed, "write_results", lambda *args: pytest.fail("figures of something else"))
    assert train_speed.main(["--all"]) == 1
    assert "loss of duet" in capsys.readouterr().err


def test_a_ratio_is_that_of_cpu_seconds_in_the_same_round(measured, modules):
    _, speed_report = modules
    lines = {line["runner"]: line for line in speed_report.summary(measured)}
    first, other = (measured["steps"][name][1:] for name in ("llava", "duet, shared prefix"))
    ratios = sorted(a["cpu"] / b["cpu"] for a, b in zip(first, other))
    low, median, high = lines["duet, shared prefix"]["ratio"]
    assert median == pytest.approx(sum(ratios) / 2) and ratios[0] <= low <= high <= ratios[1]
    assert lines["llava"]["ratio"] == (1, 1, 1)
    assert 0 < lines["llava"]["use"] < lines["duet, shared prefix"]["use"] < 1


def test_the_results_replace_those_of_before_and_nothing_else(measured, modules, tmp_path, monkeypatch):
    _, speed_report = modules
    monkeypatch.setattr(speed_report, "HERE", tmp_path)
    monkeypatch.setattr(speed_report, "commit", lambda: "abc")
    (tmp_path / "results.md").write_text("# What was measured\n\n## Before\n\nold\n")
    for day in ("one day", "another day"):
        speed_report.write_results([measured], "the command", day)
        text = (tmp_path / "results.md").read_text() + ("\n## Behind\n\nkept\n" if day == "one day" else "")
        (tmp_path / "results.md").write_text(text)
    assert text.startswith("# What was measured\n\n## Before\n\nold\n") and text.endswith("\n## Behind\n\nkept\n")
    assert "another day" in text and "one day" not in text and text.count("| llava |") == 1


def test_the_ladder_is_a_picture_with_a_bar_for_each_runner(measured, modules, tmp_path):
    _, speed_report = modules
    speed_report.draw_ladder([measured], tmp_path / "ladder.svg")
    shapes = [element.tag.rpartition("}")[2] for element in ElementTree.parse(tmp_path / "ladder.svg").iter()]
    assert shapes.count("rect") == 1 + len(measured["runners"])


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_without_the_package_datasets(tmp_path):
    command = [sys.executable, "-c", WITHOUT_DATASETS, BENCHMARKS, tmp_path]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert [case["left out"] for case in cases] == [{}, {}] and all(len(case["runners"]) >= 3 for case in cases)
    assert "| llava, sdpa | **1.00** |" in (tmp_path / "gpu.md").read_text()
