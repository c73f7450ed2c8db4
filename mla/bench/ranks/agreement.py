"""What ranks of a run must have alike, exchanged once: options, versions, what files hold, and chosen ops."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

import mla
from mla.bench import results
from mla.bench.ranks.errors import RanksError, listed, numbered
from mla.checkpoint import fingerprint, read_layer
from mla.command.environment import build_digest

if TYPE_CHECKING:
    from mla.bench.plan.options import RunOptions
    from mla.bench.plan.request import Request

Facts = Mapping[str, Mapping[str, str]]  # kind -> name -> value or digest
Roles = Mapping[str, str]  # role -> op
Chosen = Mapping[str, Mapping[str, Roles]]  # scenario -> implementation -> roles

REFERENCE = "reference"
# Options that may differ between ranks: rank 0 writes, each has a device of its own.
_OWN = ("device", "output", "resume", "baseline", "profile", "dump_failure")
_SHOWN = ("options", "versions", "host threads", "config")  # the values of others are digests
_CURES = {
    "options": "all ranks must be started with the same options",
    "host threads": "set OMP_NUM_THREADS, `srun --cpus-per-task` or --threads to one number for all ranks",
}
_FILES = "all nodes must have the same files, and the same packages"


def facts(request: Request, options: RunOptions) -> dict[str, dict[str, str]]:
    """Return what must be the same on all ranks: files of one name may hold something else on another node.

    Raises `CheckpointError` and `ResultError`.
    """
    setting, backend = request.setting, request.setting.backend
    given = {name: str(value) for name, value in vars(options).items() if name not in _OWN}
    versions = {"mla": mla.__version__, "torch": str(torch.__version__), "Python": platform.python_version()}
    on_host = setting.device.type == "cpu"  # else no result counts them
    named = (option.partition("=") for option in options.backend_options)
    files = {name: Path(value) for name, _, value in named if Path(value).is_file()}
    weights: Mapping[str, str] = {}
    if options.model_path is not None:
        weights = fingerprint(read_layer(options.model_path, setting.config, options.layer))
    return {
        "options": {f"--{name.replace('_', '-')}": value for name, value in given.items()},
        "versions": {**versions, backend.name: str(request.backend_version)},
        "host threads": {"torch": str(torch.get_num_threads())} if on_host else {},
        "program": {f"mla, mla_backends or '{backend.name}'": build_digest(backend) or ""},
        "config": {name: str(value) for name, value in asdict(setting.config).items()},
        "workload": {f"'{point.name}'": _digest(msgspec.json.encode(point)) for point in request.points},
        "checkpoint": dict(weights),
        "files of -O": {f"'{name}'": _digest(results.content(file)) for name, file in files.items()},
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def agree(every: Sequence[Facts]) -> None:
    """Raise `RanksError`, on all ranks, where some have something else than rank 0."""
    for kind, own in every[0].items():
        differing = {rank: other[kind] for rank, other in enumerate(every) if other[kind] != own}
        if not differing:
            continue
        first = next(iter(differing.values()))
        parts = [
            f"{name} ({first.get(name)}, not {own.get(name)})" if kind in _SHOWN else name
            for name in {**own, **first}
            if first.get(name) != own.get(name)
        ]
        raise RanksError(
            f"other {kind} on {numbered(list(differing))} than on rank 0: {listed(parts)}; "
            f"{_CURES.get(kind, _FILES)}",
            common=True,
        )


def common_ops(chosen: Sequence[Chosen]) -> dict[str, dict[str, dict[str, str]]]:
    """Return what all ranks run, from what each chose: the reference where one did not choose a fused op.

    A backend may choose by a measurement, and then not alike on all. Raises `RanksError`, on all ranks, where
    two have different fused ops.
    """
    return {
        scenario: {
            name: {role: _common_op(role, [rank[scenario][name][role] for rank in chosen]) for role in roles}
            for name, roles in implementations.items()
        }
        for scenario, implementations in chosen[0].items()
    }


def _common_op(role: str, ops: Sequence[str]) -> str:
    fused = dict.fromkeys(op for op in ops if op != REFERENCE)
    if len(fused) > 1:
        first, second = list(fused)[:2]
        raise RanksError(
            f"rank {ops.index(first)} would run {first} for {role}, and rank {ops.index(second)} {second}: "
            "name one of them with --ops, or run on devices that are alike",
            common=True,
        )
    return REFERENCE if REFERENCE in ops else ops[0]


def demoted(own: Roles, common: Roles) -> dict[str, str]:
    """Return role -> reference for what this rank would run otherwise."""
    return {role: REFERENCE for role, op in common.items() if op == REFERENCE and own[role] != REFERENCE}


def remark(chosen: Sequence[Chosen]) -> str | None:
    """Return what is not run because not all ranks have it; None if they agree."""
    lacking = {
        f"{op} (not rank {rank})"
        for scenario, implementations in chosen[0].items()
        for name, roles in implementations.items()
        for role in roles
        for op in {each[scenario][name][role] for each in chosen} - {REFERENCE}
        for rank, each in enumerate(chosen)
        if each[scenario][name][role] == REFERENCE
    }
    if not lacking:
        return None
    return (
        f"the reference runs on all ranks instead of {', '.join(sorted(lacking))}: a rank did not choose it; "
        "--list-ops on that rank says why, and --ops fused makes that an error"
    )
