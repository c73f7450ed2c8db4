"""What the installed flashinfer takes: three generations of one class, told apart by their arguments.

Oldest: flat tables, log-sum-exp to base 2. Then, up to 0.6, the natural logarithm can be asked for. Since 0.7
tables come as one object, queries and cache as pairs, and what `run` returns is declared to `plan`; the older
ways still work there and warn. (Read in flashinfer 0.2.5, 0.6.18 and 0.7.2.post1.)
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mla_backends.kernels.vendor import VendorModule, accepts, missing

if TYPE_CHECKING:
    import torch

CLASS = "BatchMLAPagedAttentionWrapper"
TABLES = "MLAPlanMetadata"
FLAT = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
PLAN = (
    "num_heads",
    "head_dim_ckv",
    "head_dim_kpe",
    "page_size",
    "causal",
    "sm_scale",
    "q_data_type",
    "kv_data_type",
)
PARTS = ("q_nope", "q_pe", "ckv_cache", "kpe_cache")
PAIRS = ("query", "kv_cache")
RUN = ("out", "lse", "return_lse")
NATURAL = "return_lse_base_on_e"
LAYOUTS = {"query_layout": "split", "kv_cache_layout": "split"}
# The first release whose kernels compute the place of a page in 64 bits (flashinfer PR 3136).
WIDE_PAGES = (0, 6, 11)


class Release:
    """The installed flashinfer, imported when it is first asked about."""

    def __init__(self, install: str) -> None:
        self._vendor = VendorModule("flashinfer.mla", (CLASS,), install)

    def reasons(self) -> list[str]:
        """Return why it cannot be used (empty if it can)."""
        found = self._vendor.reasons()
        if found:
            return found
        plan = (*PLAN, "metadata") if self._structured else (*FLAT, *PLAN)
        run = (*(PAIRS if self._paired else PARTS), *RUN)
        return missing(self.wrapper.plan, f"{CLASS}.plan", plan) + missing(
            self.wrapper.run, f"{CLASS}.run", run
        )

    @property
    def wrapper(self) -> Any:
        """The class."""
        return getattr(self._vendor, CLASS)

    @functools.cached_property
    def declares_lse(self) -> bool:
        """Whether a plan says if its runs return the log-sum-exp."""
        return self._structured and accepts(self.wrapper.plan, "lse_mode")

    @functools.cached_property
    def wide_pages(self) -> bool:
        """Whether pages are found beyond 2^32 numbers; False where the version is unknown."""
        try:
            version = str(getattr(importlib.import_module("flashinfer"), "__version__", ""))
        except Exception:  # noqa: BLE001  # a broken package raises anything; `reasons` says so
            return False
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
        if numbers is None:
            return False
        found = tuple(int(number) for number in numbers.groups())
        return found > WIDE_PAGES or (found == WIDE_PAGES and "dev" not in version)

    @functools.cached_property
    def _structured(self) -> bool:
        return accepts(self.wrapper.plan, "metadata") and hasattr(self._vendor, TABLES)

    @functools.cached_property
    def _paired(self) -> bool:
        return all(accepts(self.wrapper.run, name) for name in PAIRS)

    @functools.cached_property
    def _natural(self) -> bool:
        return accepts(self.wrapper.run, NATURAL)

    def plan_arguments(self, plan: Mapping[str, Any], lse: bool) -> dict[str, Any]:
        """Return the arguments of `plan` from those of the flat form; `lse`: runs will return it."""
        if not self._structured:
            return dict(plan)
        given = {name: value for name, value in plan.items() if name not in FLAT}
        tables = getattr(self._vendor, TABLES).csr(**{name: plan[name] for name in FLAT})
        layouts = {name: value for name, value in LAYOUTS.items() if accepts(self.wrapper.plan, name)}
        modes = {"lse_mode": "basee" if lse else "none"} if self.declares_lse else {}
        return {"metadata": tables, **given, **layouts, **modes}

    def run(
        self, wrapper: Any, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        """Run a planned wrapper: q [T, h, c + r], cache [pages, page, c + r], out [T, h, c].

        `lse` [T, h] fp32, contiguous, gets the natural logarithm; None where nobody reads it.
        """
        latent = out.shape[-1]
        parts = (q[..., :latent], q[..., latent:], cache[..., :latent], cache[..., latent:])
        if self._paired:
            given: dict[str, Any] = {"query": parts[:2], "kv_cache": parts[2:]}
        else:
            given = dict(zip(PARTS, parts, strict=True))
        if lse is None:
            wrapper.run(**given, out=out)
            return
        natural = {NATURAL: True} if self._natural else {}
        wrapper.run(**given, out=out, lse=lse, return_lse=True, **natural)
        if not natural:
            lse.mul_(math.log(2))
