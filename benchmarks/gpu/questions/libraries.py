"""Questions about the other libraries of kernels: which generation is installed, and whether it is right."""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import TYPE_CHECKING

from benchmarks.gpu.questions.asking import Asked, NotHere, library, question, raised
from benchmarks.gpu.questions.flashinfer import outcome
from benchmarks.gpu.questions.latent import LATENT, LatentBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from mla_backends import FusedOp
    from mla_backends.api import Backend


def _versions(*names: str) -> dict[str, object]:
    versions: dict[str, object] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _signature(function: Callable[..., object]) -> str:
    try:
        return str(list(inspect.signature(function).parameters))
    except (TypeError, ValueError):
        return "unknown"


def judged(backend: Backend, op: FusedOp) -> tuple[str, dict[str, object], bool]:
    """Return whether an op of absorbed attention is right, alone and in a graph, and if it is wrong."""
    batch = LatentBatch((1, 1, 1), (65, 700, 20), 16, backend.device)
    spec = batch.spec
    if reasons := op.unsupported_reasons(spec) or op.preflight(spec) or batch.refusals(op):
        return f"not used: {'; '.join(reasons)}", {}, False
    said, wrong = outcome(op, batch)
    return said, {"in a graph": _captured(backend, op, batch)}, wrong


def _captured(backend: Backend, op: FusedOp, batch: LatentBatch) -> str:
    """Return whether a graph can hold a call, and whether its replay is right."""
    out = batch.q.new_zeros(*batch.q.shape[:2], LATENT)
    lse = batch.q.new_zeros(batch.q.shape[:2]).float()
    state, arguments = op.prepare(batch.spec, batch), batch.arguments()
    replays: list[Callable[[], None] | None] = []
    failure = raised(lambda: replays.append(backend.graph(lambda: op(state, **arguments, out=out, lse=lse))))
    if failure or replays[0] is None:
        return failure or "this stack has no graphs"
    out.zero_()
    replays[0]()
    backend.synchronize()
    return f"error {batch.error(out):.1e}"


@question("flash-mla", "Which FlashMLA is installed, is it right, and can it be captured?")
def flash_mla(backend: Backend) -> Asked:
    from mla_backends.kernels import FlashMla

    op = next((op for op in backend.ops().values() if isinstance(op, FlashMla)), None)
    if op is None:
        raise NotHere(f"the {backend.name} backend offers no FlashMLA")
    module = library(op._vendor.name)
    facts: dict[str, object] = {
        **_versions("flash-mla", "flash_mla", "sgl-flash-mla", "mate"),
        "module": str(getattr(module, "__file__", module.__name__)),
        "arguments": _signature(module.flash_mla_with_kvcache),
    }
    if hasattr(module, "has_legacy"):
        facts["has_legacy"] = module.has_legacy()
    said, more, wrong = judged(backend, op)
    return Asked(said, {**facts, **more}, wrong)


@question("tokenspeed", "Which tokenspeed-mla is installed, and is its decode right?", needs_cuda=True)
def tokenspeed(backend: Backend) -> Asked:
    module = library("tokenspeed_mla")
    facts = {
        **_versions("tokenspeed-mla", "nvidia-cutlass-dsl"),
        "decode": _signature(module.tokenspeed_mla_decode),
    }
    latent = "latent_attention"
    ops = backend.ops().items()
    named = [op for name, op in ops if "tokenspeed" in name and op.contract.startswith(latent)]
    if not named:
        return Asked(f"installed, but the {backend.name} backend has no op for it", facts)
    said, more, wrong = judged(backend, named[0])
    return Asked(said, {**facts, **more}, wrong)
