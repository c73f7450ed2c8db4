"""The tables of a comparison: for a terminal, and in Markdown for a page of results."""

from __future__ import annotations

from benchmarks.peers.ggml.record import Case, Comparison, Timing, ratio
from mla.bench.terminal.digits import between, known, number
from mla.bench.terminal.tables import bounds
from mla.command import display

# Op -> title of its table, and of its last column but one.
_TITLES = {
    "attention": ("decode attention alone", "ours is"),
    "selection": ("selection of latents alone", "ours is"),
    "product": ("products alone", "% of best fp32"),
}


def render(run: Comparison) -> str:
    """Return every way of every case."""
    parts = [_header(run)]
    for op, (title, last) in _TITLES.items():
        if rows := [row for case in run.cases if case.op == op for row in _rows(case, run)]:
            head = ["case", "way", "ms (95 %)", "GFLOP/s", last, "error"]
            parts.append(f"{title}:\n{display.aligned(head, rows, head)}".rstrip("\n"))
    if best := run.best_fp32():
        parts.append(f"best fp32 product of any shape: {best[0]:.0f} GFLOP/s ({best[1]})")
    if remarks := _remarks(run):
        parts.append("\n".join(remarks))
    return "\n\n".join(parts) + "\n"


def _header(run: Comparison) -> str:
    facts = run.environment
    peer = f"{run.peer.get('peer', 'peer')} {run.peer.get('commit', 'unknown')[:12]}"
    return (
        f"{run.backend.device}, {run.threads} threads; ours: {facts.get('backend.kernels', 'unknown')}; "
        f"torch {facts.get('torch')}: {facts.get('backend.cpu_capability')}; "
        f"{peer}: {run.peer.get('instructions', 'unknown')}"
    )


def _rows(case: Case, run: Comparison) -> list[list[str]]:
    """Return a row per way: ours, then the rest from fast to slow."""
    ours, best = next(iter(case.of("ours")), None), run.best_fp32()
    rows: list[list[str]] = []
    for timing in sorted(case.timings, key=lambda timing: (timing.party != "ours", timing.ms)):
        rate = case.rate(timing)
        last = _share(rate, best) if case.op == "product" else _times(timing, ours)
        error = f"{timing.error:.1e}{' WRONG' if timing.wrong else ''}"
        rows.append(["" if rows else case.name, timing.name, _ms(timing), number(rate), last, error])
    return rows


def _ms(timing: Timing) -> str:
    value = known(timing.ms, timing.ci95)
    return f"{value} ({between(timing.ci95, timing.ms, timing.ci95)})" if timing.ci95 else value


def _times(other: Timing, ours: Timing | None) -> str:
    """Return how many times as fast ours is as another way, with the interval of the ratio."""
    if ours is None or other is ours or other.wrong:
        return "-"
    value, interval = ratio(other, ours)
    return f"{value:.2f}x" + (f" ({bounds(interval, 2)})" if interval else "")


def _share(rate: float, best: tuple[float, str] | None) -> str:
    return f"{100 * rate / best[0]:.0f}" if best else "-"


def _remarks(run: Comparison) -> list[str]:
    """Return what was not timed, and why; a reason that many cases share is said once."""
    cases: dict[str, list[str]] = {}
    for case in run.cases:
        for note in case.notes:
            cases.setdefault(note, []).append(case.name)
        if slow := [f"{name} {number(ms)} ms" for name, ms in case.passed_over.items()]:
            cases[f"too slow to be timed in every round, one trial: {', '.join(slow)}"] = [case.name]
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {remark}"
        for remark, names in cases.items()
    ]


def markdown(run: Comparison) -> str:
    """Return one row per case: ours, the plain reference, and the fastest way of every other party."""
    parts, best = [_header(run)], run.best_fp32()
    if rest := [_timed_row(case) for case in run.cases if case.op != "product"]:
        head = ["case", "ours, ms", "plain PyTorch, ms", "peer, ms", "ours is"]
        parts.append(display.markdown(head, rest).rstrip("\n"))
    if products := [_product_row(case, best) for case in run.cases if case.op == "product"]:
        limit = f", and the share of the best fp32 product: {best[0]:.0f} ({best[1]})" if best else ""
        table = display.markdown(["case", "ours", "torch", "peer"], products).rstrip("\n")
        parts += [f"GFLOP/s{limit}", table]
    return "\n\n".join(parts) + "\n"


def _timed_row(case: Case) -> list[str]:
    ours, plain, peer = (next(iter(case.of(party)), None) for party in ("ours", "reference", "peer"))
    cells = [_ms(way) if way else "-" for way in (ours, plain)]
    cells.append(f"{_ms(peer)}, {peer.name.removeprefix('peer ')}" if peer else "-")
    return [case.name, *cells, _times(peer, ours) if peer else "-"]


def _product_row(case: Case, best: tuple[float, str] | None) -> list[str]:
    cells = []
    for party in ("ours", "torch", "peer"):
        ways = case.of(party)
        if party == "ours":  # what a bf16 layer runs, where the case has such a way
            ways = [way for way in ways if way.dtype == "bfloat16"] or ways
        fastest = next(iter(ways), None)
        rate = case.rate(fastest) if fastest else 0.0
        share = f" ({_share(rate, best)} %)" if best else ""
        cells.append(f"{number(rate)}{share}, {fastest.name}" if fastest else "-")
    return [case.name, *cells]
