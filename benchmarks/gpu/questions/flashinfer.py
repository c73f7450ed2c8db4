"""Questions about FlashInfer's absorbed attention: where it is wrong, what plans cost, what compiles."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.questions.asking import Asked, NotHere, library, microseconds, question, raised
from benchmarks.gpu.questions.latent import LATENT, ROTARY, LatentBatch
from mla_backends.errors import describe, one_line

if TYPE_CHECKING:
    from mla_backends import FusedOp
    from mla_backends.api import Backend

BOUND = 2e-2  # relative error of a row, as the runner's for bfloat16
# Heads -> the smallest request that loses a key if the causal bound of a cut query is rounded down: that
# of heads which do not divide a tile of 128 rows. 16 is the control.
CUT = {16: (7, 65), 20: (7, 65), 40: (4, 65), 48: (3, 65), 96: (2, 65)}
ASK = Path(__file__).resolve().parents[1] / "ask.py"
CHILD_SECONDS = 45  # of each of the two processes that `flashinfer-compiler` starts
LATE = f"did not answer within {CHILD_SECONDS} s"


def adapter(backend: Backend) -> FusedOp:
    """Return the backend's op, or one of our own. Raises `NotHere` without the library."""
    from mla_backends.kernels import FlashInferMla

    library("flashinfer.mla")
    ops = [op for op in backend.ops().values() if isinstance(op, FlashInferMla)]
    return ops[0] if ops else FlashInferMla()


def outcome(op: FusedOp, batch: LatentBatch, requests: list[int] | None = None) -> tuple[str, bool]:
    """Return what an op makes of a batch, and whether it is wrong without having been refused."""
    refused = bool(batch.refusals(op))
    try:
        error = batch.error(batch.run(op)[0], requests)
    except Exception as failure:  # noqa: BLE001  # what the library raises is the answer
        said, bad = one_line(describe(failure)), True
    else:
        bad = not error <= BOUND
        said = f"error {error:.1e}" + " (wrong)" * bad
    return said + "; refused beforehand" * refused, bad and not refused


def _several(op: FusedOp, batches: Mapping[str, LatentBatch]) -> Asked:
    return _verdict({name: outcome(op, batch) for name, batch in batches.items()})


def _verdict(outcomes: Mapping[str, tuple[str, bool]]) -> Asked:
    wrong = [name for name, (_, unnoticed) in outcomes.items() if unnoticed]
    noticed = [name for name, (text, _) in outcomes.items() if "refused" in text]
    said = (
        f"wrong or failing without a refusal: {', '.join(wrong)}" if wrong else "nothing wrong goes unnoticed"
    )
    refused = f"; refused beforehand: {', '.join(noticed)}" if noticed else ""
    return Asked(said + refused, {name: text for name, (text, _) in outcomes.items()}, wrong=bool(wrong))


@question(
    "flashinfer-heads", "Is a key lost with heads that do not divide a tile of 128 rows?", needs_cuda=True
)
def heads(backend: Backend) -> Asked:
    device = backend.device
    batches = {f"{count} heads": LatentBatch((q,), (kv,), count, device) for count, (q, kv) in CUT.items()}
    return _several(adapter(backend), batches)


@question("flashinfer-pages", "Are pages read rightly beyond 2^31 bytes and elements?", needs_cuda=True)
def pages(backend: Backend) -> Asked:
    op, free = adapter(backend), backend.memory().free
    page = 64 * (LATENT + 64)
    wanted = {"2^31 bytes": (1 << 31) // (2 * page) + 8, "2^31 elements": (1 << 31) // page + 8}
    need = 2 * page * (max(wanted.values()) + 64)
    if free is not None and free < need * 1.1:
        raise NotHere(f"needs {need >> 20} MiB of free memory, and {free >> 20} are free")
    batch = LatentBatch((1, 2), (130, 70), 16, backend.device)
    return _several(op, {name: replace(batch, first_page=page) for name, page in wanted.items()})


@question("flashinfer-split", "How large is the error of a context of 64k that is split?", needs_cuda=True)
def split(backend: Backend) -> Asked:
    batches = {f"{keys} keys": LatentBatch((1,), (keys,), 16, backend.device) for keys in (1024, 65536)}
    asked = _several(adapter(backend), batches)
    return Asked(", ".join(f"{name}: {text}" for name, text in asked.evidence.items()), {}, asked.wrong)


@question("flashinfer-plan", "What does a plan cost the host, and does the library warn?", needs_cuda=True)
def plan(backend: Backend) -> Asked:
    op, times = adapter(backend), {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows, keys in ((16, 1024), (128, 4096)):
            batch = LatentBatch((1,) * rows, (keys,) * rows, 128, backend.device, shared=True)
            op.prepare(batch.spec, batch)
            name = f"{rows} requests of {keys} us"
            times[name] = microseconds(backend, lambda b=batch: op.prepare(b.spec, b), calls=8)  # type: ignore[misc]
    texts = sorted({one_line(str(warning.message))[:160] for warning in caught})
    said = ", ".join(f"{name[:-3]}: {us} us" for name, us in times.items())
    return Asked(f"{said}; {len(texts)} warnings", {**times, "warnings": "; ".join(texts) or "none"})


@question("flashinfer-graph", "Can a wrapper be planned again between replays of one graph?", needs_cuda=True)
def graph(backend: Backend) -> Asked:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # flat tables, which all releases take so far
        return _planned_between_replays(backend)


def _planned_between_replays(backend: Backend) -> Asked:
    rows, most = 4, 16
    long, short = (
        LatentBatch((1,) * rows, (keys,) * rows, 16, backend.device, pages_each=most) for keys in (1024, 65)
    )
    wrapper, out = _graph_wrapper(backend, rows, rows * most), long.q.new_zeros(rows, 16, LATENT)
    q_nope, q_pe = long.q.split((LATENT, ROTARY), -1)
    ckv, kpe = long.cache.split((LATENT, ROTARY), -1)

    def forward() -> None:
        wrapper.run(q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv, kpe_cache=kpe, out=out)

    wrapper.plan(**_flat(long))
    replay = backend.graph(forward)
    if replay is None:
        raise NotHere("this stack captures no graphs")
    errors = {}
    for name, batch in (("long", long), ("short", short), ("long again", long)):
        wrapper.plan(**_flat(batch))
        replay()
        backend.synchronize()
        errors[name] = batch.error(out)
    cost = microseconds(backend, lambda: wrapper.plan(**_flat(short)), calls=8)
    right = all(error <= BOUND for error in errors.values())
    return Asked("yes" if right else "no, replays are wrong", {**errors, "plan us": cost})


def _graph_wrapper(backend: Backend, rows: int, pages: int) -> Any:
    """Return a wrapper with memory of its own for the tables of a graph."""
    import torch

    from mla_backends.kernels.flashinfer import CLASS

    sizes = {"qo_indptr": rows + 1, "kv_indptr": rows + 1, "kv_indices": pages, "kv_len_arr": rows}
    tables = {
        name: torch.zeros(size, dtype=torch.int32, device=backend.device) for name, size in sizes.items()
    }
    space = torch.zeros(128 << 20, dtype=torch.uint8, device=backend.device)
    return getattr(library("flashinfer.mla"), CLASS)(space, use_cuda_graph=True, backend="auto", **tables)


def _flat(batch: LatentBatch) -> dict[str, Any]:
    """Return a plan's arguments."""
    import torch

    pages, spec = batch.pages, batch.spec
    counts = torch.tensor([0, *(len(owned) for owned in pages)])
    return {
        "qo_indptr": batch.cu_q.cpu(),
        "kv_indptr": counts.cumsum(0).int(),
        "kv_indices": torch.tensor([page for owned in pages for page in owned], dtype=torch.int32).to(
            batch.device
        ),
        "kv_len_arr": torch.tensor(batch.kv_lens, dtype=torch.int32),
        "num_heads": spec.num_heads,
        "head_dim_ckv": spec.kv_lora_rank,
        "head_dim_kpe": spec.qk_rope_head_dim,
        "page_size": batch.page_size,
        "causal": True,
        "sm_scale": spec.softmax_scale,
        "q_data_type": spec.dtype,
        "kv_data_type": spec.dtype,
    }


@question("flashinfer-first", "How long does the first plan of a process take?", needs_cuda=True)
def first_plan(backend: Backend) -> Asked:
    op, batch = adapter(backend), LatentBatch((1,), (65,), 16, backend.device)
    began = time.monotonic()
    failure = raised(lambda: batch.run(op))
    return Asked(failure or f"{time.monotonic() - began:.1f} s", wrong=bool(failure))


@question("flashinfer-compiler", "Without a compiler, is FlashInfer refused before a run?", needs_cuda=True)
def compiler(backend: Backend) -> Asked:
    library("flashinfer.mla")
    with tempfile.TemporaryDirectory() as empty:
        bare = {"PATH": empty, "FLASHINFER_WORKSPACE_BASE": empty, "CUDA_HOME": "", "CUDA_PATH": ""}
        env = {**os.environ, **bare}
        ran = _child([str(ASK), "flashinfer-first", "--backend", backend.name], env)
        listed = _child(["-m", "mla.bench", "--backend", backend.name, "--list-ops"], env)
    line = next((entry for entry in listed.splitlines() if "latent_attention" in entry), listed)
    works = '"answer":"' in ran and " s" in ran.rpartition('"answer":"')[2][:8]
    chosen = "flashinfer" in line.partition("(")[0]
    said = "it works without one" if works else "no plan without one"
    if ran == LATE:
        said = f"the first plan took more than {CHILD_SECONDS} s, so it may have found a compiler"
    list_says = f"--list-ops {'chooses' if chosen else 'does not choose'} it"
    return Asked(
        f"{said}; {f'--list-ops {LATE}' if listed == LATE else list_says}",
        {"plan": ran[-300:], "list-ops": one_line(line)[:300]},
        wrong=chosen and not works and ran != LATE,
    )


def _child(words: list[str], env: Mapping[str, str]) -> str:
    """Return what a process prints, or `LATE`."""
    command = [sys.executable, *words]
    try:
        done = subprocess.run(
            command, env=dict(env), capture_output=True, text=True, timeout=CHILD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return LATE
    return done.stdout.strip() or done.stderr.strip()


@question(
    "flashinfer-items", "Is a plan of more than 16384 work items wrong, and is it refused?", needs_cuda=True
)
def items(backend: Backend) -> Asked:
    op = adapter(backend)
    batches = {
        f"{rows} requests": LatentBatch((1,) * rows, (65,) * rows, 16, backend.device, shared=True)
        for rows in (8192, 16_385, 17_500)
    }
    outcomes = {}
    for name, batch in batches.items():
        rows = len(batch.kv_lens)
        outcomes[name] = outcome(op, batch, [0, 1, rows // 2, *range(rows - 8, rows)])
    return _verdict(outcomes)
