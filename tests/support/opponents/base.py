"""An honest backend whose parts a cheat overrides: every op is the reference's, and calls are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from wrapped_op import WrappedOp

from mla.bench.limits.microbench import FEATURES
from mla_backends.api import OPS
from mla_backends.testing import HostBackend

# The layer that opponents run: no two of its operands have the same width.
CONFIG = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
}
HIDDEN = CONFIG["hidden_size"]
# No call of the scenarios has more rows.
ROWS = 900


class Call:
    """One call of an op, not yet made."""

    def __init__(self, op: ReferenceOp, leading: tuple[Any, ...], tensors: Mapping[str, Any]) -> None:
        self.op, self.kind, self.leading, self.tensors = op, op.kind, leading, tensors

    def make(self, **changed: Any) -> None:
        """Compute it, with other tensors in place of some of its own."""
        self.op.right(*self.leading, **{**self.tensors, **changed})

    def make_rows(self, rows: slice) -> None:
        """Compute some rows of a product."""
        self.make(x=self.operand[rows], out=self.tensors["out"][rows])

    @property
    def out(self) -> torch.Tensor | None:
        """What it writes, unless that is the cache."""
        return self.tensors.get("out")

    @property
    def operand(self) -> torch.Tensor:
        """What it reads: x of most ops, q of attention, kv_a of what writes latents."""
        (varied,) = (self.tensors[name] for name in ("x", "q", "kv_a") if name in self.tensors)
        return varied

    @property
    def is_extra(self) -> bool:
        """Whether a limit is being measured: its rows or its columns are none that the layer has."""
        rows, columns = self.operand.shape[0], self.operand.shape[-1]
        return rows > ROWS or (self.kind == "linear" and columns in (FEATURES, rows))

    @property
    def is_last(self) -> bool:
        """Whether it is a forward's last call: o_proj alone writes hidden states."""
        return self.kind == "linear" and self.tensors["out"].shape[-1] == HIDDEN


class ReferenceOp(WrappedOp):
    """An op of the reference, called through the backend that offers it."""

    def __init__(self, kind: str, backend: Opponent) -> None:
        super().__init__(kind)
        self.kind, self._backend = kind, backend

    def prepare(self, spec: Any, batch: Any) -> Any:
        state = super().prepare(spec, batch)
        return self._backend.planned(state, batch) if self.kind == "latent_attention" else state

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        self._backend.called(Call(self, leading, tensors))


class Opponent(HostBackend):
    """The base of all: honest, single-threaded. `kinds`: the ops it offers."""

    name = "opponent"

    def __init__(self, kinds: tuple[str, ...] = tuple(OPS), **facts: Any) -> None:
        super().__init__(ops={f"own_{kind}": ReferenceOp(kind, self) for kind in kinds}, **facts)
        self.patches = ExitStack()  # closed when the run is over
        self.passes = 0  # begun
        self.steps = 0  # forwards finished in this pass
        self.forwards = 0  # finished
        self.eased = 0  # forwards of which some calls were not made
        self.gains = 0  # calls that were not really made, or not rightly
        self._keys = self._gains_before = 0

    def setup(self, index: int | None = None) -> torch.device:
        if hasattr(self, "patches"):  # not while it is being made
            self.arrives()
        return super().setup(index)

    def arrives(self) -> None:
        """The run begins; for cheats that patch."""

    def planned(self, state: Any, batch: Any) -> Any:
        """Note a new pass (the cache is no longer than before) and return the state of latent attention."""
        keys = sum(batch.kv_lens)
        if keys <= self._keys or not self.passes:
            self.passes, self.steps = self.passes + 1, 0
            self.begins()
        self._keys = keys
        return state

    def begins(self) -> None:
        """A pass begins; for cheats that care."""

    def called(self, call: Call) -> None:
        """Make a call, or what passes for it, and count forwards."""
        if call.is_extra:
            self.extra(call)
            return
        self.call(call)
        if call.is_last or len(self.ops()) == 1:
            self.eased += self.gains > self._gains_before
            self._gains_before = self.gains
            self.steps, self.forwards = self.steps + 1, self.forwards + 1

    def call(self, call: Call) -> None:
        """Compute; cheats override this."""
        call.make()

    def extra(self, call: Call) -> None:
        """Compute what no forward asks for."""
        call.make()

    @property
    def hardly_eased(self) -> bool:
        """Whether no pass that was timed can have been easier: a few forwards that make no number repeat."""
        return self.eased < 0.3 * self.forwards


class Sequences(Opponent):
    """Makes a repeated forward in one call, unless it `skips` it."""

    def sequence(self, calls: Any, moving: Any) -> Callable[..., None]:
        def run(*moved: torch.Tensor) -> None:
            if self.skips():
                self.gains += 1
                return
            replaced = dict(zip(map(id, moving), moved, strict=True))
            for call in calls:
                tensors = {name: replaced.get(id(value), value) for name, value in call.tensors.items()}
                call.op(*call.arguments, **tensors)

        return run

    def skips(self) -> bool:
        """Return whether this forward is not computed; cheats override this."""
        return False
