"""Which ops all ranks run. A backend may choose by a measurement, and then not alike on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mla.bench.ranks.errors import RanksError

REFERENCE = "reference"

Roles = Mapping[str, str]  # role -> op
Chosen = Mapping[str, Mapping[str, Roles]]  # scenario -> implementation -> roles


def common_ops(chosen: Sequence[Chosen]) -> dict[str, dict[str, dict[str, str]]]:
    """Return what all ranks run, from what each chose: the reference where one did not choose a fused op.

    Raises `RanksError`, on all ranks, where two have different fused ops.
    """
    return {
        scenario: {
            name: {role: _one(role, [rank[scenario][name][role] for rank in chosen]) for role in roles}
            for name, roles in implementations.items()
        }
        for scenario, implementations in chosen[0].items()
    }


def _one(role: str, ops: Sequence[str]) -> str:
    fused = dict.fromkeys(op for op in ops if op != REFERENCE)
    if len(fused) > 1:
        first, second = list(fused)[:2]
        raise RanksError(
            f"rank {ops.index(first)} would run {first} for {role}, and rank {ops.index(second)} {second}: "
            "name one of them with --ops, or run on devices that are alike.",
            common=True,
        )
    return REFERENCE if REFERENCE in ops else ops[0]


def demoted(own: Roles, common: Roles) -> dict[str, str]:
    """Return role -> reference for what this rank would run otherwise."""
    return {role: REFERENCE for role, op in common.items() if op == REFERENCE and own[role] != REFERENCE}


def remark(chosen: Sequence[Chosen], common: Chosen) -> str | None:
    """Return what is not run because not all ranks have it; None if they agree."""
    lacking = {
        f"{op} (not rank {rank})"
        for scenario, implementations in common.items()
        for name, roles in implementations.items()
        for role in roles
        for op in {one[scenario][name][role] for one in chosen} - {REFERENCE}
        for rank, one in enumerate(chosen)
        if one[scenario][name][role] == REFERENCE
    }
    if not lacking:
        return None
    return (
        f"the reference runs on all ranks instead of {', '.join(sorted(lacking))}: a rank did not choose it; "
        "--list-ops on that rank says why, and --ops fused makes that an error"
    )
