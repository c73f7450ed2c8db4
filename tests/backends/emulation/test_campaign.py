"""The questions of the first hour on an emulated device, which need a device of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
ASK = """
import sys
sys.path.append({root!r})
import msgspec
from benchmarks.gpu import ask

ask.CALLS, ask.ROUNDS, ask.BUSY, ask.FILLS = 2, 2, 16, 20
for name in ask.QUESTIONS:
    report, code = ask.answer(name, "nvidia")
    print(msgspec.json.encode([name, code, report.answer], enc_hook=str).decode())
"""
ANSWERS = {"event-gap": "", "copies-alive": "0 of ", "l2-flush": "reading "}


def test_questions_are_answered_on_a_device(emulate: Any) -> None:
    done = emulate("nvidia", "-c", ASK.format(root=str(ROOT)))
    assert done.code == 0, done.out + done.err
    answers = {name: (code, said) for name, code, said in map(json.loads, done.out.splitlines())}
    assert answers.keys() == ANSWERS.keys()
    for name, (code, said) in answers.items():
        assert code == 0, said
        assert said.startswith(ANSWERS[name])
