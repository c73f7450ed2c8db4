"""Ops of sparse attention, and one that the contract lacks, added as one entry: timed, kept and replayed.

That one encodes values into the bytes of a cache, so that many answers are right.
"""

# ruff: noqa: RUF012  # tables that nobody writes to

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from op_bench import INDEXED, OpBench
from wrong_sparse import MUTANTS

from mla.bench.plan.memory import op_bytes
from mla.bench.run.keeper import search
from mla.cases import KINDS
from mla.cases.case import DTYPES, Normal, OpCase
from mla.cases.kinds import WritesSlots
from mla.cases.memory import Tensors
from mla.cases.varied import Pool
from mla.cost import Work
from mla.failures import file
from mla.failures.file import replay
from mla.layer import ops as layer_ops
from mla.reference import REFERENCE
from mla_backends.api import OPS, FusedOp, SegmentLengths
from mla_backends.testing import HostBackend

CPU = torch.device("cpu")
REQUESTS = ((12, 2), (3, 2), (9, 1), (0, 4))
ORIGIN = file.Origin(backend="host", options=[], device="cpu", command="repeat", where="here", reason="wrong")


@dataclass(frozen=True)
class RowSpec:
    """Rows of `width`."""

    width: int
    dtype: torch.dtype
    device: torch.device


# ------------------------------------------------------------------- values into bytes of a cache, by scale


def encoded(x: torch.Tensor) -> torch.Tensor:
    """Return rows [T, d + 4] of bytes: 8-bit values, and the fp32 scale that they are to be times."""
    scale = (x.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
    codes = (x.float() / scale).round().to(torch.int8)
    return torch.cat((codes.view(torch.uint8), scale.view(torch.uint8)), 1)


class EncodeRows(WritesSlots):
    """The entry of `encode_rows`."""

    spec, letters, pool = RowSpec, {"d": "width"}, Pool
    operands = {"x": "T d", "slots": "T"}
    results = {"rows": "T d+4"}
    truths = {"values": "T d"}
    dtypes = {**DTYPES, "cache": torch.uint8, "rows": torch.uint8}
    cached = "d+4"

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        return {"x": normal(rows, case.spec.width)}

    def truth(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> Tensors:
        return {"values": given["x"].double()}

    def work(self, case: OpCase) -> Work:
        return Work(3 * case.rows * case.spec.width, case.rows * (3 * case.spec.width + 4))

    def faults(self, results: Tensors, truth: Tensors, **_: Any) -> Iterator[tuple[float, str]]:
        (codes, scale), values = results["rows"].split((results["rows"].shape[1] - 4, 4), 1), truth["values"]
        codes, scale = codes.contiguous().view(torch.int8), scale.contiguous().view(torch.float32)
        gap = (codes.double() * scale.double() - values).abs().amax(1) / values.abs().amax(1)
        worst = int(gap.argmax())
        yield gap[worst].item() / 0.01, f"the values of row {worst}" if not gap[worst] <= 0.01 else ""


class Encode(FusedOp):
    contract = "encode_rows/1"

    def __init__(self, factor: float = 1.0) -> None:
        self._factor = factor

    def __call__(self, *, x: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:  # type: ignore[override]
        cache.view(-1, cache.shape[2])[slots] = encoded(x * self._factor)


class Stray(Encode):
    """Writes a byte behind the row."""

    def __call__(self, *, x: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:  # type: ignore[override]
        super().__call__(x=x, slots=slots, cache=cache)
        others = set(range(cache.shape[0] * cache.shape[1])) - set(slots.tolist())
        cache.view(-1, cache.shape[2])[min(others), 0] = 3


KIND, RIGHT = "encode_rows", Encode()
ALL = (KIND, "write_index_key", "select_latents", "sparse_latent_attention")
FAULTS = (  # other mutants of index keys differ in layers unlike this one
    ("write_index_key", "norm", (0, 1, 3)),
    ("select_latents", "scores", range(6)),
    ("sparse_latent_attention", "selections", range(5)),
)
WRONG = [  # and what is said of it
    (KIND, lambda: Encode(1.1), "the values of row "),
    (KIND, Stray, "1 slots "),
    *((kind, MUTANTS[f"{kind}.{fault}"][number], "") for kind, fault, of in FAULTS for number in of),
]


@pytest.fixture(autouse=True)
def in_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add it to the contract, the reference and the layer's roles."""
    roles = layer_ops.layer_roles

    def more(config: Any, dtype: torch.dtype, device: torch.device, *rest: Any, **words: Any) -> Any:
        spec = RowSpec(24, dtype, device)
        return {**roles(config, dtype, device, *rest, **words), KIND: (KIND, spec)}

    for table, entry in ((KINDS, EncodeRows()), (OPS, RIGHT.contract), (REFERENCE, RIGHT)):
        monkeypatch.setitem(table, KIND, entry)  # type: ignore[arg-type]
    for module in ("mla.layer.ops", "mla.bench.subjects.op", "mla.bench.run.keeper"):
        monkeypatch.setattr(f"{module}.layer_roles", more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ALL)
def test_a_pass_is_right_and_every_call_of_it_differs(kind: str, dtype: torch.dtype) -> None:
    bench, given = OpBench(INDEXED, kind, dtype, REQUESTS, runs=6), set()
    timed = bench.implementation(REFERENCE[kind])
    name = timed._pool.entry.varied[0]
    for number in range(3):
        check = bench.run(
            timed, number, lambda index: given.add(timed._call.arguments[name].float().numpy().tobytes())
        )
        assert (check.status, check.reason) == ("ok", "")
        assert len(timed.outputs()) == 6
    assert len(given) == 18, "calls had operands alike"
    assert op_bytes(bench.fixture.pool) > 0


@pytest.mark.parametrize(("kind", "make", "said"), WRONG)
def test_a_wrong_op_is_found_kept_and_replayed(
    kind: str, make: Callable[[], FusedOp], said: str, tmp_path: Path
) -> None:
    op, bench = make(), OpBench(INDEXED, kind, torch.float32, REQUESTS, runs=6)
    implementation = bench.implementation(op)
    check = bench.run(implementation, 1)
    assert check.status == "wrong"
    assert said in check.reason
    wrong = search(implementation, bench.scenario, bench.problem, lambda: None)[0].wrong
    assert wrong is not None
    assert said in wrong.reason
    file.write_call(tmp_path, wrong, ORIGIN)
    kept = file.read(tmp_path)
    backend = HostBackend(ops={"mine": op, "right": REFERENCE[kind]})
    assert replay(kept, backend, "mine") == [wrong.reason]
    assert replay(kept, backend, "right", runs=2) == replay(kept, backend, "reference", runs=2) == ["", ""]
