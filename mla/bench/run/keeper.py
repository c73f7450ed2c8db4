"""Keep the first failure of a run: the call of the first op that is wrong, or the layer's tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla.bench.subjects.base import Implementation, LayerImplementation
from mla.bench.subjects.op import OpImplementation
from mla.bench.workload.grid import Point
from mla.cases.memory import Tensors
from mla.command import environment
from mla.command.console import note
from mla.failures import file
from mla.failures.call import MAX_CALL_BYTES, JudgedCall, Watched, Watcher
from mla.layer.ops import layer_roles
from mla.text import counted, size
from mla.verify.layer_check import Forward
from mla.verify.verdict import Check
from mla_backends.errors import describe


@dataclass(frozen=True)
class FailedCase:
    """One implementation of one scenario."""

    point: Point
    inputs: Any
    checker: Any
    command: str  # that repeats it
    heartbeat: Callable[[], None]


@dataclass
class Keeper:
    """Writes the first failure of a run into a folder."""

    folder: Path
    backend: str  # as the user named it
    options: list[str]  # KEY=VALUE, of the backend
    kept: bool = field(default=False, init=False)

    def keep(self, impl: Implementation, check: Check, case: FailedCase) -> None:
        """Keep the failure of an implementation, if it is the first; its cache and inputs are in place.

        Raises nothing: the run has its own verdict.
        """
        if self.kept:
            return
        self.kept = True
        try:
            self._keep(impl, check, case)
        except Exception as error:  # noqa: BLE001  # whatever a backend raises when it is called again
            note(f"--dump-failure kept nothing of {case.point.name}, {impl.name}: {describe(error)}")

    def _keep(self, impl: Implementation, check: Check, case: FailedCase) -> None:
        seen = layer_tensors(impl, case.checker)  # before the search overwrites them
        outcome = search(impl, case.point, case.inputs, case.heartbeat)
        origin = self._origin(impl, check, case)
        path, replay, why = self.folder / file.NAME, file.replay_command(self.folder), not_found(outcome)
        if outcome.wrong is not None:
            file.write_call(self.folder, outcome.wrong, origin)
            facts, what = outcome.wrong.call.facts, "is wrong again"
            if case.point.op is None:
                what = "is the first wrong op of this forward; its inputs were right"
            kept = f"Its call is kept in '{path}'; replay it with: {replay}"
            said = f"{facts.role} (op '{facts.op}') {what}. {kept}"
        elif outcome.last is not None and case.point.op is not None:
            file.write_call(self.folder, outcome.last, origin)
            said = f"{why}. A call is kept in '{path}'; repeat it with: {replay} --runs 1000"
        elif sum(tensor.nbytes for tensor in seen.values()) > MAX_CALL_BYTES:
            said = f"{why}. Nothing is kept: the outputs take more than {size(MAX_CALL_BYTES)}"
        else:
            file.write(self.folder, file.Document(origin=origin, reason=why), seen)
            said = f"{why}. The inputs and outputs of its first wrong forward are kept in '{path}'"
        note(f"{origin.where}: {said}")

    def _origin(self, impl: Implementation, check: Check, case: FailedCase) -> file.Origin:
        backend = impl.setting.backend
        return file.Origin(
            backend=self.backend,
            options=self.options,
            device=str(impl.setting.device),
            command=case.command,
            where=f"{case.point.name}, {impl.name}",
            reason=check.reason,
            seed=impl.setting.seed,
            created=environment.now(),
            git_commit=environment.git_commit(),
            environment={**environment.environment(backend), "argv": " ".join(sys.argv[1:])},
        )


def not_found(outcome: Search) -> str:
    """Return why no op is to blame."""
    if outcome.refused:
        return outcome.refused
    if not outcome.judged:
        return "no call is kept: none of its ops can be judged alone"
    again = f"{counted(outcome.forwards, 'forward')}"
    return (
        f"the failure did not repeat: every op was right in {again} repeated op by op. It may be a race, or "
        "depend on earlier work or a graph"
    )


def layer_tensors(impl: Implementation, checker: Any) -> Tensors:
    """Return what a layer got in its first wrong forward, what it wrote, and what it had to write.

    Of all forwards that were kept the first, if none is wrong alone.
    """
    if not isinstance(impl, LayerImplementation):
        return {}
    chosen: tuple[int, Forward] | None = None
    for index, forward in checker.forwards(impl.left()):  # one by one, for want of memory
        chosen = chosen or (index, forward)
        alone = forward.actual.shape == forward.expected.shape  # of several layers together it cannot be told
        if alone and checker.check_forwards([forward], impl.held_to_reference).status != "ok":
            chosen = index, forward
            break
    if chosen is None:
        return {}
    index, forward = chosen
    outputs = {"output": forward.actual.cpu(), "expected": forward.expected}
    impl.restore(impl.number)
    impl.before(index)
    return {"hidden": impl.x.to("cpu", copy=True), **outputs}


@dataclass(frozen=True)
class Search:
    """What came of running the forwards of a pass again, each op judged by float64."""

    wrong: JudgedCall | None
    last: JudgedCall | None  # that was right
    forwards: int  # that were made
    judged: int  # calls of ops in them
    refused: str  # why a call was not judged


def search(impl: Implementation, point: Point, inputs: Any, heartbeat: Callable[[], None]) -> Search:
    """Run an implementation's pass again until an op is wrong; it is of no further use."""
    watcher = Watcher(impl.setting.backend.synchronize, heartbeat)
    names, forwards, number = impl.facts().ops, 0, impl.number
    roles = layer_roles(impl.setting.config, impl.setting.dtype, impl.setting.device)

    def watched(role: str, op: Any) -> Watched:
        reads_lse = point.op is not None or role != "latent_attention"  # a layer does not read that one
        return Watched(role, names[role], op, watcher, roles[role][1], reads_lse)

    if replace_ops := getattr(impl, "replace_ops", None):  # ours
        replace_ops(watched)
    if isinstance(impl, OpImplementation):
        impl.load(point, inputs)  # its call is bound to the op
    impl.restore(number)
    for index in range(point.steps):
        step = index if point.mode == "decode" else 0
        watcher.lengths = (point.query_lens, point.kv_lens(step))
        impl.before(index)
        impl.meet()
        impl.step(index)
        impl.after(index)
        forwards += 1
        if watcher.done:
            break
    return Search(watcher.wrong, watcher.last, forwards, watcher.judged, watcher.reason)
