"""A training that is killed and started again ends with the bits of one that was not."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from resume_job import train

JOB = Path(__file__).with_name("resume_job.py")


@pytest.mark.parametrize(("route", "kill"), [pytest.param("A", 7, marks=pytest.mark.newest), ("D", 10)])
def test_killed_and_resumed_to_the_same_bits(tmp_path, route, kill):
    """Killed between two prunings, one or two steps after the last checkpoint; resumed in another process."""
    command = [sys.executable, str(JOB), route, str(tmp_path / "killed"), str(kill)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    digest, pruned, last = train(route, tmp_path / "whole")
    assert (pruned, last) == (19, None)
    assert train(route, tmp_path / "killed") == (digest, pruned, kill // 3 * 3)
