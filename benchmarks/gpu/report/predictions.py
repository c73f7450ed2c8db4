"""What the model of key steps predicted of our kernels, beside what a card has shown: is the model right?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.report import in_turns
from benchmarks.gpu.report.targets import LARGE_BYTES, Evidence, own_decodes
from benchmarks.triton.cards import CARDS, card_of, read, spoken
from mla.bench.results.schema import Case, Run

HEADER = ("shape", "bound by", "share of", "predicted", "measured", "verdict")
NOTE = """\
Predicted from machine code, before any card was there: `benchmarks/triton/model.md`. Shares are of the data
sheet's peaks, not of measured ceilings, and of the plugin's own tiles: one that was tuned may be *above*.
Otherwise, *above*: the model is wrong. *below*: what it leaves out costs more than it allows for, such as
latencies, bank conflicts and a clock below boost.
"""


def rows(rivals: Mapping[str, Run], device: str) -> list[list[str]]:
    """Return a row under `HEADER` per large shape of ours that a prediction is of; none on other cards."""
    card = card_of(device)
    triton = next((run.environment.get("triton") for run in rivals.values()), None)
    predicted = {row["launch"]: row for row in _newest(card, triton)}
    cases = own_decodes(Evidence(rivals=rivals))
    large = ((case, predicted.get(f"latent: {case.heads} heads")) for case in cases)
    return [
        _row(card, case, row) for case, row in large if row and case.cost.bytes >= LARGE_BYTES and _ms(case)
    ]


def _newest(card: str, triton: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the card's predictions with the version of Triton that ran, or else with the newest."""
    there = [row for row in read()["rows"] if row["card"] == card and "error" not in row]
    same = [row for row in there if row["triton"].split(".")[:2] == str(triton).split(".")[:2]]
    yield from same or (row for row in there if row["triton"] == there[0]["triton"])


def _row(card: str, case: Case, predicted: Mapping[str, Any]) -> list[str]:
    ms, memory = _ms(case), predicted["bound"] == "memory"
    peak = CARDS[card].gigabytes * 1e9 if memory else CARDS[card].tflops() * 1e12
    low, high = predicted["bandwidth_share" if memory else "tensor_share"]
    share = (case.cost.bytes if memory else case.cost.flops) / ms * 1e3 / peak
    verdict = "below" if share < low else "above" if share > high else "as predicted"
    of = "bandwidth" if memory else "tensor peak"
    return [case.scenario, predicted["bound"], of, spoken((low, high)), f"{100 * share:.0f} %", verdict]


def _ms(case: Case) -> float:
    best = in_turns.best_way(case)
    return best[1] if best else 0.0
