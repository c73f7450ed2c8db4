"""Products of a layer's projections: ours, torch's and the peer's, in every dtype that each has.

Weights stay where a call before has left them, for everyone: calls of a visit use the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.peers.ggml.peer import Peer
from benchmarks.peers.ggml.ways import Way, own
from mla.bench.subjects.setting import Setting
from mla.cases.case import generator
from mla.layer.ops import layer_roles, refusals
from mla.text import dtype_name
from mla.verify.op_oracle import product
from mla_backends.api import LinearSpec

ROWS = (16, 704)  # tokens of the two standard scenarios
# Shapes at which fp32 products are fast on most processors; they only help to find the limit.
LIMITS = ((1024, 1024, 1024), (2048, 2048, 2048), (704, 2048, 3072))


@dataclass(frozen=True)
class ProductCase:
    """x [rows, inputs] times a weight [outputs, inputs]."""

    rows: int
    inputs: int
    outputs: int
    limit: bool = False  # of no use but for the best fp32 product
    op = "product"

    @property
    def name(self) -> str:
        """The case's name, such as 16x2048x3648."""
        return f"{self.rows}x{self.inputs}x{self.outputs}"


def product_cases(setting: Setting) -> list[ProductCase]:
    """Return the projections of a layer at both row counts, and the shapes of the limit."""
    roles = layer_roles(setting.config, setting.dtype, setting.device).values()
    shapes = dict.fromkeys((spec.in_features, spec.out_features) for kind, spec in roles if kind == "linear")
    return [
        *(ProductCase(rows, *shape) for rows in ROWS for shape in shapes),
        *(ProductCase(*shape, limit=True) for shape in LIMITS),
    ]


class Product:
    """The operands of a case, which bf16 represents exactly: x [rows, i] and weight [o, i]."""

    def __init__(self, case: ProductCase, setting: Setting) -> None:
        self.case, self.setting, self.notes = case, setting, list[str]()
        random = generator(setting.seed, case.name)
        self.x = torch.randn(case.rows, case.inputs, generator=random).bfloat16()
        self.weight = torch.randn(case.outputs, case.inputs, generator=random).bfloat16() * 0.03125

    def truth(self) -> torch.Tensor:
        """Return the result [rows, o] in float64."""
        return product(self.x, self.weight)

    @property
    def flops(self) -> int:
        """FLOPs of one call."""
        return 2 * self.case.rows * self.case.inputs * self.case.outputs

    def ways(self, peer: Peer, close: Callable[..., object]) -> Iterator[Way]:
        """Yield every way; of a case that only helps to find the limit, those in fp32."""
        limit = self.case.limit
        for dtype in (torch.float32,) if limit else (torch.bfloat16, torch.float32):
            yield from self._ours(dtype)
            yield from self._torch(dtype)
        for type_ in peer.types("weights"):
            if type_ == "f32" or not limit:
                work = peer.product(self.weight, self.x, type_)
                close(work.close)
                dtype_of = {"f32": "float32"}.get(type_, type_)
                yield Way(f"peer {type_}", "peer", dtype_of, work.time, work.result)

    def _ours(self, dtype: torch.dtype) -> Iterator[Way]:
        """Yield each of the backend's linear ops that serves the shape; note why another does not."""
        spec = LinearSpec(self.case.inputs, self.case.outputs, 1, dtype, self.setting.device)
        for name, op in self.setting.backend.ops().items():
            if not op.contract.startswith("linear/"):
                continue
            if why := refusals(name, op, "linear", spec):
                self.notes.append(f"{name}, {dtype_name(dtype)}: {'; '.join(why)}")
                continue
            call = partial(op, op.pack(self.weight.to(dtype)), x=self.x.to(dtype), bias=None)
            yield self._way(name, "ours", dtype, call)

    def _torch(self, dtype: torch.dtype) -> Iterator[Way]:
        """Yield torch's product with the weight as it is, and in fp32 also with one whose rows are inputs."""
        x, weight = self.x.to(dtype), self.weight.to(dtype)
        yield self._way("torch.mm", "torch", dtype, partial(torch.mm, x, weight.t()))
        if dtype == torch.float32:  # in bf16 it took 20 s without instructions for it
            turned = partial(torch.mm, x, weight.t().contiguous())
            yield self._way("torch.mm, rows of inputs", "torch", dtype, turned)

    def _way(self, name: str, party: str, dtype: torch.dtype, call: Callable[..., object]) -> Way:
        out = torch.empty(self.case.rows, self.case.outputs, dtype=dtype)
        return own(f"{name} {dtype_name(dtype)}", party, dtype_name(dtype), partial(call, out=out), out)
