"""Ops that single roles of a layer must run, whatever the policy says: which names are valid."""

from __future__ import annotations

from collections.abc import Mapping

from mla.errors import UnknownOp, did_you_mean
from mla_backends.api import FusedOp


def check_overrides(
    overrides: Mapping[str, str], kinds: Mapping[str, str], offered: Mapping[str, FusedOp]
) -> None:
    """Raise `UnknownOp` for a role that the layer lacks, or an op that its role cannot run.

    `overrides`: role -> name of an op, or "reference". `kinds`: role -> kind of op.
    """
    for role, name in overrides.items():
        if role not in kinds:
            known = list(kinds)
            raise UnknownOp(
                f"this layer has no role '{role}'.{did_you_mean(role, known)} Its roles: {', '.join(known)}."
            )
        fitting = ["reference", *(one for one, op in offered.items() if _kind(op) == kinds[role])]
        if name not in fitting:
            other = f"op '{name}' is of kind {_kind(offered[name])}." if name in offered else ""
            missing = f"this backend offers no op '{name}'.{did_you_mean(name, fitting)}"
            raise UnknownOp(f"{other or missing} {role} takes: {', '.join(fitting)}.")


def _kind(op: FusedOp) -> str:
    return op.contract.partition("/")[0]
