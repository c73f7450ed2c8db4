"""The Python files of a wheel, an archive or a folder: where a name of theirs is defined, and its signature.

Nothing is imported. Wheels come with pip from its index, or from a path that the user gives.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mla.errors import UsageError

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Argument:
    """One argument; `default` is its source text, None if the argument is required."""

    name: str
    default: str | None
    keyword: bool = True  # can be passed by name
    place: bool = True  # can be passed by place


@dataclass(frozen=True)
class Signature:
    """What a function takes, without self."""

    arguments: tuple[Argument, ...]
    any_place: bool  # *args
    any_keyword: bool  # **kwargs

    def find(self, name: str) -> Argument | None:
        """Return the argument of this name."""
        return next((argument for argument in self.arguments if argument.name == name), None)

    def takes(self, name: str) -> bool:
        """Return whether a call may pass `name` by keyword."""
        argument = self.find(name)
        return self.any_keyword if argument is None else argument.keyword

    def placed(self, count: int) -> Sequence[str]:
        """Return the names of the arguments that a call with so many values by place gives."""
        return [argument.name for argument in self.arguments if argument.place][:count]


def signature(function: Function, method: bool) -> Signature:
    """Return the signature of a definition; of a method without its first argument."""
    taken = function.args
    placed = [*taken.posonlyargs, *taken.args]
    none: list[ast.expr | None] = [None]
    defaults = none * (len(placed) - len(taken.defaults)) + list(taken.defaults)
    arguments = [
        Argument(argument.arg, _text(default), keyword=number >= len(taken.posonlyargs))
        for number, (argument, default) in enumerate(zip(placed, defaults, strict=True))
    ][method and not _is_static(function) :]
    arguments += [
        Argument(argument.arg, _text(default), place=False)
        for argument, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True)
    ]
    return Signature(tuple(arguments), taken.vararg is not None, taken.kwarg is not None)


def decorated(function: Function, name: str) -> bool:
    """Return whether a decorator is called `name`, however it is reached."""
    callees = (node.func if isinstance(node, ast.Call) else node for node in function.decorator_list)
    return any(ast.unparse(callee).rpartition(".")[2] == name for callee in callees)


def _is_static(function: Function) -> bool:
    return decorated(function, "staticmethod")


def _text(default: ast.expr | None) -> str | None:
    return None if default is None else ast.unparse(default)


# ----------------------------------------------------------------------------------------------- files

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
        home, definition = self._find(module, owner, 0)
        if not method:
            if isinstance(definition, ast.ClassDef):
                raise Lost(f"{module}.{name} is a class, not a function")
            return signature(definition, method=False)
        inner = self._method(home, definition, method, 0)
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
        methods = [
            statement
            for statement in _statements(owner.body)
            if isinstance(statement, Function) and statement.name == name
        ]
        if methods:
            method = _last(methods)
            assert isinstance(method, Function)
            return method
        for base in owner.bases:
            try:
                home, parent = self._find(module, ast.unparse(base), 0)
            except Lost:
                continue
            if inherited := self._method(home, parent, name, depth + 1):
                return inherited
        return None


def _last(defined: list[_Definition] | list[Function]) -> _Definition:
    """Return the definition that counts: the last that is no overload."""
    real = [node for node in defined if isinstance(node, ast.ClassDef) or not decorated(node, "overload")]
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


def _absolute(statement: ast.ImportFrom, module: str, package: bool) -> str:
    """Return the module that is imported from, without leading dots."""
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    parents = parts[: len(parts) - statement.level + package]
    return ".".join([*parents, *([statement.module] if statement.module else [])])


def read(path: Path, label: str) -> Sources:
    """Return the Python files of a wheel, zip, tar or folder. Raises `UsageError`."""
    try:
        if path.is_dir():
            files = {
                file.relative_to(path).as_posix(): _decode(file.read_bytes()) for file in path.rglob("*.py")
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
        files = ((entry.name, archive.extractfile(entry)) for entry in archive if entry.name.endswith(".py"))
        return {name: _decode(file.read()) for name, file in files if file is not None}


def _decode(data: bytes) -> str:
    return data.decode(errors="replace")


# ----------------------------------------------------------------------------------------------- wheels

DOWNLOAD_SECONDS = 600
# Wheels are only read, so those of any Linux do, and for any Python.
_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64", "linux_x86_64", "any")


def wheel(requirement: str, folder: Path) -> Sources:
    """Download one wheel with pip ("name" or "name==1.0") and read it. Raises `UsageError`."""
    before = set(folder.glob("*.whl"))
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
        "--disable-pip-version-check", "--ignore-requires-python", "--dest", str(folder),
        *(word for name in _PLATFORMS for word in ("--platform", name)), requirement,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UsageError(f"pip download {requirement} took more than {DOWNLOAD_SECONDS} s.") from None
    new = sorted(set(folder.glob("*.whl")) - before) or _named(folder, requirement)
    if done.returncode or not new:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = errors[-1].removeprefix("ERROR: ").rstrip(".") if errors else "it left no wheel"
        raise UsageError(
            f"pip download {requirement} failed: {said}. Without a network, download the wheel elsewhere and "
            f"give it with --source {_name(requirement)}=FILE."
        )
    return given(new[-1], _name(requirement))


def source(name: str, place: str) -> Sources:
    """Read a wheel, archive or folder at a path. Raises `UsageError`."""
    if not Path(place).exists():
        raise UsageError(f"--source {name}: there is no '{place}'.")
    return given(Path(place), name)


def given(path: Path, name: str) -> Sources:
    """Read what is at a path; a wheel's name says its version."""
    version = path.name.split("-")[1] if path.suffix == ".whl" else f"at {path.name or path}"
    return read(path, f"{name} {version}")


def _name(requirement: str) -> str:
    return requirement.partition("==")[0]


def _named(folder: Path, requirement: str) -> list[Path]:
    """Return the wheels of a distribution that were there before."""
    return sorted(folder.glob(f"{_name(requirement).replace('-', '_')}-*.whl"))
