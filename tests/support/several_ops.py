"""The CPU with two ops of one kind to compare, and ops that cannot run: all are the reference inside.

`first` and `second` are latent attention, `rows` is linear. `-O wrong=NAME` makes what that op writes 5 %
too large. `-O refuse=NAME:HOW` makes an op refuse
contexts of more than 20 tokens: by `unsupported_batch` ("batch"), in "prepare" or at its "call"; with "raise"
its `prepare` fails. `picky` is latent attention and refuses every layer; `old` has an outdated contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from faulty_backend import FaultyOp
from wrapped_op import OneThread

from mla_backends import BackendError, FusedOp
from mla_backends.kernels import KernelRefused

KINDS = {"first": "latent_attention", "second": "latent_attention", "rows": "linear"}

MAX_TOKENS = 20  # tokens that a `Refusing` op takes


class Picky(FaultyOp):
    def unsupported_reasons(self, spec: Any) -> list[str]:
        return ["it has no kernel for this layer"]


class Refusing(FaultyOp):
    """Refuses long contexts in one of several places."""

    def __init__(self, kind: str, how: str) -> None:
        super().__init__(kind, "none")
        self._how = how

    def unsupported_batch(
        self, spec: Any, query_lens: Sequence[int], kv_lens: Sequence[int], page_size: int | None = None
    ) -> list[str]:
        return ["it takes 20 tokens"] if self._how == "batch" and max(kv_lens) > MAX_TOKENS else []

    def prepare(self, spec: Any, batch: Any) -> Any:
        if max(batch.kv_lens) > MAX_TOKENS and self._how == "prepare":
            raise BackendError("the kernel takes 20 tokens.")
        if max(batch.kv_lens) > MAX_TOKENS and self._how == "raise":
            raise RuntimeError("the plan broke")
        return super().prepare(spec, batch)

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        if self._how == "call" and int(tensors["kv_lens"].max()) > MAX_TOKENS:
            raise KernelRefused("the kernel takes 20 tokens.")
        super().__call__(*leading, **tensors)


class Old(FaultyOp):
    def __init__(self, kind: str, fault: str) -> None:
        super().__init__(kind, fault)
        self.contract = f"{kind}/0"


class SeveralOps(OneThread):
    name = "several"

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return ("threads", "wrong", "refuse")

    def ops(self) -> Mapping[str, FusedOp]:
        if not self._ops:
            wrong = self.options.get("wrong")
            for name, kind in KINDS.items():
                self._ops[name] = FaultyOp(kind, "scale" if name == wrong else "none")
            if "refuse" in self.options:
                name, _, how = self.options["refuse"].partition(":")
                self._ops[name] = Refusing(KINDS[name], how)
            self._ops["picky"] = Picky("latent_attention", "none")
            self._ops["old"] = Old("rotate_query", "none")
        return self._ops
