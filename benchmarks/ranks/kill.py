"""Runs over several ranks, of which one is killed at a random moment: `python -m benchmarks.ranks.kill 40`.

A run is good if every rank that lives ends in time with a documented code, says which rank is to blame (or
rank 0 does), leaves no process, and the result file holds every scenario that was finished before.
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
from pathlib import Path

from benchmarks.ranks import processes
from benchmarks.ranks.processes import Ranks
from mla.bench import results
from mla.parallel.layout import Layout

CONFIG = {"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16}
CONFIG |= {"qk_rope_head_dim": 8, "v_head_dim": 16}
SCENARIO = """
[[scenario]]
name = "{}"
mode = "decode"
query_lens = ["1*2"]
history = [{}, 9]
runs = 4
passes = 2
warmups = 1
"""
WORDS = ("--backend", "cpu", "--config", "tiny.json", "--workload", "tiny.toml", "--implementations", "mla")
# What is done to a rank, and the codes that others may end with: 0 where all was over by then.
FAULTS = {signal.SIGKILL: (0, 3), signal.SIGSTOP: (0, 3), signal.SIGTERM: (0, 143), signal.SIGINT: (0, 130)}
TIMEOUT_S = 40.0  # seconds in which all others must end: 20 of silence where one is stopped, and 10 to notice
MEETING = 10.0  # seconds after which ranks miss one that never came: a run waits for two minutes


def write_inputs(folder: Path) -> None:
    """Write the config and a workload of three scenarios."""
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    names = ("short", "middle", "long")
    scenarios = (SCENARIO.format(name, 5 * place + 5) for place, name in enumerate(names))
    (folder / "tiny.toml").write_text("".join(scenarios))


def judge(ranks: Ranks, fault: signal.Signals, rank: int, finished: Sequence[str]) -> Iterator[str]:
    """Yield what a run did not do that it should, after its rank got the signal."""
    others = [other for other in range(len(ranks.pids)) if other != rank]
    start = time.monotonic()
    codes = ranks.wait(TIMEOUT_S, others)
    yield from (f"rank {other} did not end" for other in others if codes[other] is None)
    sys.stderr.write(f"ended after {time.monotonic() - start:.1f} s, codes {codes}")
    ranks.send(rank, signal.SIGCONT)  # a rank that wakes up must end as well
    codes = ranks.wait(TIMEOUT_S)
    over = not any(codes[other] for other in others)  # the others had ended well by then
    for other, code in enumerate(codes):
        if code not in FAULTS[fault] + (-fault,) * (other == rank and (fault == signal.SIGKILL or over)):
            yield f"rank {other} ended with {code}"
    said = "".join(ranks.err(other) for other in range(len(codes)))
    if not over and not re.search(rf"\b(error: rank {rank}\b|interrupted)", said):
        yield f"no process names rank {rank}: {said[-200:]!r}"
    if "Traceback" in said:
        yield f"a traceback: {said[said.index('Traceback') :]!r}"
    kept = {case.scenario for case in results.read(ranks.folder / "run.json").cases} if finished else set()
    if lost := set(finished) - kept:
        yield f"the file lacks {', '.join(sorted(lost))}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials, say how each ended, and return 1 if one was bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="number of runs")
    parser.add_argument("--parallel", type=Layout.parse, default=Layout(tp=2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", default="SIGKILL", help="of SIGKILL,SIGSTOP,SIGTERM,SIGINT")
    asked = parser.parse_args(arguments)
    faults = [signal.Signals[name] for name in asked.signals.split(",")]
    draw, bad, world = random.Random(asked.seed), 0, asked.parallel.world
    processes.prepare()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        words = (*WORDS, "--parallel", str(asked.parallel), "-o", "run.json")
        for _ in range(2):  # the first is slower
            start, ranks = time.monotonic(), processes.start(words, folder, world)
            assert not any(ranks.wait(10 * TIMEOUT_S)), ranks.err()
        whole = time.monotonic() - start
        for number in range(1, asked.count + 1):
            (folder / "run.json").unlink(missing_ok=True)
            fault, rank, after = draw.choice(faults), draw.randrange(world), draw.uniform(0, whole)
            ranks = processes.start(
                words, folder, world, constants={"mla.bench.ranks.launch.MEETING": MEETING}
            )
            ranks.wait(after)
            finished = re.findall(r"^\d+ of \d+  (\w+):", ranks.err(0), re.MULTILINE)
            sys.stderr.write(f"{number} of {asked.count}: {fault.name} to rank {rank} after {after:.1f} s, ")
            ranks.send(rank, fault)
            wrong = list(judge(ranks, fault, rank, finished))
            sys.stderr.write("".join(f"; WRONG: {mistake}" for mistake in wrong) + "\n")
            bad += bool(wrong)
            ranks.end()
    sys.stdout.write(f"{asked.count - bad} of {asked.count} runs ended as they should\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
