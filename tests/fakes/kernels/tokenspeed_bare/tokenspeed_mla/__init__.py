"""tokenspeed-mla 2.0.4 where CuTe DSL is missing: the import succeeds, the functions raise (__init__.py)."""

from __future__ import annotations

import fake_kernels

_IMPORT_ERROR = ModuleNotFoundError("No module named 'cutlass'", name="cutlass")


def _unavailable(*args, **kwargs):
    fake_kernels.CALLS["unavailable"] += 1
    raise ImportError("tokenspeed_mla requires the NVIDIA CuTe DSL runtime dependencies.") from _IMPORT_ERROR


tokenspeed_mla_decode = tokenspeed_mla_prefill = _unavailable
