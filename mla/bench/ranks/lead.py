"""`LeadLayer`: a layer over several ranks as one implementation, on rank 0."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch

from mla.bench.doubts.new_lengths import Lengths
from mla.bench.ranks.errors import Failure, RanksError, failure
from mla.bench.ranks.lengths_bench import LeadBench, RankBench, Sample
from mla.bench.ranks.part import CLOCKED, RankLayer
from mla.bench.results.schema import LinkLine, Spread
from mla.bench.subjects.base import TakesInputs
from mla.bench.subjects.inputs import Inputs, Requests
from mla.bench.subjects.setting import Setting
from mla.bench.subjects.tokens import LayerChecker
from mla.bench.subjects.turns import forward_number
from mla.bench.workload.scenario import Scenario
from mla.errors import OutOfMemory, UnsupportedBatch
from mla.verify.layer_check import Forward
from mla.verify.places import Places
from mla.verify.verdict import Check

if TYPE_CHECKING:
    from mla.bench.ranks.crew import Crew

# Bound before any plugin loads.
_random = random.SystemRandom()

T = TypeVar("T")
Outputs = dict[int, torch.Tensor]  # by forward, of one rank


class LeadLayer(TakesInputs):
    """Has every rank do its part of each forward, from a common start, and checks the outputs of all.

    A sample is that of the slowest rank. Others start their clock when all have met, and rank 0 when its
    runner does, right after that.
    """

    def __init__(self, setting: Setting, part: RankLayer, crew: Crew) -> None:
        super().__init__(setting)
        self.name = part.name
        self._part, self._crew = part, crew
        self.held_to_reference = part.held_to_reference
        self._idle = False
        self._number = 0
        self._outputs: list[Outputs] = []  # of the last pass, by rank
        self._last: list[list[float]] = []  # milliseconds of the last pass, by rank
        self._kept: list[list[float]] = []  # of the result's passes, by rank

    # ------------------------------------------------------------------------------------------ passes

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self.scenario, self._turns = scenario, inputs.turns
        self._kept = [[] for _ in range(self._crew.layout.world)]
        seed = _random.getrandbits(63)
        self._crew.tell("load", scenario.name, self.name, seed)
        self._crew.concerted(self.name, partial(self._part.load_alike, scenario, inputs, seed))

    def restore(self, number: int = 0) -> None:
        self._number = number
        self._crew.tell("restore", self.name, number)
        self._crew.concerted(self.name, partial(self._part.restore, number))
        self.plan_ms = self._part.plan_ms

    def ready(self, index: int) -> None:
        self._part.ready(index)

    def show(self, index: int) -> None:
        with self._awaited():
            self._crew.tell("idle" if self._idle else "forward", index)
            self._part.show(index)
            self._crew.wait()

    def step(self, index: int) -> None:
        try:
            self._part.step(index)
        except Exception as error:  # nothing is entered before a forward that is timed
            if (own := self._crew.alike(error, self.name)) is None:
                with self._awaited(), self._crew.blamed():
                    raise
            self._crew.tell("times")
            self._of_all(own)  # raises what it is on all ranks

    def after(self, index: int) -> None:
        self._crew.tell("after", index)
        self._part.after(index)

    @contextmanager
    def idle(self) -> Iterator[None]:
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    def slowest(self, samples: list[float]) -> list[float]:
        if self._idle:
            return samples
        self._crew.tell("times")
        self._last = self._of_all(samples)
        return [max(times) for times in zip(*self._last, strict=True)]

    def recorded(self) -> None:
        for kept, last in zip(self._kept, self._last, strict=True):
            kept += last

    def collect(self) -> None:
        with self._awaited():
            self._crew.tell("collect")
            self._part.collect()
        self._outputs = self._of_all(self._part.compared())

    def _of_all(self, mine: T | Failure) -> list[T]:
        """Return what every rank gave; where one gave a failure instead, no rank keeps this layer."""
        try:
            return self._crew.parts(mine)
        except (UnsupportedBatch, OutOfMemory):
            self._crew.tell("drop", self.name)
            raise

    @contextmanager
    def fed(self, seed: int, count: int) -> Iterator[list[torch.Tensor]]:
        self._crew.tell("feed", self.name, seed, count)
        hidden: list[torch.Tensor] = []
        try:
            self._crew.concerted(self.name, lambda: hidden.extend(self._part.feed(seed, count)))
            yield hidden
        finally:
            self._part.feed(None)
        self._crew.tell("feed", self.name, None, 0)  # after an error, the others may not listen

    def keep_collected(self, indices: Collection[int]) -> None:
        self._outputs = [{index: one[index] for index in indices if index in one} for one in self._outputs]

    def lengths_bench(self) -> LeadBench | None:
        if self._crew.layout.dcp > 1:  # whose batches are laid out for the lengths of a pass
            return None
        self._crew.tell("bench", self.name)
        made: list[RankBench] = []
        self._crew.concerted(self.name, lambda: made.append(RankBench(self._part, self._crew.wait)))
        return LeadBench(self, made[0])

    def run_lengths(
        self, bench: RankBench, lengths: Lengths, count: int, beat: Callable[[], None]
    ) -> list[list[Sample]]:
        """Have all ranks run forwards on new lengths, and return what their parts took, by rank."""
        self._crew.tell("run_lengths", lengths, count)
        with self._crew.blamed():
            return self._crew.attempt(self.name, partial(bench.run, lengths, count, beat))

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        """End the run, on all ranks, if this one fails in the block: the others wait for it.

        Raises `RanksError` for what would cost one device no more than the case.
        """
        try:
            yield
        except Exception as error:
            if (own := failure(error, self.name)) is not None:
                raise RanksError(f"rank 0: {own.sentence}", common=True) from error
            raise

    # ------------------------------------------------------------------------------------------ checks

    def check(self, checker: LayerChecker) -> Check:
        """Check what every rank has: each has the outputs of all heads, of its requests."""
        found = [
            checker.check_forwards(self._forwards(checker, copy), self.held_to_reference)
            for copy in range(self._copies())
        ]
        worst = max(range(len(found)), key=lambda copy: _badness(found[copy]))
        if found[worst].reason:
            wrong = [copy for copy, one in enumerate(found) if one.status == found[worst].status]
            found[worst].reason = f"{self._blamed(checker, worst, wrong)}: {found[worst].reason}"
        return found[worst]

    def doubt(self, checker: LayerChecker, check: Check) -> str:
        return self._part.doubt(checker, check)

    def _blamed(self, checker: LayerChecker, worst: int, wrong: Sequence[int]) -> str:
        """Say on which ranks outputs are wrong; a wrong part of a sum cannot be told from the others."""
        rank = self._worst_rank(checker, worst)
        if len(wrong) == 1:
            return f"on rank {rank}"
        ranks = ", ".join(str(rank - worst + copy) for copy in wrong[:-1])
        return f"on ranks {ranks} and {rank - worst + wrong[-1]}, which hold one sum: any may be at fault"

    def _worst_rank(self, checker: LayerChecker, copy: int) -> int:
        """Return which of the ranks that have one copy of all outputs is farthest from the oracle."""
        ranks, count = self._ranks(copy), self._crew.layout.dp
        rows = [Requests.of(self.scenario, part, count).rows(self.scenario) for part in range(count)]
        far = [0.0] * count
        for forward in self._forwards(checker, copy):
            error = (forward.found.cpu().double() - forward.expected).nan_to_num(*[torch.inf] * 3)
            far = [max(old, float(error[part].norm())) for old, part in zip(far, rows, strict=True)]
        return ranks[far.index(max(far))]

    def _copies(self) -> int:
        """Return how often each output is there: every rank has those of all heads."""
        return self._crew.layout.head_parts

    def _ranks(self, copy: int) -> list[int]:
        """Return the ranks that together have one copy of all outputs."""
        return list(range(copy, self._crew.layout.world, self._crew.layout.head_parts))

    def _whole(self, copy: int) -> Outputs:
        """Return the outputs [T, d] of all requests, as one copy of them."""
        parts = [self._outputs[rank] for rank in self._ranks(copy)]
        common = sorted(set.intersection(*map(set, parts)))
        if any(parts) and not common:
            raise RuntimeError("ranks kept the outputs of different forwards, so that none can be checked.")
        return {index: torch.cat([part[index] for part in parts]) for index in common}

    def _forwards(self, checker: LayerChecker, copy: int) -> Iterator[Forward]:
        scenario = self.scenario
        word = "step" if scenario.mode == "decode" else "forward"
        for index, found in self._whole(copy).items():
            step = index if scenario.mode == "decode" else 0
            turn = self._turns.turn(forward_number(scenario, self._number, index))
            expected = checker.expected_rows(step, turn)
            yield Forward(step, found, expected, f"{word} {index}", partial(self._places, step))

    def _places(self, step: int) -> Places:
        return Places.new_tokens(self.scenario.query_lens, self.scenario.kv_lens(step))

    def compared(self) -> Outputs:
        return self._whole(0)

    # ------------------------------------------------------------------------------------------- facts

    def spread(self) -> Spread:
        """Run a pass in which collectives are clocked, and return every rank's part."""
        with self._awaited(), self._crew.blamed():
            self._crew.tell("clock", self.name, CLOCKED)
            own = self._part.facts(CLOCKED, self._crew.wait)
        found = self._crew.gather(own)
        ranks = [
            msgspec.structs.replace(one, samples=samples)
            for one, samples in zip(found, self._kept, strict=True)
        ]
        layout, library = str(self._crew.layout), self._crew.library
        lines = self._crew.measure_link(self.setting.device, self.setting.backend.synchronize)
        link = [LinkLine.of(kind, line) for kind, line in lines.items()]
        source = f"measured among the ranks of {layout} over {library}" if link else ""
        return Spread(layout=layout, library=library, ranks=ranks, link=link, link_source=source)

    def cache_bytes(self) -> int:
        return self._part.cache_bytes()

    def weight_bytes(self) -> int:
        return self._part.weight_bytes()

    def scratch_bytes(self) -> int:
        return self._part.scratch_bytes()

    def ops(self) -> dict[str, str]:
        return self._part.ops()

    def remarks(self) -> dict[str, list[str]]:
        return self._part.remarks()

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        self._part.replace_ops(replace)


def _badness(check: Check) -> tuple[bool, float]:
    return check.status != "ok", check.error_ratio if check.error_ratio is not None else float("inf")
