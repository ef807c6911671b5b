"""Processes of one job on this machine: started over localhost, ended together, within a time limit."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a process ended."""

    returncode: int  # negative: by a signal
    output: str  # of both streams
    seconds: float  # after the start of all


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def local_environment(devices: int) -> dict[str, str]:
    """For processes that stand for hosts with some simulated devices each.

    XLA's CPU client runs as many programs at once as it has threads, which are as many as cores. A program that waits
    for another process keeps its thread, and with few cores none is left for the one that is waited for. `NPROC` is
    the number of threads.
    """
    ours = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "NPROC": str(max(16, 8 * devices))}
    return dict(os.environ) | ours


def run_processes(commands: list[list[str]], *, devices: int, timeout: float) -> list[Ended]:
    """Start one process for each command and wait for all of them.

    Args:
        commands: Arguments for this Python.
        devices: Simulated devices of each.
        timeout: Seconds; what still runs then is killed.

    Returns:
        How each ended, in order.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(number)) for number in range(len(commands))]
        children, ended = [], {}
        try:
            for command, file in zip(commands, files, strict=True):
                with file.open("w") as out:
                    children.append(
                        subprocess.Popen(
                            [sys.executable, *command],
                            stdout=out,
                            stderr=subprocess.STDOUT,
                            env=local_environment(devices),
                        )
                    )
            while len(ended) < len(children) and time.monotonic() - started < timeout:
                for number, child in enumerate(children):
                    if number not in ended and child.poll() is not None:
                        ended[number] = time.monotonic() - started
                time.sleep(0.05)
        finally:
            for child in children:
                child.kill()
                child.wait()
        return [
            Ended(
                child.returncode if number in ended else -signal.SIGKILL, file.read_text(), ended.get(number, timeout)
            )
            for number, (child, file) in enumerate(zip(children, files, strict=True))
        ]
