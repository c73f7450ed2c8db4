"""Time without a CPU, counted by the system, with a real competitor for a real CPU."""

from __future__ import annotations

import subprocess
import sys

from mla.bench.doubts.clock import Disturbance
from mla.command.clock import delayed_ns

# Shares one CPU with a child that never rests, until the system has counted 20 ms of waiting.
SHARES_A_CPU = """
import os, subprocess, sys, time
from mla.bench.doubts.clock import Disturbance
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    disturbance, end = Disturbance(), time.monotonic() + 60
    while disturbance.milliseconds() < 20 and time.monotonic() < end:
        sum(range(10000))
    print(disturbance.spoils(100), disturbance.spoils(1e6))
finally:
    rival.kill()
"""


def test_waiting_for_a_cpu_that_others_have_is_counted() -> None:
    if delayed_ns() is None:  # a system that does not count it: nothing is ever disturbed
        assert not Disturbance().spoils(0.0)
        return
    done = subprocess.run([sys.executable, "-c", SHARES_A_CPU], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"], done.stdout + done.stderr
