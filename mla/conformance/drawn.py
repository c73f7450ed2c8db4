"""Cases of an op that are drawn until the time is up, and the smallest of those that are wrong."""

from __future__ import annotations

import functools
import math
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mla.cases.case import KINDS, OpCase
from mla.conformance.report import Drawn
from mla.conformance.trial import CheckFailed, Drawing, Refused, Trial, ask, raised
from mla.text import dtype_name
from mla_backends.api import FusedOp
from mla_backends.errors import BackendError, plugin_code

if TYPE_CHECKING:
    from mla.cases.drawn import Field, Scene

HOPELESS = 60  # draws one after the other that an op refuses: there is nothing to wait for
SHRINKING = 60.0  # seconds for the search of a smaller case, beside those for drawing
MOST_WORDS = 6  # of an axis, on the card
FOLDER = "drawn"  # of the failures that are kept, in that of `--dump-failure`
RARELY = "the same case was right when it ran again: the op is not always wrong"


class _Wrong(Exception):
    """Ends a draw that is wrong, as hypothesis wants it."""


@dataclass
class Search:
    """The draws of one op in one dtype, and what came of them."""

    trial: Trial
    play: Callable[[Scene], str]
    judged: int = 0
    refused: int = 0
    kept: int = 0  # failures of earlier runs that were played first
    why: str = ""  # it refused
    in_a_row: int = 0
    reusing: bool = False
    wrong: tuple[Scene, str] | None = None  # the smallest so far
    shrink_until: float = math.inf
    seen: set[int] = field(default_factory=set)
    axes: dict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))

    def body(self, scene: Scene) -> None:
        """Play one draw; raise where it is wrong."""
        from mla.cases.drawn import axes

        if time.monotonic() > self.shrink_until:
            return
        key = hash(scene.label)
        if self.wrong is None and not self.reusing and key in self.seen:  # the simplest begins every batch
            return
        self.seen.add(key)
        try:
            with plugin_code():
                reason = self.play(scene)
        except (Refused, BackendError) as why:
            if self.wrong is None:
                self.refused, self.why, self.in_a_row = self.refused + 1, str(why), self.in_a_row + 1
            return
        except Exception as error:  # noqa: BLE001  # whatever an op raises
            reason = raised(error)
        if self.wrong is None:
            self.in_a_row = 0
            self.judged += not self.reusing
            for axis, value in axes(scene):
                self.axes[axis][value] += 1
        if reason:
            if self.wrong is None:
                self.shrink_until = time.monotonic() + SHRINKING
            self.wrong = scene, reason
            raise _Wrong

    def run(self, strategy: Any, seed: int) -> None:
        """Have hypothesis draw a case, and shrink it if it is wrong."""
        import hypothesis

        settings = hypothesis.settings(
            max_examples=2,  # the simplest, and one that is no variation of another
            database=None,  # which a seed would leave unused
            deadline=None,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        test = hypothesis.given(strategy)(lambda scene: self.body(scene))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hypothesis.errors.HypothesisWarning)
                hypothesis.seed(seed)(settings(test))()
        except (_Wrong, hypothesis.errors.Flaky):
            pass


def draw(trial: Trial) -> None:
    """Draw cases for an op, and judge them. Raises `Refused`, or `CheckFailed` for the smallest wrong one."""
    drawing, op = trial.subject.drawing, trial.op
    assert op is not None
    if drawing.count == 0 or (drawing.count is None and drawing.seconds <= 0):
        raise Refused("no cases were to be drawn")
    player = _player(trial, op)
    name = f"{trial.kind}[{trial.name}-{dtype_name(trial.dtype)}]"
    if drawing.again:
        if name in drawing.smallest:
            _fail(drawing.smallest[name], player.play(drawing.smallest[name]), player)
        return
    start, search = time.monotonic(), Search(trial, player.play)
    file = re.sub(r"[^\w.-]+", "-", name) + ".txt"
    _search(search, drawing, field_of(trial, op), drawing.folder and drawing.folder / FOLDER / file)
    trial.drawn = Drawn(
        judged=search.judged,
        refused=search.refused,
        kept=search.kept,
        seed=drawing.seed,
        seconds=round(time.monotonic() - start, 2),
        along={axis: _words(values) for axis, values in search.axes.items()},
    )
    trial.note = f"{search.judged} drawn"
    if search.wrong is not None:
        scene, reason = search.wrong
        drawing.smallest[name] = scene
        _fail(scene, reason, player)
    if not search.judged + search.kept and search.why:
        raise Refused(search.why)


def _search(search: Search, drawing: Drawing, of: Field, kept: Path | None) -> None:
    """Draw what failed before, by the numbers in the file `kept`, and then by numbers from the seed on."""
    from mla.cases.drawn import scenes

    strategy = scenes(of)
    if kept is not None and kept.exists():
        search.reusing = True
        for line in kept.read_text().split():
            if search.wrong is None:
                search.run(strategy, int(line))
                search.kept += 1
        search.reusing = False
    end, number = time.monotonic() + drawing.seconds, drawing.seed * 1_000_003
    while search.wrong is None and search.in_a_row < HOPELESS:
        tried = search.judged + search.refused
        if time.monotonic() >= end if drawing.count is None else tried >= drawing.count:
            break
        search.run(strategy, number)
        if search.wrong is not None and kept is not None:
            kept.parent.mkdir(exist_ok=True)
            with kept.open("a") as file:
                file.write(f"{number}\n")
        number += 1


def _player(trial: Trial, op: FusedOp) -> Any:
    from mla.cases.played import Player

    def require(case: OpCase) -> None:
        trial.require(case.spec, *((case.query_lens, case.kv_lens) if case.entry.prepares else ()))
        if case.entry.prepares:
            size = case.layout.page_size if case.entry.cached else None
            if reasons := op.unsupported_batch(case.spec, case.query_lens, case.kv_lens, size):
                raise Refused("; ".join(reasons))

    return Player(op, require, trial.backend.synchronize)


def field_of(trial: Trial, op: FusedOp) -> Field:
    """Return what is drawn from: what the op serves."""
    from mla.cases.drawn import Field

    def serves(spec: Any) -> bool:
        return not ask(lambda: list(op.unsupported_reasons(spec)), [])

    return Field(trial.kind, trial.dtype, trial.device, functools.cache(serves), bool(op.lse_optional))


def _fail(scene: Scene, reason: str, player: Any) -> None:
    if reason:
        raise CheckFailed("; ".join([f"{scene.label}: {reason}", *hints(scene, player)]))


def hints(scene: Scene, player: Any) -> Iterator[str]:
    """Yield what else is known of a wrong case: what it is right with."""

    def right(other: Scene, unjudged: int = 0) -> bool:
        return ask(lambda: not player.play(other, unjudged), False)

    if right(scene):
        yield RARELY
        return
    once = sum(times for _, times in scene.order) == 1
    if once and right(replace(scene, order=((0, 1), (0, 1))), 1):
        yield "it is right the second time"
    if any(right(replace(scene, held=held)) for held in (math.nan, 0.0, 1.0)):
        yield "it depends on what the output held before"


def _words(values: Counter[Any]) -> str:
    """Return "1 .. 5003", or the most frequent words with their counts."""
    if all(isinstance(value, int) for value in values):
        return f"{min(values)} .. {max(values)} ({len(values)} different)"
    most = [f"{value} {count}" for value, count in values.most_common(MOST_WORDS)]
    return ", ".join(most) + f" and {len(values) - MOST_WORDS} more" * (len(values) > MOST_WORDS)


def usual_spec(kind: str, dtype: torch.dtype, device: torch.device | None) -> Any:
    """Return the spec of an op in a layer as most are."""
    if KINDS[kind].packed:
        return KINDS[kind].spec(128, 96, 4 if kind == "batched_linear" else 1, dtype, device)
    if "features" in KINDS[kind].letters.values():
        return KINDS[kind].spec(512, dtype, device)
    return KINDS[kind].spec(16, 512, 128, 64, 128, 192**-0.5, dtype, device)
