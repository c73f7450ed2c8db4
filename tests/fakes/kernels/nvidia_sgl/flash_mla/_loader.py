"""Which halves of the wheel were loaded (flash_mla/_loader.py of sgl-flash-mla 1.0.0)."""

from __future__ import annotations

import fake_kernels

_LEGACY_UNAVAILABLE = None


def has_legacy():
    return fake_kernels.HAS_LEGACY["flash_mla"]


def check_ops(use_legacy):
    """Fail as `get_ops` does where the wheel was built without the frozen kernels."""
    if use_legacy and not has_legacy():
        raise RuntimeError(
            "The legacy FlashMLA kernels are not available: built with FLASH_MLA_BUILD_LEGACY=0."
        )
