"""The table of a comparison, in Markdown."""

from __future__ import annotations

from benchmarks.peers.ggml.record import Case, Comparison, Timing, ratio
from mla.bench.terminal.digits import between, known, number
from mla.bench.terminal.tables import bounds
from mla.command import display

HEADER = ("case", "ours, ms", "plain PyTorch, ms", "peer, ms", "ours is")


def markdown(run: Comparison) -> str:
    """Return a row per case: ours, the reference, and the peer's fastest way; then what has no number."""
    facts = run.environment
    peer = f"{run.peer.get('peer', 'peer')} {run.peer.get('commit', 'unknown')[:12]}"
    head = (
        f"{run.backend.device}, {run.threads} threads; ours: {facts.get('backend.kernels', 'unknown')}; "
        f"torch {facts.get('torch')}: {facts.get('backend.cpu_capability')}; "
        f"{peer}: {run.peer.get('instructions', 'unknown')}"
    )
    rows = display.markdown(HEADER, [_row(case) for case in run.cases]).rstrip("\n")
    remarks = [f"{case.name}: {remark}" for case in run.cases for remark in _remarks(case)]
    return "\n\n".join(filter(None, (head, rows, "\n".join(remarks)))) + "\n"


def _row(case: Case) -> list[str]:
    ours, plain, peer = (next(iter(case.of(party)), None) for party in ("ours", "reference", "peer"))
    plain = plain or next(iter(case.of("torch")), None)  # the name in files of before
    cells = [_ms(way) if way else "-" for way in (ours, plain)]
    cells.append(f"{_ms(peer)}, {peer.name.removeprefix('peer ')}" if peer else "-")
    if not (ours and peer):
        return [case.name, *cells, "-"]
    value, interval = ratio(peer, ours)
    return [case.name, *cells, f"{value:.2f}x" + (f" ({bounds(interval, 2)})" if interval else "")]


def _ms(timing: Timing) -> str:
    value = known(timing.ms, timing.ci95)
    return f"{value} ({between(timing.ci95, timing.ms, timing.ci95)})" if timing.ci95 else value


def _remarks(case: Case) -> list[str]:
    """Return which results are wrong, and what was too slow to be timed in every round."""
    wrong = [f"{timing.name} is WRONG, by {timing.error:.1e}" for timing in case.timings if timing.wrong]
    return wrong + [f"{name} took {number(ms)} ms in one trial" for name, ms in case.passed_over.items()]
