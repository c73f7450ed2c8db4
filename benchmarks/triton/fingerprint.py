"""What the table depends on, as a number that is in it: the kernels, and what they are compiled for."""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import mla_backends.triton_ops as ops
from benchmarks.triton.cases import Case
from benchmarks.triton.shipped import CURRENT, PORTABLE, TRITON_3_6, TRITON_3_8
from benchmarks.triton.sources import kernel_of, specialised

KERNELS = Path(ops.__file__).parent / "jit"
READERS = ("counting.py", "resources.py", "sources.py", "worker.py")  # of what a compiler yields
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING)


def fingerprint() -> str:
    """Return it. Comments, docstrings, lines, run-time numbers and the file of a kernel do not change it."""
    other = [tiles for tiles in (*TRITON_3_8, *TRITON_3_6) if tiles not in CURRENT]
    everything = (*CURRENT, *other, *PORTABLE)
    shipped = ((name, case) for tiles in everything for name, case in tiles.cases().items())
    compiled = (f"{name} {_compiled_for(case)}" for name, case in shipped)
    return _digest([*sorted(text for path in KERNELS.glob("*.py") for text in code(path)), *compiled])


def fingerprint_of(case: Case) -> str:
    """Return what the answer to a case depends on: it, its kernel's files, and who reads the answer."""
    module = case.kernel.rpartition(".")[2].partition(":")[0]
    texts = [text for path in sorted(_files(KERNELS / f"{module}.py")) for text in code(path)]
    readers = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in READERS)
    return _digest([case.to_json(), *texts, *readers])


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _files(path: Path) -> set[Path]:
    """Return a file of kernels, and those that it imports."""
    if not path.is_file():  # a kernel from elsewhere
        return set()
    names = re.findall(rf"^from {ops.__name__}\.jit\.(\w+) import", path.read_text(encoding="utf-8"), re.M)
    return {path}.union(*(_files(path.with_name(f"{name}.py")) for name in names))


def _compiled_for(case: Case) -> str:
    known = specialised(kernel_of(case.kernel).params, case.arguments)
    return f"{case.kernel} {known} {case.warps} {case.stages} {case.target} {case.registers}"


def code(path: Path) -> tuple[str, ...]:
    """Return what a file defines, as the tokens that Python acts upon, without imports and docstrings."""
    return _code(path.read_text(encoding="utf-8"))


@cache
def _code(source: str) -> tuple[str, ...]:
    texts = []
    lines, tree = source.splitlines(keepends=True), ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            said = slice(node.body[0].lineno - 1, node.body[0].end_lineno)
            lines[said] = [""] * len(lines[said])
    for node in tree.body:
        if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)):
            decorators = getattr(node, "decorator_list", [])
            first = min(part.lineno for part in (node, *decorators))
            text = io.StringIO("".join(lines[first - 1 : node.end_lineno]))
            tokens = tokenize.generate_tokens(text.readline)
            kept = (token.string.strip(" \t") for token in tokens if token.type not in SILENT)
            texts.append("\n".join(kept))
    return tuple(texts)
