"""Runs that are killed at random moments come to the weights of runs that nobody killed; see kill_loop.py."""

import subprocess
import sys

import pytest

from tests.kill_loop import KINDS
from tests.test_endings import ROOT, environment


def loop(tmp_path, *arguments):
    """In a process of its own, because a fork of one that has computed something may wait for ever."""
    command = [sys.executable, "-m", "tests.kill_loop", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_run_that_was_killed_comes_to_the_same_weights(tmp_path):
    assert "2 kills" in loop(tmp_path, "--kills", "2", "--a_run", "2", "--kinds", "packed stream")


ONE_TOLD = """
import os, signal, sys
from pathlib import Path
from tests.kill_loop import KINDS, Loop, start

loop = Loop("two processes", Path(sys.argv[1]))
out = loop.folder / "told"
run = start(loop.kind, loop.arguments, out)
assert run.wait(b"s")
os.kill(run.pids[1], signal.SIGTERM)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in run.pids]
assert codes == [75, 75], (codes, run.log.read_text())
assert "stopped by SIGTERM after step" in run.log.read_text() and not (out / "model.safetensors").exists()
assert start(loop.kind, loop.arguments, out).end()
loop.compare(out)
"""


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_where_one_was_told(tmp_path):
    (tmp_path / "told.py").write_text(ONE_TOLD)
    command = [sys.executable, "told.py", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_kind_come_to_the_same_weights(tmp_path, kind):
    assert "20 kills" in loop(tmp_path, "--kills", "20", "--a_run", "5", "--kinds", kind)
