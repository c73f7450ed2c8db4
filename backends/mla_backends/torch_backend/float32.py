"""Products of float32 are made in float32: TF32, whose mantissa has 10 bits, is turned off and recorded.

A container may turn it on, and some stacks do so by default (torch_musa 2.7.1, Context.h).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from mla_backends.errors import describe

# Turn TF32 on or off for torch's products, or off for all of a vendor's libraries.
TF32_VARIABLES = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")
SWITCH = "allow_tf32"


def forbid_tf32() -> None:
    """Turn TF32 off for torch's products, and for each library of `torch.backends` that has a switch."""
    import torch

    with _quietly():
        torch.set_float32_matmul_precision("highest")
    for library in _libraries().values():
        with _quietly(), contextlib.suppress(Exception):  # what is not turned off is in the facts
            library.allow_tf32 = False


def float32_facts() -> dict[str, str]:
    """Return the precision of torch's products, and library -> whether it may use TF32."""
    import torch

    facts = {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    for name, library in _libraries().items():
        try:
            with _quietly():
                value = library.allow_tf32
        except Exception as error:  # noqa: BLE001  # torch refuses to read a mixture of both settings
            value = f"unreadable ({describe(error)})"
        if value is not None:
            facts[f"{name}.{SWITCH}"] = str(value)
    return facts


def _libraries() -> dict[str, Any]:
    """Return the members of `torch.backends` with a switch. Looked up only: to read a switch may raise."""
    import torch

    members = {name: one for name, one in vars(torch.backends).items() if not name.startswith("_")}
    return {name: one for name, one in members.items() if _has_switch(one)}


def _has_switch(member: Any) -> bool:
    own = getattr(member, "__dict__", {})
    return SWITCH in own or any(SWITCH in vars(one) for one in type(member).__mro__)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Some releases announce a successor of a setting that others lack."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
