"""What the table depends on, as a number that is in it: the kernels, and what they are compiled for."""

from __future__ import annotations

import ast
import hashlib
import io
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
    """Return it. Comments, lines, run-time numbers, and the file that a kernel is in do not change it."""
    digest = hashlib.sha256()
    for definition in sorted(text for path in KERNELS.glob("*.py") for text in code(path)):
        digest.update(definition.encode())
    for shipped in (*CURRENT, *PORTABLE):
        for name, case in shipped.cases().items():
            digest.update(f"{name} {_compiled_for(case)}".encode())
    return digest.hexdigest()[:16]


def _compiled_for(case: Case) -> str:
    known = specialised(kernel_of(case.kernel).params, case.arguments)
    return f"{case.kernel} {known} {case.warps} {case.stages} {case.target}"


def code(path: Path) -> Iterator[str]:
    """Yield what a file defines, as the tokens that Python acts upon; imports are left out."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)):
            decorators = getattr(node, "decorator_list", [])
            first = min(part.lineno for part in (node, *decorators))
            text = io.StringIO("".join(lines[first - 1 : node.end_lineno]))
            tokens = tokenize.generate_tokens(text.readline)
            yield "\n".join(token.string.strip(" \t") for token in tokens if token.type not in SILENT)
