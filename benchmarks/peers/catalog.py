"""The peers by name, and the reasons why some cannot run here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers import sglang_tools
from benchmarks.peers.assembled import Assembled, Toolbox
from benchmarks.peers.faults import FaultCounter
from benchmarks.peers.memory_read import MemoryRead
from benchmarks.peers.sglang_tools import SGLANG
from benchmarks.peers.torch_tools import TORCH
from mla.bench.subjects import fixture, transformers_layer
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.setting import Setting
from mla.bench.subjects.transformers_layer import transformers_model
from mla.config import MLAConfig
from mla.errors import MLAError, UsageError, did_you_mean
from mla.verify.layer_oracle import State

Maker = Callable[[Setting, State], Implementation]

OURS = "mla"
DEFAULT = ("ours", "read", "hand", "sglang", "composite", "transformers", "transformers-eager")
# These rebuild every request's keys and values in every step, which takes minutes with long histories.
EXPANDING = ("transformers", "transformers-eager")


def _assembled(name: str, tools: Toolbox) -> Maker:
    return lambda setting, state: Assembled(setting, state, name, tools)


def _joined(*boxes: Toolbox) -> Toolbox:
    parts = ("product", "batched", "decode", "prefill")
    return Toolbox(
        *(
            {key: candidate for box in boxes for key, candidate in getattr(box, part).items()}
            for part in parts
        )
    )


PEERS: dict[str, Maker] = {
    "read": MemoryRead,
    "hand": _assembled("hand", TORCH),
    "sglang": _assembled("sglang", SGLANG),
    "composite": _assembled("composite", _joined(TORCH, SGLANG)),
}


def implementation_names(words: Sequence[str]) -> list[str]:
    """Return the implementations for a list of peers, ours first. Raises `UsageError`."""
    known = ["ours", *PEERS, *fixture.IMPLEMENTATIONS]
    for word in words:
        if word not in known:
            hint = did_you_mean(word, known)
            raise UsageError(f"unknown peer '{word}'.{hint} Choose from: {', '.join(dict.fromkeys(known))}.")
    return list(dict.fromkeys([OURS, *(OURS if word == "ours" else word for word in words)]))


def why_not(names: Sequence[str], config: MLAConfig, vllm: Path | None) -> dict[str, str]:
    """Return implementation -> reason for those that cannot run here; load the kernels of the others."""
    checks: dict[str, Callable[[], object]] = {}
    for name in names:
        if name in ("sglang", "composite"):
            checks[name] = lambda: sglang_tools.load(vllm)
        elif name in EXPANDING:
            checks[name] = lambda: (transformers_layer.require(), transformers_model(config))
    return {name: reason for name, check in checks.items() if (reason := _reason(check))}


def _reason(check: Callable[[], object]) -> str | None:
    try:
        check()
    except MLAError as error:
        return str(error)
    return None


class Counters:
    """Register every implementation with the runner, and count the page faults of each one created."""

    def __init__(self) -> None:
        self.by_name: dict[str, FaultCounter] = {}
        self._makers: dict[str, Maker] = {**fixture.IMPLEMENTATIONS, **PEERS}

    def __enter__(self) -> Counters:
        self._before = dict(fixture.IMPLEMENTATIONS)
        fixture.IMPLEMENTATIONS.update(
            {name: self._counted(name, maker) for name, maker in self._makers.items()}
        )
        return self

    def __exit__(self, *exception: object) -> None:
        fixture.IMPLEMENTATIONS.clear()
        fixture.IMPLEMENTATIONS.update(self._before)

    def _counted(self, name: str, maker: Maker) -> Maker:
        def make(setting: Setting, state: State) -> Implementation:
            one = maker(setting, state)
            self.by_name[name] = FaultCounter(one)
            return one

        return make
