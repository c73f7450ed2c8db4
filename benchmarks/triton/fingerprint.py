"""What the table depends on, as a number that is in it: kernels, and what is launched with which tiles."""

from __future__ import annotations

import hashlib
import tokenize
from collections.abc import Iterator
from pathlib import Path

import mla_backends.triton_ops as ops
from benchmarks.triton.shipped import CURRENT, PORTABLE

KERNELS = Path(ops.__file__).parent / "jit"
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING)


def fingerprint() -> str:
    """Return it; comments and the shape of lines do not change it."""
    found = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.py")):
        found.update("\n".join((path.name, *code(path))).encode())
    for shipped in (*CURRENT, *PORTABLE):
        for name, case in shipped.cases().items():
            found.update(f"{name} {case.to_json()}".encode())
    return found.hexdigest()[:16]


def code(path: Path) -> Iterator[str]:
    """Yield the tokens of a file that Python acts upon."""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type not in SILENT:
                yield token.string.strip(" \t")
