"""The questions of the first hour on an emulated device, which need a device of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
ASK = """
import sys, warnings
sys.path.append({root!r})
import msgspec
from benchmarks.gpu import ask
from benchmarks.gpu.questions import asking, copies, launches

asking.microseconds.__defaults__ = (2, 2)
launches.BUSY = 16
copies._lost.__defaults__ = (20,)
ask.load()
for name in {names!r}:
    found, code = ask.answer(name, "nvidia")
    print(msgspec.json.encode([name, code, found.answer], enc_hook=str).decode())
"""
ANSWERS = {
    "copies": (0, "4 KiB: "),
    "copies-alive": (0, "0 of "),
    "event-gap": (0, ""),
    "launch": (0, ""),
    "l2-flush": (0, "reading "),
    "tf32": (0, "yes"),
    "driver": (0, ""),
    "varlen": (0, "no: "),
    "flashinfer-heads": (3, "not installed"),
    "flash-mla": (3, "not installed"),
}


def test_questions_are_answered_on_a_device(emulate: Any) -> None:
    done = emulate("nvidia", "-c", ASK.format(root=str(ROOT), names=list(ANSWERS)))
    assert done.code == 0, done.out + done.err
    by_name = {name: (code, said) for name, code, said in map(json.loads, done.out.splitlines())}
    for name, (code, beginning) in ANSWERS.items():
        assert by_name[name][0] == code, by_name[name]
        assert by_name[name][1].startswith(beginning), by_name[name]
