"""The kernel driver: its version, and what to do when it is older than torch's CUDA asks for."""

from __future__ import annotations

import re
from pathlib import Path

from mla_backends.cuda import OUTDATED_DRIVER

# Oldest driver -> the newest wheels of torch that run on it, with CUDA's compatibility of minor versions.
WHEELS = ((525, "cu126"), (450, "cu118"))


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of the kernel driver, for hosts without a management library; "" if unknown."""
    found = re.search(r"Module.*?\s(\d+(?:\.\d+)+)\s", file.read_text()) if file.is_file() else None
    return found[1] if found else ""


def outdated(reason: str) -> str:
    """Return what to do if `reason` is that the driver is too old for this torch; "" if it is not."""
    if not OUTDATED_DRIVER.search(reason):
        return ""
    index = f"https://download.pytorch.org/whl/{_wheels(reason)}"
    return f"update the driver, or install torch for an older CUDA: pip install torch --index-url {index}"


def _wheels(reason: str) -> str:
    """Return the folder of wheels for the driver that torch found (12020 is CUDA 12.2), or the one here."""
    cuda = re.search(r"found version (\d+)", reason)
    if cuda:
        return "cu126" if int(cuda[1]) >= 12000 else "cu118"
    major = int(driver_version().partition(".")[0] or 525)
    return next((wheels for oldest, wheels in WHEELS if major >= oldest), "cu118")
