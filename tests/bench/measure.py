"A command in a process of its own: its seconds and its peak of anonymous memory."

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path


def _family(pid: int) -> list[int]:
    "A process and all that it started."
    pids = [pid]
    for one in pids:
        try:
            pids += [
                int(word)
                for file in Path(f"/proc/{one}/task").glob("*/children")
                for word in file.read_text().split()
            ]
        except OSError:
            pass  # it has ended meanwhile
    return pids


def _anonymous(pid: int) -> int:
    "Bytes of a process's anonymous memory; 0 of one that has ended, or without /proc."
    try:
        size = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return 0
    return int(size[1]) * 1024 if size else 0


@dataclass(frozen=True)
class Run:
    "What one process took."

    seconds: float  # by the clock, from its start to its end
    cpu_seconds: float  # of the processors, its children's included
    # most anonymous memory at a time, in 10^6 bytes, children included; NaN where the system
    # does not tell
    peak_mb: float
    output: str  # what it wrote


def alone(
    command: Sequence[str],  # program and arguments
    every: float = 0.01,  # seconds between two looks at its memory
    env: dict | None = None,  # its environment; this one's if not given
) -> Run:
    "Run a command in a process of its own, and measure it."
    with tempfile.TemporaryFile() as said:
        begin = time.perf_counter()
        try:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env)
        except OSError as e:
            raise ValueError(f"{command[0]}: cannot be run ({e.strerror})") from None
        try:
            peak, status, used = _watched(process.pid, every)
        except BaseException:
            process.kill(), process.wait()
            raise
        seconds, process.returncode = (
            time.perf_counter() - begin,
            os.waitstatus_to_exitcode(status),
        )
        said.seek(0)
        output = said.read().decode(errors="replace")
    if process.returncode:
        raise ValueError(
            f"{Path(command[0]).name} ended with {process.returncode}:"
            f" {(output.strip().splitlines() or ['no message'])[-1]}"
        )
    return Run(seconds, used.ru_utime + used.ru_stime, peak / 1e6 or nan, output)


def _watched(pid: int, every: float) -> tuple:
    "Wait for a process; its peak, how it ended, and what it used."
    peak, family, due = 0, [pid], 0.0
    while True:
        if time.perf_counter() >= due:
            family, due = _family(pid), time.perf_counter() + 0.3
        peak = max(peak, sum(map(_anonymous, family)))
        ended, status, used = os.wait4(pid, os.WNOHANG)
        if ended:
            return peak, status, used
        time.sleep(every)
