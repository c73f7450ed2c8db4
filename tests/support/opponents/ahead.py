"""Work that is done before its clock starts: a forward's inputs lie where the last one's lay."""

from __future__ import annotations

from typing import Any

import torch

from opponents.base import Call, Opponent

METADATA = ("slots", "cos_sin", "block_table", "kv_lens", "cu_q")


# The inputs of a forward that has not been asked for, and its output.
_Guess = tuple[torch.Tensor, torch.Tensor]


def _kept(call: Call) -> Call:
    """Return a call with copies of the lengths and tables that the next batch overwrites."""
    copied = {name: call.tensors[name].clone() for name in METADATA if name in call.tensors}
    return Call(call.op, call.leading, {**call.tensors, **copied})


class Ahead(Opponent):
    """Computes forwards in `synchronize`, as the calls of an earlier pass, while no forward runs.

    `whole`: all of a pass at once. A guess is used where the inputs turn out to be those that it was for.
    """

    def __init__(self, whole: bool = False, **given: Any) -> None:
        super().__init__(**given)
        self._whole = whole
        self._recorded: dict[int, list[Call]] = {}  # by step
        self._present: list[Call] = []
        self._guesses: dict[int, _Guess] = {}
        self._guess: _Guess | None = None  # that the present forward uses
        self._working = False  # an op was called since the last `synchronize`

    def call(self, call: Call) -> None:
        self._working = True
        if not self._present:
            guess = self._guesses.pop(self.steps, None)
            right = guess is not None and torch.equal(guess[0], call.operand)
            self._guess = guess if right else None
        self._present.append(call)
        if self._guess is None or call.kind == "write_latent":
            call.make()
        elif call.is_last:
            call.tensors["out"].copy_(self._guess[1])
            self.gains += 1
        if call.is_last:
            self._recorded[self.steps], self._present = [_kept(call) for call in self._present], []

    def synchronize(self) -> None:
        if not self._working and not self._present and len(self._recorded) > 1:
            next_step = self.steps if self.steps in self._recorded else 0
            for step in sorted(self._recorded) if self._whole else [next_step]:
                self._guesses[step] = self._compute(self._recorded[step])
        self._working = False

    def _compute(self, calls: list[Call]) -> _Guess:
        *calls, last = calls
        inputs = calls[0].operand.clone()
        for call in calls:
            call.make()
        out = torch.empty_like(last.tensors["out"])
        last.make(out=out)
        return inputs, out
