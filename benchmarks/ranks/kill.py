"""Runs over several ranks, of which one is killed at a random moment: `python -m benchmarks.ranks.kill 200`.

A trial is good if every rank that lives ends in time with a documented code, says which rank is to blame (or
rank 0 does), leaves no process, and the result file holds every case that was finished before.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ranks.nursery import Nursery, Ranks
from mla.bench import results
from mla.bench.ranks.pulse import GRACE, SILENT
from mla.command.console import note, out
from mla.command.table import markdown
from mla.errors import ResultError

CONFIG = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SCENARIO = """
[[scenario]]
name = "{name}"
mode = "decode"
query_lens = ["1*2"]
history = [{history}, 9]
runs = 4
passes = 2
warmups = 1
"""
NAMES = ("short", "middle", "long")
WORDS = ("--backend", "cpu", "--config", "tiny.json", "--workload", "tiny.toml", "--implementations", "mla")
# What is done to a rank, and the codes that a rank which lives may end with: 0 where all was over by then.
FAULTS = {
    signal.SIGKILL: (0, 3),
    signal.SIGSTOP: (0, 3),  # with SIGCONT once the others have ended
    signal.SIGTERM: (0, 143),
    signal.SIGINT: (0, 130),
}
# Seconds after which ranks miss one that never came: in trials, ten; a run waits for two minutes.
MEETING = 10.0
# Seconds in which the others must end: after MEETING or, where one is stopped, SILENT; then they have GRACE.
BOUND = MEETING + 2 * SILENT + GRACE
CONSTANTS = {"mla.bench.ranks.meeting.MEETING": MEETING}


@dataclass(frozen=True)
class Trial:
    """One run and what was done to it."""

    fault: signal.Signals
    rank: int
    after: float  # seconds
    ended: float  # seconds from the fault until all had ended
    codes: Sequence[int | None]
    over: bool  # the rank had ended by then
    wrong: Sequence[str]


def write_inputs(folder: Path) -> None:
    """Write the config and the workload."""
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    scenarios = (SCENARIO.format(name=name, history=5 * place + 5) for place, name in enumerate(NAMES))
    (folder / "tiny.toml").write_text("".join(scenarios))


def undisturbed(nursery: Nursery, words: Sequence[str], folder: Path, world: int) -> float:
    """Let a run be, and return the seconds until its result was there."""
    (folder / "out0.txt").unlink(missing_ok=True)
    ranks = nursery.start(words, folder, world)
    start = time.monotonic()
    while not ranks.out() and ranks.code(0) is None:
        time.sleep(0.02)
    seconds = time.monotonic() - start
    codes = ranks.wait(BOUND)
    note(f"undisturbed: codes {codes}, result after {seconds:.1f} s")
    if any(codes):
        raise SystemExit(ranks.err())
    return seconds


def trial(ranks: Ranks, fault: signal.Signals, rank: int, after: float) -> Trial:
    """Let a run be for some seconds, do something to a rank, and judge how all of them end."""
    ranks.wait(after)
    finished = re.findall(r"^\d+ of \d+  (\w+):", ranks.err(0), re.MULTILINE)
    over = ranks.code(rank) is not None
    ranks.send(rank, fault)
    start = time.monotonic()
    others = [other for other in range(len(ranks.pids)) if other != rank]
    codes = ranks.wait(BOUND, others if fault == signal.SIGSTOP else None)
    late = [f"rank {other} did not end within {BOUND:.0f} s" for other in others if codes[other] is None]
    ended = time.monotonic() - start
    ranks.send(rank, signal.SIGCONT)  # a rank that wakes up must end as well
    codes = ranks.wait(BOUND)
    wrong = [] if over else [*late, *_wrong(ranks, fault, rank, codes, finished)]
    ranks.end()
    return Trial(fault, rank, after, ended, codes, over, wrong)


def _wrong(
    ranks: Ranks, fault: signal.Signals, rank: int, codes: Sequence[int | None], finished: Sequence[str]
) -> Iterator[str]:
    """Yield what a run did not do that it should."""
    lived = [code for other, code in enumerate(codes) if other != rank]
    for other, code in enumerate(codes):
        killed = other == rank and (fault == signal.SIGKILL or not any(lived))  # while Python ended
        if code not in FAULTS[fault] + (-fault,) * killed:
            yield f"rank {other} ended with {code}"
    said = "".join(ranks.err(other) for other in range(len(codes)))
    if any(lived) and not re.search(rf"\b(error: rank {rank}\b|interrupted)", said):
        yield f"nobody names rank {rank}: {said[-200:]!r}"
    if "Traceback" in said:
        yield f"a traceback: {said[said.index('Traceback') :]!r}"
    try:
        cases = results.read(ranks.folder / "run.json").cases if finished else []
    except ResultError as error:
        yield str(error)
        return
    if lost := set(finished) - {case.scenario for case in cases}:
        yield f"the file lacks {', '.join(sorted(lost))}"


def table(trials: Sequence[Trial]) -> str:
    """Return a row for each fault and rank."""
    rows = []
    for fault, rank in sorted({(trial.fault, trial.rank) for trial in trials}):
        every = [trial for trial in trials if (trial.fault, trial.rank) == (fault, rank)]
        some = [trial for trial in every if not trial.over] or every
        bad = sum(bool(trial.wrong) for trial in some)
        worst = f"{max(trial.ended for trial in some):.1f}"
        codes = sorted({str(code) for trial in some for code in trial.codes})
        counts = (len(every), sum(trial.over for trial in every), bad)
        rows.append((fault.name, str(rank), *map(str, counts), worst, " ".join(codes)))
    return markdown(("signal", "to rank", "runs", "over before", "bad", "ended within s", "exit codes"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials, print a table, and return 1 if one was bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="number of runs")
    parser.add_argument("--parallel", default="tp=2", help="layout, of as many ranks as its product")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", default="SIGKILL", help="of SIGKILL,SIGSTOP,SIGTERM,SIGINT")
    asked = parser.parse_args(arguments)
    world = _world(asked.parallel)
    faults = [signal.Signals[name] for name in asked.signals.split(",")]
    generator, trials = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as name, Nursery(whole_end=True) as nursery:
        folder = Path(name)
        write_inputs(folder)
        words = (*WORDS, "--parallel", asked.parallel, "-o", "run.json")
        whole = [undisturbed(nursery, words, folder, world) for _ in range(2)][-1]  # the first is slower
        for number in range(asked.count):
            (folder / "run.json").unlink(missing_ok=True)
            fault, rank = generator.choice(faults), generator.randrange(world)
            done = trial(
                nursery.start(words, folder, world, constants=CONSTANTS),
                fault,
                rank,
                generator.uniform(0, whole),
            )
            trials.append(done)
            note(f"{number + 1} of {asked.count}: {_line(done)}")
    out(table(trials))
    return int(any(trial.wrong for trial in trials))


def _world(layout: str) -> int:
    from mla.parallel.layout import Layout

    return Layout.parse(layout).world


def _line(trial: Trial) -> str:
    what = f"{trial.fault.name} to rank {trial.rank} after {trial.after:.1f} s, ended in {trial.ended:.1f} s"
    return f"{what}, codes {trial.codes}" + "".join(f"; WRONG: {one}" for one in trial.wrong)


if __name__ == "__main__":
    sys.exit(main())
