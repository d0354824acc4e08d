"""The same bytes on a Ray cluster, again and again on a busy machine: does a run wait for ever?

    python tests/ray_stress.py 30 --load 4

runs the test that compares all backends' bytes so many times, beside so many processes that
compute and claim memory, and says how each run ended.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST = "tests/test_jobs.py::test_the_same_bytes_come_out[ray]"
BUSY = """
import time
while True:
    room = bytearray(MEGABYTES << 20)
    end = time.time() + 2
    while time.time() < end:
        sum(i * i for i in range(10000))
    room[::4096] = b"x" * len(room[::4096])
"""


def run(seconds):
    "How the test ended, in how many seconds; a run that lasts longer is ended."
    words = [sys.executable, "-m", "pytest", TEST, "-q", "-p", "no:cacheprovider"]
    start = time.monotonic()
    done = subprocess.run(
        [*words, "--timeout", str(seconds)], cwd=ROOT, capture_output=True, text=True
    )
    taken = time.monotonic() - start
    last = done.stdout.strip().splitlines()[-1:]
    return done.returncode, taken, last, done.stdout + done.stderr


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("times", type=int, help="runs of the test")
    p.add_argument("--load", type=int, default=4, help="processes that compute beside it")
    p.add_argument("--memory", type=int, default=200, help="megabytes that each of them claims")
    p.add_argument("--seconds", type=int, default=600, help="after which a run has failed")
    a = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what was started
    busy = [sys.executable, "-c", BUSY.replace("MEGABYTES", str(a.memory))]
    load, failed, times = [subprocess.Popen(busy) for _ in range(a.load)], 0, []
    try:
        for i in range(1, a.times + 1):
            code, taken, last, said = run(a.seconds)
            failed += code != 0
            times.append(taken)
            before = ", ".join(f"{n:.1f}" for n in os.getloadavg())
            print(f"{i}: code {code}, {taken:.0f} s, load {before}: {last}", flush=True)
            if code:
                print(said, flush=True)
    finally:
        for process in load:
            process.kill()
    if times:
        print(f"{len(times)} runs, {failed} failed, the longest {max(times):.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
