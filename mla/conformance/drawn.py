"""Cases of an op that are drawn until the time is up, and the smallest of those that are wrong."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla.cases.played import Player, Scene
from mla.command.console import note
from mla.conformance.report import Drawn
from mla.conformance.trial import CheckFailed, Drawing, Refused, Trial, ask, raised
from mla_backends.api import FusedOp, claimed_formats
from mla_backends.errors import BackendError, describe, plugin_code

if TYPE_CHECKING:
    from mla.cases.drawn import Field

# Draws in a row that come to nothing, and of all per judged one, after which there is nothing to wait for.
HOPELESS, SHARE = 60, 20
SHRINKING = 60.0  # seconds for the search of a smaller case, beside those for drawing
BYTES = 1 << 13  # that a case is made of, at most
MOST_WORDS = 6  # of an axis, on the card
FORMAT = "draws-5"  # first in a file of numbers; raise it where `mla.cases.drawn` makes other cases of them
FOLDER = "drawn"  # of the failures that are kept, in that of `--dump-failure`
RARELY = "the same case was right when it ran again: the op is not always wrong"


class _Wrong(Exception):
    """Ends a draw that is wrong, as hypothesis wants it."""


@dataclass
class Search:
    """The draws of one op in one dtype, and what came of them."""

    strategy: Any  # of scenes
    play: Callable[[Scene], str]
    judged: int = 0
    refused: int = 0
    kept: int = 0  # failures of earlier runs that were played first
    why: str = ""  # it refused
    wasted: int = 0  # draws that were refused, or were there before
    in_a_row: int = 0  # that were wasted
    reusing: bool = False
    wrong: tuple[Scene, str] | None = None  # the smallest so far
    shrink_until: float = math.inf
    seen: set[Scene] = field(default_factory=set)
    axes: dict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))

    def body(self, scene: Scene) -> None:
        """Play one draw; raise where it is wrong."""
        from mla.cases.drawn import axes

        if time.monotonic() > self.shrink_until:
            return
        if self.wrong is None and not self.reusing:
            if scene in self.seen:
                return
            self.seen.add(scene)
        try:
            with plugin_code():
                reason = self.play(scene)
        except (Refused, BackendError) as why:
            if self.wrong is None:
                self.refused, self.why = self.refused + 1, str(why)
            return
        except Exception as error:  # noqa: BLE001  # whatever an op raises
            reason = raised(error)
        if self.wrong is None:
            if not self.reusing:
                self.judged, self.wasted, self.in_a_row = self.judged + 1, self.wasted - 1, 0
            for axis, value in axes(scene):
                self.axes[axis][value] += 1
        if reason:
            if self.wrong is None:
                self.shrink_until = time.monotonic() + SHRINKING
            self.wrong = scene, reason
            raise _Wrong

    @property
    def hopeless(self) -> bool:
        """Whether hardly anything is left that the op serves."""
        return self.in_a_row >= HOPELESS and self.wasted > SHARE * self.judged

    @functools.cached_property
    def _test(self) -> Any:
        """The body as a test of hypothesis, which shrinks what its database has: what failed as bytes."""
        import hypothesis
        from hypothesis.database import InMemoryExampleDatabase

        settings = hypothesis.settings(
            database=InMemoryExampleDatabase(),
            deadline=None,
            phases=[hypothesis.Phase.reuse, hypothesis.Phase.shrink],
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        return settings(hypothesis.given(self.strategy)(lambda scene: self.body(scene)))

    @functools.cached_property
    def _play_bytes(self) -> Callable[[bytes], object]:
        """Draws and plays a case of bytes, several times as fast as a run of the test."""
        play: Callable[[bytes], object] = self._test.hypothesis.fuzz_one_input
        return play

    def run(self, number: int) -> None:
        """Draw a case by its number, and have hypothesis shrink it if it is wrong."""
        import hypothesis

        if not self.reusing:
            self.wasted, self.in_a_row = self.wasted + 1, self.in_a_row + 1  # until it is judged
        ends = contextlib.suppress(_Wrong, hypothesis.errors.Flaky)
        with ends:
            self._play_bytes(random.Random(number).randbytes(BYTES))
        if self.wrong is None:
            return
        with ends, warnings.catch_warnings():
            warnings.simplefilter("ignore", hypothesis.errors.HypothesisWarning)
            self._test()


def draw(trial: Trial) -> None:
    """Draw cases for an op, and judge them. Raises `Refused`, or `CheckFailed` for the smallest wrong one."""
    drawing, op = trial.subject.drawing, trial.op_of_contract()
    if drawing.count == 0:
        raise Refused("no cases were to be drawn")
    from mla.cases.drawn import scenes

    player = Player(op, trial.require_case)
    name = f"{trial.check.kind}[{trial.brackets}]"
    if drawing.again:
        if name in drawing.smallest:
            _fail(drawing.smallest[name], player.play(drawing.smallest[name]), player)
        return
    start, search = time.monotonic(), Search(scenes(field_of(trial, op)), player.play)
    file = re.sub(r"[^\w.-]+", "-", name) + ".txt"
    _search(search, drawing, drawing.folder and drawing.folder / FOLDER / file)
    end = min(time.monotonic(), search.shrink_until - SHRINKING)
    trial.drawn = Drawn(
        judged=search.judged,
        refused=search.refused,
        kept=search.kept,
        seed=drawing.seed,
        seconds=round(end - start, 2),
        along={axis: _words(values) for axis, values in search.axes.items()},
    )
    trial.note = f"{search.judged} drawn"
    if search.wrong is not None:
        scene, reason = search.wrong
        drawing.smallest[name] = scene
        _fail(scene, reason, player)
    if not search.judged + search.kept and search.why:
        raise Refused(search.why)


def _search(search: Search, drawing: Drawing, kept: Path | None) -> None:
    """Draw what failed before, by the numbers in the file `kept`, and then by numbers from the seed on.

    However short the time, a case is judged if the op serves any: no check ends as refused for lack of time.
    """
    search.reusing, numbers = True, kept_numbers(kept) if kept is not None else []
    for number in numbers:
        if search.wrong is None:
            search.run(number)
            search.kept += 1
    search.reusing = False
    start, number, drawn, longest = time.monotonic(), drawing.seed * 1_000_003, 0.0, 0.0
    while search.wrong is None and not search.hopeless:
        seconds = drawing.seconds if search.judged >= drawing.least else drawing.most
        late = drawn + longest >= seconds and search.judged > 0  # one may take as long as any before it
        if late if drawing.count is None else search.judged >= drawing.count:
            break
        search.run(number)
        before, drawn = drawn, time.monotonic() - start
        longest = max(longest, drawn - before)
        if search.wrong is not None and kept is not None:
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text("".join(f"{line}\n" for line in (FORMAT, *numbers, number)))
            except OSError as error:
                note(f"'{kept}' cannot be written, so that draw {number} is not kept: {describe(error)}.")
        number += 1


def kept_numbers(file: Path) -> list[int]:
    """Return the numbers of draws that failed before; why a file is ignored is said on stderr."""
    try:
        kept, *numbers = (file.read_text() if file.exists() else "").split() or [FORMAT]
        if kept == FORMAT:
            return list(dict.fromkeys(map(int, numbers)))
        why = "the suite that wrote it drew other cases"
    except (OSError, ValueError) as error:
        why = describe(error)
    note(f"'{file}' is ignored, so that no earlier failure comes first: {why}.")
    return []


def field_of(trial: Trial, op: FusedOp) -> Field:
    """Return what is drawn from: what the op serves."""
    from mla.cases.drawn import Field

    @functools.cache
    def serves(spec: Any) -> bool:
        return not ask(lambda: list(op.unsupported_reasons(spec)), [])

    @functools.lru_cache(4096)
    def takes(spec: Any, new: tuple[int, ...], keys: tuple[int, ...], page: int | None) -> bool:
        return not ask(lambda: list(op.unsupported_batch(spec, new, keys, page)), [])

    formats = tuple(f"{name}0.5" if name.endswith(":") else name for name in claimed_formats(op))
    return Field(trial.check.kind, trial.dtype, trial.device, serves, bool(op.lse_optional), takes, formats)


def _fail(scene: Scene, reason: str, player: Player) -> None:
    if reason:
        raise CheckFailed("; ".join([f"{scene.label}: {reason}", *hints(scene, player)]))


def hints(scene: Scene, player: Player) -> Iterator[str]:
    """Yield what else is known of a wrong case: what it is right with."""

    def right(other: Scene, unjudged: int = 0) -> bool:
        return ask(lambda: not player.play(other, unjudged), False)

    if right(scene):
        yield RARELY
        return
    if scene.calls == 1 and right(replace(scene, order=((0, 1), (0, 1))), 1):
        yield "it is right the second time"
    if any(right(replace(scene, held=held)) for held in (math.nan, 0.0, 1.0)):
        yield "it depends on what the output held before"


def _words(values: Counter[Any]) -> str:
    """Return "1 .. 5003", or the most frequent words with their counts."""
    if all(isinstance(value, int) for value in values):
        return f"{min(values)} .. {max(values)} ({len(values)} different)"
    most = [f"{value} {count}" for value, count in values.most_common(MOST_WORDS)]
    return ", ".join(most) + f" and {len(values) - MOST_WORDS} more" * (len(values) > MOST_WORDS)
