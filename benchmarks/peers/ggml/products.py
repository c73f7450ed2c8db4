"""Products of a layer's projections: ours, torch's and the peer's, in every dtype that each has.

Weights stay where a call before has left them, for everyone: calls of a visit use the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers.ggml.peer import Peer
from benchmarks.peers.ggml.ways import Way, in_process
from mla.bench.subjects.setting import Setting
from mla.cases.case import generator
from mla.layer.ops import layer_roles, refusals
from mla.text import dtype_name
from mla.verify.op_oracle import product
from mla_backends.api import FusedOp, LinearSpec

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

    @property
    def name(self) -> str:
        """The case's name, such as 16x2048x3648."""
        return f"{self.rows}x{self.inputs}x{self.outputs}"

    @property
    def flops(self) -> int:
        """FLOPs of one call."""
        return 2 * self.rows * self.inputs * self.outputs


def product_cases(setting: Setting) -> list[ProductCase]:
    """Return the projections of a layer at both row counts, and the shapes of the limit."""
    roles = layer_roles(setting.config, setting.dtype, setting.device).values()
    shapes = dict.fromkeys((spec.in_features, spec.out_features) for kind, spec in roles if kind == "linear")
    return [
        *(ProductCase(rows, *shape) for rows in ROWS for shape in shapes),
        *(ProductCase(*shape, limit=True) for shape in LIMITS),
    ]


class ProductData:
    """The operands of a case, which bf16 represents exactly: x [rows, i] and weight [o, i]."""

    def __init__(self, case: ProductCase, setting: Setting) -> None:
        self.case, self.setting = case, setting
        random = generator(setting.seed, case.name)
        self.x = torch.randn(case.rows, case.inputs, generator=random).bfloat16()
        self.weight = torch.randn(case.outputs, case.inputs, generator=random).bfloat16() * 0.03125

    def truth(self) -> torch.Tensor:
        """Return the result [rows, o] in float64."""
        return product(self.x, self.weight)


def own_ways(data: ProductData, dtype: torch.dtype, notes: list[str]) -> Iterator[Way]:
    """Yield each of the backend's linear ops that serves the shape; `notes` get why another does not."""
    case, setting = data.case, data.setting
    spec = LinearSpec(case.inputs, case.outputs, 1, dtype, setting.device)
    for name, op in setting.backend.ops().items():
        if not op.contract.startswith("linear/"):
            continue
        if why := refusals(name, op, "linear", spec):
            notes.append(f"{name}, {dtype_name(dtype)}: {'; '.join(why)}")
        else:
            yield _own(name, op, data, dtype)


def _own(name: str, op: FusedOp, data: ProductData, dtype: torch.dtype) -> Way:
    packed, x = op.pack(data.weight.to(dtype)), data.x.to(dtype)
    out = torch.empty(data.case.rows, data.case.outputs, dtype=dtype)
    return _way(name, "ours", dtype, lambda: op(packed, x=x, bias=None, out=out), out)


def torch_ways(data: ProductData, dtype: torch.dtype) -> Iterator[Way]:
    """Yield torch's product with the weight as it is, and in fp32 also with one whose rows are inputs."""
    x, weight = data.x.to(dtype), data.weight.to(dtype)
    layouts = {"torch.mm": weight.t()}
    if dtype == torch.float32:  # in bf16 it took 20 s without instructions for it
        layouts["torch.mm, rows of inputs"] = weight.t().contiguous()
    for name, operand in layouts.items():
        out = torch.empty(data.case.rows, data.case.outputs, dtype=dtype)
        yield _way(name, "torch", dtype, _multiply(x, operand, out), out)


def _multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.mm(x, weight, out=out)


def _way(name: str, party: str, dtype: torch.dtype, call: Callable[[], Any], out: torch.Tensor) -> Way:
    def result() -> torch.Tensor:
        out.fill_(torch.nan)
        call()
        return out

    return Way(f"{name} {dtype_name(dtype)}", party, dtype_name(dtype), in_process(call), result)


def peer_ways(data: ProductData, peer: Peer, close: Callable[..., object]) -> Iterator[Way]:
    """Yield the peer's ways, one for each type of weight; `close` takes what frees each of them."""
    for type_ in peer.types("weights"):
        if type_ == "f32" or not data.case.limit:
            work = peer.product(data.weight, data.x, type_)
            close(work.close)
            dtype = {"f32": "float32"}.get(type_, type_)
            yield Way(f"peer {type_}", "peer", dtype, work.time, work.result)


def all_ways(data: ProductData, peer: Peer, notes: list[str], close: Callable[..., object]) -> list[Way]:
    """Return every way of a case; of one that only helps to find the limit, those in fp32."""
    ways: list[Way] = []
    for dtype in (torch.float32,) if data.case.limit else (torch.bfloat16, torch.float32):
        ways += [*own_ways(data, dtype, notes), *torch_ways(data, dtype)]
    return [*ways, *peer_ways(data, peer, close)]
