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
from mla.bench.ranks.pulse import RanksError, listed, numbered
from mla.checkpoint import fingerprint, read_layer
from mla.command.console import note
from mla.command.environment import build_digest

if TYPE_CHECKING:
    from mla.bench.plan.options import RunOptions
    from mla.bench.plan.request import Request

Facts = Mapping[str, Mapping[str, str]]  # kind -> name -> value or digest
Roles = dict[str, str]  # role -> op
Chosen = Mapping[str, Mapping[str, Roles]]  # scenario -> implementation -> roles

REFERENCE = "reference"
# Options that may differ between ranks: rank 0 writes, each has a device of its own.
_MAY_DIFFER = ("device", "output", "resume", "baseline", "profile", "dump_failure")
_SHOWN = ("options", "versions", "host threads", "config")  # the values of others are digests
_CURES = {
    "options": "all ranks must be started with the same options",
    "host threads": "set OMP_NUM_THREADS, `srun --cpus-per-task` or --threads to one number for all ranks",
}
_SAME_FILES = "all nodes must have the same files, and the same packages"


def facts(request: Request, options: RunOptions) -> dict[str, dict[str, str]]:
    """Return what must be the same on all ranks: files of one name may hold something else on another node.

    Raises `CheckpointError` and `ResultError`.
    """
    setting, backend = request.setting, request.setting.backend
    given = {name: str(value) for name, value in vars(options).items() if name not in _MAY_DIFFER}
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


def agree(by_rank: Sequence[Facts]) -> None:
    """Raise `RanksError`, on all ranks, where some have something else than rank 0."""
    for kind, expected in by_rank[0].items():
        differing = {rank: given[kind] for rank, given in enumerate(by_rank) if given[kind] != expected}
        if not differing:
            continue
        first = next(iter(differing.values()))
        parts = [
            f"{name} ({first.get(name)}, not {expected.get(name)})" if kind in _SHOWN else name
            for name in {**expected, **first}
            if first.get(name) != expected.get(name)
        ]
        raise RanksError(
            f"{numbered(list(differing))} differ{'s' * (len(differing) == 1)} from rank 0 in {kind}: "
            f"{listed(parts)}; {_CURES.get(kind, _SAME_FILES)}",
            common=True,
        )


def common_ops(chosen: Sequence[Chosen]) -> dict[str, dict[str, Roles]]:
    """Return what all ranks run, from what each chose: the reference where one did not choose a fused op.

    A backend may choose by a measurement, and then not alike on all; a note says which ops do not run. Raises
    `RanksError`, on all ranks, where two have different fused ops.
    """
    common: dict[str, dict[str, Roles]] = {}
    lacking: set[str] = set()
    for scenario, implementations in chosen[0].items():
        common[scenario] = {name: {} for name in implementations}
        for name, roles in implementations.items():
            for role in roles:
                ops = [rank[scenario][name][role] for rank in chosen]
                common[scenario][name][role] = op = _common_op(role, ops)
                fused = next((other for other in ops if other != op), op)
                lacking |= {f"{fused} (not rank {rank})" for rank, o in enumerate(ops) if o != fused}
    if lacking:
        note(
            f"the reference runs on all ranks instead of {', '.join(sorted(lacking))}: a rank did not choose "
            "it; --list-ops on that rank says why, and --ops fused makes that an error"
        )
    return common


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
