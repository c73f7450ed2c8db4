"""Keep the first failure of a run: the call of the first op that is wrong, or the layer's tensors."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla.bench.failures.search import Search, present_pass, search
from mla.bench.subjects.base import Implementation, LayerImplementation
from mla.bench.workload.grid import Point
from mla.cases.memory import Tensors
from mla.command import environment
from mla.command.console import note
from mla.failures import file
from mla.failures.call import LIMIT
from mla.failures.watch import JudgedCall
from mla.text import size
from mla.verify.layer_check import Checker, Forward
from mla.verify.verdict import Check
from mla_backends.errors import describe


@dataclass(frozen=True)
class Case:
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

    def keep(self, one: Implementation, check: Check, case: Case) -> None:
        """Keep the failure of an implementation, if it is the first; its cache and inputs are in place.

        Raises nothing: the run has its own verdict.
        """
        if self.kept:
            return
        self.kept = True
        try:
            self._keep(one, check, case)
        except Exception as error:  # noqa: BLE001  # whatever a backend raises when it is called again
            note(f"--dump-failure kept nothing of {case.point.name}, {one.name}: {describe(error)}")

    def _keep(self, one: Implementation, check: Check, case: Case) -> None:
        seen = layer_tensors(one, case.checker)  # before the search overwrites them
        found = search(one, case.point, case.inputs, case.heartbeat)
        origin = self._origin(one, check, case)
        path, replay = self.folder / file.NAME, file.replay_command(self.folder)
        if found.wrong is not None:
            file.write_call(self.folder, found.wrong, origin)
            said = f"{blame(found.wrong, case.point)} Its call is kept in '{path}'; replay it with: {replay}"
        elif found.last is not None and case.point.op is not None:
            file.write_call(self.folder, found.last, origin)
            said = f"{not_found(found)}. A call is kept in '{path}'; repeat it with: {replay} --runs 1000"
        elif sum(tensor.nbytes for tensor in seen.values()) > LIMIT:
            said = f"{not_found(found)}. Nothing is kept: the outputs take more than {size(LIMIT)}"
        else:
            file.write(self.folder, file.Document(origin=origin, reason=not_found(found)), seen)
            said = (
                f"{not_found(found)}. The inputs and outputs of its first wrong forward are kept in '{path}'"
            )
        note(f"{origin.where}: {said}")

    def _origin(self, one: Implementation, check: Check, case: Case) -> file.Origin:
        backend = one.setting.backend
        return file.Origin(
            backend=self.backend,
            options=self.options,
            device=str(one.setting.device),
            command=case.command,
            where=f"{case.point.name}, {one.name}",
            reason=check.reason,
            seed=one.setting.seed,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            git_commit=environment.git_commit(),
            environment={**environment.environment(backend), "argv": " ".join(sys.argv[1:])},
        )


def blame(wrong: JudgedCall, point: Point) -> str:
    """Return which op is wrong."""
    op = f"{wrong.call.facts.role} (op '{wrong.call.facts.op}')"
    if point.op is not None:
        return f"{op} is wrong again."
    return f"{op} is the first wrong op of this forward; its inputs were right."


def not_found(found: Search) -> str:
    """Return why no op is to blame."""
    if found.refused:
        return found.refused
    if not found.judged:
        return "no op of its forwards can be judged alone, so there is no call to keep"
    again = f"{found.forwards} forward{'s' * (found.forwards > 1)}"
    return (
        f"the failure did not repeat: every op was right in {again} repeated op by op. It may be a race, or "
        "depend on earlier work or a graph"
    )


def layer_tensors(one: Implementation, checker: Any) -> Tensors:
    """Return what a layer got in its first wrong forward, what it wrote, and what it had to write."""
    if not isinstance(one, LayerImplementation):
        return {}
    chosen = first_wrong(one, checker)
    if chosen is None:
        return {}
    index, forward = chosen
    found = {"output": forward.found.cpu(), "expected": forward.expected}
    one.restore(present_pass(one))
    one.before(index)
    return {"hidden": one.x.to("cpu", copy=True), **found}


def first_wrong(one: LayerImplementation, checker: Any) -> tuple[int, Forward] | None:
    """Return the first wrong forward that was collected, or the first of all if none is wrong alone."""
    first = None
    for index, forward in one.forwards(checker):  # one by one: what is expected of all takes much memory
        first = first or (index, forward)
        if is_wrong(forward, one, checker):
            return index, forward
    return first


def is_wrong(forward: Forward, one: LayerImplementation, checker: Checker) -> bool:
    """Return whether one forward alone is wrong; of several layers together that cannot be told."""
    alone = forward.found.shape == forward.expected.shape
    return alone and checker.check_forwards([forward], one.held_to_reference).status != "ok"
