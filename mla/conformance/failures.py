"""`--dump-failure` of the suite: the first check that failed, again, with every call of an op judged."""

from __future__ import annotations

import copy
import dataclasses
import shlex
from pathlib import Path

from mla.command import environment
from mla.command.console import note
from mla.conformance.registry import DRAWN
from mla.conformance.report import CheckResult, Failure
from mla.conformance.selection import split
from mla.conformance.suite import Instance, Suite
from mla.failures import file
from mla.failures.call import Watched, Watcher
from mla_backends.api import Backend, FusedOp
from mla_backends.errors import describe


@dataclasses.dataclass
class Keeper:
    """Writes the first failure of a suite into a folder."""

    folder: Path
    suite: Suite
    kept: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self) -> None:
        """Make the folder before a long run. Raises `ResultError`."""
        file.prepare(self.folder)
        self.suite.subject.drawing.folder = self.folder

    def see(self, instance: Instance, result: CheckResult) -> None:
        """Keep the call that a check's first wrong case found, unless one was kept before. Raises nothing."""
        if self.kept or result.status != "fail":
            return
        case = result.failures[0]
        try:
            self._see(instance, case)
        except Exception as error:  # noqa: BLE001  # whatever a backend raises when it is called again
            note(f"--dump-failure kept nothing of {case.id}: {describe(error)}")

    def _see(self, instance: Instance, case: Failure) -> None:
        drawn = instance.check.fails == DRAWN  # and says what outputs hold before a call
        subject = self.suite.subject
        watcher = Watcher(subject.backend.synchronize, poisons=not drawn)
        op = instance.op and Watched(instance.check.kind, instance.of, instance.op, watcher)
        backend = with_watched_ops(subject.backend, watcher)
        number = split(case.id)[1]
        chosen = None if number is None else frozenset({number})
        again = dataclasses.replace(instance, op=op, chosen=chosen)
        drawing = dataclasses.replace(subject.drawing, again=True)
        again.run(dataclasses.replace(subject, backend=backend, drawing=drawing))
        if watcher.wrong is None:
            why = watcher.reason or "no call of an op in it was wrong when it ran again"
            note(f"--dump-failure kept nothing of {case.id}: {why}")
            return
        self.kept = True
        file.write_call(self.folder, watcher.wrong, self._origin(case))
        note(
            f"{case.id}: the first wrong call is kept in '{self.folder / file.NAME}'; replay it with: "
            f"{file.replay_command(self.folder)}"
        )

    def _origin(self, case: Failure) -> file.Origin:
        subject, options = self.suite.subject, self.suite.options
        return file.Origin(
            backend=subject.name,
            options=list(options.backend_options),
            device=str(subject.backend.device),
            command=shlex.join([*options.alone, "--only", case.id]),
            where=case.id,
            reason=case.reason,
            created=environment.now(),
            git_commit=environment.git_commit(),
            environment=environment.environment(subject.backend),
        )


def with_watched_ops(backend: Backend, watcher: Watcher) -> Backend:
    """Return the backend with ops that are watched, called one by one."""
    watched: dict[str, FusedOp] = {
        name: Watched(op.contract.partition("/")[0], name, op, watcher) for name, op in backend.ops().items()
    }
    twin = copy.copy(backend)
    twin.ops = lambda: watched  # type: ignore[method-assign]  # of this twin alone
    twin.sequence = lambda calls, moving: None  # type: ignore[method-assign]
    return twin
