"""Judges layers by what they left in memory (`mla.verify.selected`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mla.bench.subjects.base import Left
from mla.bench.subjects.inputs import Inputs
from mla.bench.subjects.layer import MlaLayer
from mla.cost import ABSORBED, step_work
from mla.verify.layer_check import Checker, Forward
from mla.verify.selected import Judged, Past, SelectionJudge, Taken
from mla.verify.tolerances import layer_bounds, mean_over, row_errors, table_decides
from mla.verify.verdict import Check

# What the oracle may compute for a forward. Beyond that, it judges a random choice of rows, and at least so
# many.
ROWS_FLOPS, ROWS = 4e10, 8

_random = random.SystemRandom()  # what is judged is not known before


@dataclass
class TakenChecker:
    """Judges forwards of a layer by what they left in memory, for any turn of `inputs`.

    `make_reference` returns the loaded layer whose error bounds that of fused ops; it runs once, if needed.
    """

    judge: SelectionJudge
    inputs: Inputs  # with the history as the cache gives it back
    make_reference: Callable[[], MlaLayer]
    typical: float | None = None  # error of the reference, once it has run

    def of(self, inputs: Inputs, count: int) -> TakenChecker:
        """Return a checker of passes over other inputs, within the same bounds."""
        return replace(self, inputs=inputs.stored(self.judge.codec, self.judge.index_codec))

    def check_pass(self, left: Left, held: bool) -> Check:
        """Judge the outputs of a pass, and what was taken; `held`: also to the reference's error."""
        return self._verdict([parts for _, *parts in self.judged(left)], held)

    def on_lengths(
        self, query_lens: Sequence[int], kv_lens: Sequence[int], out: torch.Tensor, taken: Taken
    ) -> Check:
        """Judge the outputs [t, d] of the first rows of a plain pass, run as a batch of other lengths."""
        hidden = self.inputs.hidden[0, : len(out)]
        past = [length - new for length, new in zip(kv_lens, query_lens, strict=True)]
        return self._verdict([self._judge(out, [hidden], query_lens, past, taken, "new lengths")], held=False)

    def check_forwards(self, forwards: Iterable[Forward], held: bool) -> Check:
        """Judge outputs, each against what it should be."""
        listed = [replace(forward, step=step) for step, forward in enumerate(forwards)]
        if not listed:
            return Check(status="wrong", reason="there are no outputs to judge")
        expected, dtype = torch.stack([forward.expected for forward in listed]), self.judge.dtype
        known = None
        if held and not table_decides(dtype):
            known = torch.full(expected.shape[:-1], self._typical(), dtype=torch.float64)
        bounds = {False: layer_bounds(known, expected, dtype)}
        return Checker(expected, dtype, lambda: expected, bounds).check_forwards(listed, False)

    def judged(self, left: Left) -> Iterator[tuple[int, Forward, Judged]]:
        """Yield the forwards of a pass by index.

        A step of decoding is judged from the new tokens of all steps before it; another forward by its own
        alone.
        """
        scenario = self.inputs.scenario
        for index, out in sorted(left.outputs.items()):
            steps = range(index + 1) if scenario.mode == "decode" else [index]
            hidden = [self.inputs.forward(left.number, step)[0] for step in steps]
            of = scenario.query_lens, scenario.history, left.taken.get(index), scenario.forward_name(index)
            yield index, *self._judge(out, hidden, *of)

    def forwards(self, left: Left) -> Iterator[tuple[int, Forward]]:
        """Yield the forwards of a pass by index, each with what its output should be."""
        return ((index, forward) for index, forward, _ in self.judged(left))

    def _verdict(self, parts: Sequence[Sequence[Any]], held: bool) -> Check:
        """Return the first reason of any forward, each with what was judged of it, or else on all outputs."""
        for forward, judged in parts:
            if judged.reason:
                return Check(status="wrong", reason=f"{judged.reason} ({forward.where})")
        check = self.check_forwards([forward for forward, _ in parts], held)
        if check.error_ratio is not None:
            check.error_ratio = max([check.error_ratio, *(judged.ratio for _, judged in parts)])
        return check

    def _typical(self) -> float:
        """Return the relative error of the reference's first forward, judged by its own selection."""
        if self.typical is None:
            reference = self.make_reference()
            reference.before(0)
            reference.step(0)
            reference.after(0)
            forward = next(self.forwards(reference.left()))[1]
            errors = row_errors(forward.actual, forward.expected)
            self.typical = mean_over(errors, forward.expected.norm(dim=-1))
        return self.typical

    def _judge(
        self,
        out: torch.Tensor,  # [T, d]
        hidden: Sequence[torch.Tensor],  # [T, d] of each forward since the history, this one last
        query_lens: Sequence[int],
        history: Sequence[int],  # how much of it there is
        taken: Taken | None,
        where: str,
    ) -> tuple[Forward, Judged]:
        """Judge some rows of one forward."""
        inputs, steps = self.inputs, [part.split(list(query_lens)) for part in hidden]
        index = inputs.index or [part.new_empty(0) for _, part in inputs.history]
        lengths = zip(inputs.history, index, history, strict=True)
        past = [Past(kv[:length], pe[:length], keys[:length]) for (kv, pe), keys, length in lengths]
        new = [torch.cat(parts) for parts in zip(*steps, strict=True)]
        rows = self._rows(query_lens, [len(old.kv) + len(more) for old, more in zip(past, new, strict=True)])
        judged = self.judge.judge(query_lens, past, new, taken, rows)
        return Forward(0, out[rows], judged.expected, where, lambda: judged.places), judged

    def _rows(self, query_lens: Sequence[int], kv_lens: Sequence[int]) -> torch.Tensor:
        """Return the rows of a forward that are judged: all, or a random choice of many, in order."""
        config, count = self.judge.truth.config, sum(query_lens)
        of_a_row = step_work(config, [1], [max(kv_lens)], element_size=8, attention=ABSORBED)
        most = max(ROWS, int(ROWS_FLOPS / of_a_row.flops))
        return torch.tensor(sorted(_random.sample(range(count), min(count, most))))
