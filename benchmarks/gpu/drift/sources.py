"""The Python files of a wheel, an archive or a folder, and where a name of theirs is defined."""

from __future__ import annotations

import ast
import functools
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.drift.signatures import Function, Signature, decorated, signature
from mla.errors import UsageError

DEEPEST = 12  # imports that are followed from one name
_Definition = Function | ast.ClassDef


class Lost(Exception):
    """A name that is not where it was expected; the text says what is missing."""


class Sources:
    """Text by path, with `/`. A folder above the packages (`name-1.0/`, `src/`) does not matter."""

    def __init__(self, label: str, files: dict[str, str]) -> None:
        self.label = label  # distribution and version, for sentences
        self._files = files

    def signature(self, module: str, name: str) -> Signature:
        """Return the signature of a function, or of a method ("Class.method"). Raises `Lost`."""
        owner, _, method = name.partition(".")
        home, found = self._find(module, owner, 0)
        if not method:
            if isinstance(found, ast.ClassDef):
                raise Lost(f"{module}.{name} is a class, not a function")
            return signature(found, method=False)
        inner = self._method(home, found, method, 0)
        if inner is None:
            raise Lost(f"{module}.{owner} has no method {method}")
        return signature(inner, method=True)

    @functools.cache  # noqa: B019  # one object per command
    def _tree(self, module: str) -> tuple[ast.Module, bool] | None:
        """Return a module's tree and whether it is a package; None if there is no such file."""
        path = module.replace(".", "/")
        for end, package in ((".py", False), ("/__init__.py", True)):
            for name in sorted(self._files, key=len):
                if name == path + end or name.endswith(f"/{path}{end}"):
                    return ast.parse(self._files[name]), package
        return None

    def _find(self, module: str, name: str, depth: int) -> tuple[str, _Definition]:
        """Return the module that defines a name, and the definition, following imports. Raises `Lost`."""
        tree = self._tree(module)
        if tree is None:
            raise Lost(f"there is no module {module}")
        body = list(_statements(tree[0].body))
        defined = [
            statement for statement in body if isinstance(statement, _Definition) and statement.name == name
        ]
        if defined:
            return module, _last(defined)
        if depth < DEEPEST:
            for target, inner in _bindings(body, module, tree[1], name):
                try:
                    return self._find(target, inner, depth + 1)
                except Lost:
                    continue
        raise Lost(f"{module} has no {name}")

    def _method(self, module: str, owner: _Definition, name: str, depth: int) -> Function | None:
        """Return a method of a class or of one of its bases."""
        if not isinstance(owner, ast.ClassDef) or depth > DEEPEST:
            return None
        own = [
            statement
            for statement in _statements(owner.body)
            if isinstance(statement, Function) and statement.name == name
        ]
        if own:
            found = _last(own)
            assert isinstance(found, Function)
            return found
        for base in owner.bases:
            try:
                home, parent = self._find(module, ast.unparse(base), 0)
            except Lost:
                continue
            if found_there := self._method(home, parent, name, depth + 1):
                return found_there
        return None


def _last(defined: list[_Definition] | list[Function]) -> _Definition:
    """Return the definition that counts: the last that is no overload."""
    real = [one for one in defined if isinstance(one, ast.ClassDef) or not decorated(one, "overload")]
    return (real or defined)[-1]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, also those below if, else and try; what except handlers do is a substitute."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(statement, field, []))


def _bindings(body: list[ast.stmt], module: str, package: bool, name: str) -> Iterator[tuple[str, str]]:
    """Yield the modules and names that a name may stand for: imports, aliases, and then stars."""
    stars = []
    for statement in body:
        if isinstance(statement, ast.ImportFrom):
            target = _absolute(statement, module, package)
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    yield target, alias.name
                elif alias.name == "*":
                    stars.append(target)
        elif (
            isinstance(statement, ast.Assign)
            and isinstance(statement.value, ast.Name)
            and name in _names(statement)
        ):
            yield module, statement.value.id
    yield from ((target, name) for target in stars)


def _names(assigned: ast.Assign) -> set[str]:
    return {target.id for target in assigned.targets if isinstance(target, ast.Name)}


def _absolute(found: ast.ImportFrom, module: str, package: bool) -> str:
    """Return the module that is imported from, without leading dots."""
    if not found.level:
        return found.module or ""
    parts = module.split(".")
    parents = parts[: len(parts) - found.level + package]
    return ".".join([*parents, *([found.module] if found.module else [])])


def read(path: Path, label: str) -> Sources:
    """Return the Python files of a wheel, zip, tar or folder. Raises `UsageError`."""
    try:
        if path.is_dir():
            files = {
                one.relative_to(path).as_posix(): _decode(one.read_bytes()) for one in path.rglob("*.py")
            }
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".py")]
                files = {name: _decode(archive.read(name)) for name in names}
        else:
            files = _untarred(path)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read '{path}' as a folder, wheel, zip or tar: {error}.") from error
    return Sources(label, files)


def _untarred(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        found = ((one.name, archive.extractfile(one)) for one in archive if one.name.endswith(".py"))
        return {name: _decode(file.read()) for name, file in found if file is not None}


def _decode(data: bytes) -> str:
    return data.decode(errors="replace")
