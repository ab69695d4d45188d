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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_kind_come_to_the_same_weights(tmp_path, kind):
    assert "20 kills" in loop(tmp_path, "--kills", "20", "--a_run", "5", "--kinds", kind)
