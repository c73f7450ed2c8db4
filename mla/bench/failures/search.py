"""Which op of a wrong forward is wrong: the forwards of a pass again, each op judged by float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mla.bench.subjects.base import Implementation
from mla.bench.subjects.op import OpImplementation
from mla.bench.workload.grid import Point
from mla.failures.watch import JudgedCall, Watched, Watcher
from mla.layer.ops import layer_roles


@dataclass(frozen=True)
class Search:
    """What came out of it."""

    wrong: JudgedCall | None
    last: JudgedCall | None  # that was right
    forwards: int  # that were made
    judged: int  # calls of ops in them
    refused: str  # why a call was not judged


def present_pass(one: Implementation) -> int:
    """Return the number of the pass that was wrong, whose inputs are to be used again."""
    number: int = getattr(one, "_number", 0)
    return number


def search(one: Implementation, point: Point, inputs: Any, heartbeat: Callable[[], None]) -> Search:
    """Run an implementation's pass again until an op is wrong; it is of no further use."""
    watcher = Watcher(one.setting.backend.synchronize, heartbeat)
    names, forwards, number = one.facts().ops, 0, present_pass(one)
    roles = layer_roles(one.setting.config, one.setting.dtype, one.setting.device)

    def watched(role: str, op: Any) -> Watched:
        reads_lse = point.op is not None or role != "latent_attention"  # a layer does not read that one
        return Watched(role, names[role], op, watcher, roles[role][1], reads_lse)

    if replace_ops := getattr(one, "replace_ops", None):  # ours
        replace_ops(watched)
    if isinstance(one, OpImplementation):
        one.load(point, inputs)  # its call is bound to the op
    one.restore(number)
    for index in range(point.steps):
        step = index if point.mode == "decode" else 0
        watcher.lengths = (point.query_lens, point.kv_lens(step))
        one.before(index)
        one.meet()
        one.step(index)
        one.after(index)
        forwards += 1
        if watcher.done:
            break
    return Search(watcher.wrong, watcher.last, forwards, watcher.judged, watcher.reason)
