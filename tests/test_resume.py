"""A training that is killed and started again ends with the bits of one that was not."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("resume_job.py")


def run(*arguments):
    command = [sys.executable, str(JOB), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("route", "kill"), [("A", 7), ("D", 10)])
def test_killed_and_resumed_to_the_same_bits(tmp_path, route, kill):
    """Killed between two prunings, one or two steps after the last checkpoint."""
    whole = run(route, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = run(route, tmp_path / "killed", kill)
    assert killed.returncode == -signal.SIGKILL
    assert not killed.stdout
    resumed = run(route, tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    digest, pruned, _, last = whole.stdout.split()
    assert (pruned, last) == ("19", "None")
    assert resumed.stdout.split() == [digest, pruned, "from", str(kill // 3 * 3)]
