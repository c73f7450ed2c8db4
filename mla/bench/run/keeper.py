"""Keep the first failure of a run: the call of the first op that is wrong, or the layer's tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla.bench.subjects.base import Implementation, LayerImplementation
from mla.bench.subjects.fixture import Fixture
from mla.bench.subjects.op import OpImplementation
from mla.bench.workload.grid import Point
from mla.cases.memory import Tensors
from mla.command import environment
from mla.command.console import note
from mla.failures import file
from mla.failures.call import MAX_CALL_BYTES, Watched, Watcher
from mla.layer.ops import layer_roles
from mla.text import counted, size
from mla.verify.layer_check import Forward
from mla.verify.verdict import Check
from mla_backends.errors import describe


@dataclass
class Keeper:
    """Writes the first failure of a run into a folder."""

    folder: Path
    backend: str  # as the user named it
    options: list[str]  # KEY=VALUE, of the backend
    kept: bool = field(default=False, init=False)

    def keep(
        self, impl: Implementation, check: Check, fixture: Fixture, command: str, beat: Callable[[], None]
    ) -> None:
        """Keep the failure of an implementation, if it is the first; its cache and inputs are in place.

        `command`: that repeats the case. Raises nothing: the run has its own verdict.
        """
        if self.kept:
            return
        self.kept = True
        where = f"{fixture.point.name}, {impl.name}"
        backend = impl.setting.backend
        try:
            origin = file.Origin(
                backend=self.backend,
                options=self.options,
                device=str(impl.setting.device),
                command=command,
                where=where,
                reason=check.reason,
                seed=impl.setting.seed,
                created=environment.now(),
                git_commit=environment.git_commit(),
                environment={**environment.environment(backend), "argv": " ".join(sys.argv[1:])},
            )
            note(f"{where}: {self._keep(impl, fixture, origin, beat)}")
        except Exception as error:  # noqa: BLE001  # whatever a backend raises when it is called again
            note(f"--dump-failure kept nothing of {where}: {describe(error)}")

    def _keep(
        self, impl: Implementation, fixture: Fixture, origin: file.Origin, beat: Callable[[], None]
    ) -> str:
        """Write what can be kept, and return what that is."""
        inputs, checker = fixture.prepare()
        seen = layer_tensors(impl, checker)  # before the search overwrites them
        watcher, forwards = search(impl, fixture.point, inputs, beat)
        path, replay = self.folder / file.NAME, file.replay_command(self.folder)
        if (wrong := watcher.wrong) is not None:
            file.write_call(self.folder, wrong, origin)
            what = "is wrong again"
            if fixture.op is None:
                what = "is the first wrong op of this forward; its inputs were right"
            kept = f"Its call is kept in '{path}'; replay it with: {replay}"
            return f"{wrong.call.facts.role} (op '{wrong.call.facts.op}') {what}. {kept}"
        why = watcher.reason or "no call is kept: none of its ops can be judged alone"
        if watcher.judged and not watcher.reason:
            why = (
                f"the failure did not repeat: every op was right in {counted(forwards, 'forward')} repeated "
                "op by op. It may be a race, or depend on earlier work or a graph"
            )
        if watcher.last is not None and fixture.op is not None:
            file.write_call(self.folder, watcher.last, origin)
            return f"{why}. A call is kept in '{path}'; repeat it with: {replay} --runs 1000"
        if sum(tensor.nbytes for tensor in seen.values()) > MAX_CALL_BYTES:
            return f"{why}. Nothing is kept: the outputs take more than {size(MAX_CALL_BYTES)}"
        file.write(self.folder, file.Document(origin=origin, reason=why), seen)
        return f"{why}. The inputs and outputs of its first wrong forward are kept in '{path}'"


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


def search(
    impl: Implementation, point: Point, inputs: Any, heartbeat: Callable[[], None]
) -> tuple[Watcher, int]:
    """Run an implementation's pass again until an op is wrong; it is of no further use.

    Return what judged every op by float64, and how many forwards were made.
    """
    watcher = Watcher(impl.setting.backend.synchronize, heartbeat)
    names, number, forwards = impl.facts().ops, impl.number, 0
    roles = layer_roles(impl.setting.config, impl.setting.dtype, impl.setting.device)

    def watched(role: str, op: Any) -> Watched:
        reads_lse = point.op is not None or role != "latent_attention"  # a layer does not read that one
        return Watched(role, names[role], op, watcher, roles[role][1], reads_lse)

    if replace_ops := getattr(impl, "replace_ops", None):  # ours
        replace_ops(watched)
    if isinstance(impl, OpImplementation):
        impl.load(point, inputs)  # its call is bound to the op
    impl.restore(number)
    while forwards < point.steps and not watcher.done:
        watcher.lengths = (point.query_lens, point.kv_lens(forwards if point.mode == "decode" else 0))
        impl.before(forwards)
        impl.meet()
        impl.step(forwards)
        impl.after(forwards)
        forwards += 1
    return watcher, forwards
