"""`Case`: one launch and the GPU that its kernel is compiled for, as JSON; and the work that it asks for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from benchmarks.triton.recording import Launch

TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
}
ELEMENT = 2  # bytes of a bfloat16
ALIGNED = 16  # bytes: what Triton specialises pointers for


@dataclass(frozen=True)
class Target:
    """A GPU as Triton's compilers name it, such as ("cuda", 90, 32) or ("hip", "gfx942", 64)."""

    backend: str
    arch: int | str
    warp_size: int

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


@dataclass(frozen=True)
class Case:
    """What has to be known for a compilation. An old compiler takes its process along, hence the JSON."""

    kernel: str  # module:name
    # Name -> {"value": number, string or None}; of a tensor {"pointer": type of elements, "aligned": bool}.
    arguments: dict[str, dict[str, Any]]
    warps: int
    stages: int
    target: Target
    registers: int | None = None  # the most of a thread

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Work(NamedTuple):
    """What the algorithm asks of a step of one program."""

    flops: int
    bytes: float  # from memory; what another program of the same step has fetched comes from the L2 cache

    @classmethod
    def of(cls, case: Case) -> Work:
        """Return it for a launch of attention."""
        known: dict[str, Any] = {name: argument.get("value") for name, argument in case.arguments.items()}
        rows, keys = known["ROWS"], known["KEYS"]
        if "LATENT" not in known:  # expanded: many blocks of queries read the same keys
            return cls(2 * rows * keys * (known["WIDTH"] + known["VALUES"]), 0)
        width = known["LATENT"] + known["ROPE"]
        programs = -(-known["HEADS"] // rows)
        return cls(2 * rows * keys * (width + known["LATENT"]), keys * width * ELEMENT / programs)


def case_of(launch: Launch, target: Target) -> Case:
    """Return the case of a launch. Raises KeyError for tensors of dtypes that no kernel takes."""
    kernel = f"{launch.kernel.fn.__module__}:{launch.kernel.fn.__name__}"
    arguments = {name: _argument(value) for name, value in launch.arguments.items()}
    return Case(kernel, arguments, launch.warps, launch.stages, target, launch.registers)


def _argument(value: Any) -> dict[str, Any]:
    if not hasattr(value, "data_ptr"):
        return {"value": value}
    dtype = str(value.dtype).removeprefix("torch.")
    return {"pointer": TYPES[dtype], "aligned": value.data_ptr() % ALIGNED == 0}
