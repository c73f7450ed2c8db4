"""What stands behind a run's options: files of the same name may hold something else on another node."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mla.bench import results
from mla.bench.ranks.errors import RanksError, listed, numbered
from mla.bench.results.facts import build_digest
from mla.checkpoint import fingerprint, read_layer

if TYPE_CHECKING:
    from mla.bench.plan.options import RunOptions
    from mla.bench.plan.request import Request

Contents = Mapping[str, Mapping[str, str]]  # kind -> what it consists of -> value or digest


def contents(request: Request, options: RunOptions) -> dict[str, dict[str, str]]:
    """Return what was read from files: config, scenarios, checkpoint, and the program itself.

    Raises `CheckpointError` and `ResultError`.
    """
    setting = request.setting
    given = (option.partition("=") for option in options.backend_options)
    files = {name: Path(value) for name, _, value in given if Path(value).is_file()}
    return {
        "program": {f"mla, mla_backends or '{setting.backend.name}'": build_digest(setting.backend) or ""},
        "config": {name: str(value) for name, value in asdict(setting.config).items()},
        "workload": {f"'{point.name}'": _digest(msgspec.json.encode(point)) for point in request.points},
        "checkpoint": _weights(request, options),
        "file of -O": {f"'{name}'": _digest(results.content(file)) for name, file in files.items()},
    }


def _weights(request: Request, options: RunOptions) -> dict[str, str]:
    if options.model_path is None:
        return {}
    return fingerprint(read_layer(options.model_path, request.setting.config, options.layer))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def agree(found: Sequence[Contents]) -> None:
    """Raise `RanksError`, on all ranks, where some have read something else than rank 0."""
    for kind, own in found[0].items():
        differing = {rank: other[kind] for rank, other in enumerate(found) if other[kind] != own}
        if not differing:
            continue
        first = next(iter(differing.values()))
        parts = [part for name in {**own, **first} if (part := _difference(kind, name, own, first))]
        have = "have" if len(differing) > 1 else "has"
        raise RanksError(
            f"{numbered(list(differing))} {have} another {kind} than rank 0, in {listed(parts)}: all nodes "
            "must have the same files, and the same packages.",
            common=True,
        )


def _difference(kind: str, name: str, own: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Return what is different; "" if nothing is."""
    values = [one.get(name, "nothing") for one in (other, own)]
    if values[0] == values[1]:
        return ""
    return f"{name} ({values[0]}, not {values[1]})" if kind == "config" else name
