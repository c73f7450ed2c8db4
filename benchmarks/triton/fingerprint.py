"""What the table depends on, as a number that is in it: the kernels, and what they are compiled for."""

from __future__ import annotations

import hashlib
import tokenize
from collections.abc import Iterator
from pathlib import Path

import mla_backends.triton_ops as ops
from benchmarks.triton.cases import Case
from benchmarks.triton.shipped import CURRENT, PORTABLE
from benchmarks.triton.sources import kernel_of, specialised

KERNELS = Path(ops.__file__).parent / "jit"
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING)


def fingerprint() -> str:
    """Return it. Comments, the shape of lines and run-time numbers do not change it."""
    found = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.py")):
        found.update("\n".join((path.name, *code(path))).encode())
    for shipped in (*CURRENT, *PORTABLE):
        for name, case in shipped.cases().items():
            found.update(f"{name} {_compiled_for(case)}".encode())
    return found.hexdigest()[:16]


def _compiled_for(case: Case) -> str:
    known = specialised(kernel_of(case.kernel).params, case.arguments)
    return f"{case.kernel} {known} {case.warps} {case.stages} {case.target}"


def code(path: Path) -> Iterator[str]:
    """Yield the tokens of a file that Python acts upon."""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type not in SILENT:
                yield token.string.strip(" \t")
