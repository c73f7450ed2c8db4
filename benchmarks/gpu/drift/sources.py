"""The Python files of a wheel, an archive or a folder: where a name of theirs is defined, and its signature.

Nothing is imported. Wheels come with pip from its index, or from a path that the user gives.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from inspect import Parameter
from pathlib import Path

from mla.errors import UsageError

Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = Function | ast.ClassDef
DEEPEST = 12  # imports that are followed from one name


class Lost(Exception):
    """A name that is not where it was expected; the text says what is missing."""


class Signature(dict[str, Parameter]):
    """What a function takes, by name and without self. A default is its source text."""

    def of(self, *kinds: inspect._ParameterKind) -> list[str]:
        """Return the names of the parameters of these kinds."""
        return [name for name, parameter in self.items() if parameter.kind in kinds]

    @property
    def named(self) -> dict[str, Parameter]:
        """What is not *args or **kwargs."""
        gathers = self.of(Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        return {name: parameter for name, parameter in self.items() if name not in gathers}

    @property
    def any_keyword(self) -> bool:
        """Whether it has **kwargs."""
        return bool(self.of(Parameter.VAR_KEYWORD))

    def takes(self, name: str) -> bool:
        """Return whether a call may pass `name` by keyword."""
        if name in self.named:
            return name in self.of(Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        return self.any_keyword

    def placed(self, count: int) -> list[str]:
        """Return the names of the parameters that a call with so many values by place gives."""
        return self.of(Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)[:count]


def signature(function: Function, method: bool) -> Signature:
    """Return the signature of a definition; of a method without its first argument."""
    taken = copy.deepcopy(function.args)
    for argument in ast.walk(taken):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    taken.defaults = [_text(default) for default in taken.defaults]
    taken.kw_defaults = [default and _text(default) for default in taken.kw_defaults]
    alone = ast.Expression(ast.Lambda(taken, ast.Constant(None)))
    compiled = compile(ast.fix_missing_locations(alone), "<signature>", "eval")
    parameters = list(inspect.signature(eval(compiled)).parameters.items())  # constants only
    return Signature(parameters[method and not decorated(function, "staticmethod") :])


def _text(default: ast.expr) -> ast.expr:
    return ast.Constant(ast.unparse(default))


def decorated(function: Function, name: str) -> bool:
    """Return whether a decorator is called `name`, however it is reached."""
    callees = (node.func if isinstance(node, ast.Call) else node for node in function.decorator_list)
    return any(ast.unparse(callee).rpartition(".")[2] == name for callee in callees)


class Sources:
    """Text by path, with `/`. A folder above the packages (`name-1.0/`, `src/`) does not matter."""

    def __init__(self, label: str, files: dict[str, str]) -> None:
        self.label = label  # distribution and version, for sentences
        self._files = files

    def signature(self, module: str, name: str) -> Signature:
        """Return the signature of a function, or of a method ("Class.method"). Raises `Lost`."""
        owner, _, method = name.partition(".")
        home, definition = self._find(module, owner)
        inner = self._method(home, definition, method) if method else definition
        if inner is None:
            raise Lost(f"{module}.{owner} has no method {method}")
        if isinstance(inner, ast.ClassDef):
            raise Lost(f"{module}.{name} is a class, not a function")
        return signature(inner, method=bool(method))

    @functools.cache  # noqa: B019  # one object per command
    def _module(self, module: str) -> tuple[list[ast.stmt], bool]:
        """Return a module's statements and whether it is a package. Raises `Lost`."""
        path = module.replace(".", "/")
        for end in (".py", "/__init__.py"):
            for name in sorted(self._files, key=len):
                if f"/{name}".endswith(f"/{path}{end}"):
                    return list(_statements(ast.parse(self._files[name]).body)), end != ".py"
        raise Lost(f"there is no module {module}")

    def _find(self, module: str, name: str, depth: int = 0) -> tuple[str, _Definition]:
        """Return the module that defines a name, and the definition, following imports. Raises `Lost`."""
        body, package = self._module(module)
        if definition := _defined(body, name):
            return module, definition
        for target, inner in _bindings(body, module, package, name) if depth < DEEPEST else ():
            try:
                return self._find(target, inner, depth + 1)
            except Lost:
                continue
        raise Lost(f"{module} has no {name}")

    def _method(self, module: str, owner: _Definition, name: str, depth: int = 0) -> _Definition | None:
        """Return a method of a class or of one of its bases."""
        if not isinstance(owner, ast.ClassDef) or depth > DEEPEST:
            return None
        if method := _defined(_statements(owner.body), name):
            return method
        for base in owner.bases:
            try:
                inherited = self._method(*self._find(module, ast.unparse(base)), name, depth + 1)
            except Lost:
                continue
            if inherited:
                return inherited
        return None


def _defined(body: Iterator[ast.stmt] | list[ast.stmt], name: str) -> _Definition | None:
    """Return the definition of a name that counts: the last that is no overload."""
    defined = [node for node in body if isinstance(node, _Definition) and node.name == name]
    real = [node for node in defined if isinstance(node, ast.ClassDef) or not decorated(node, "overload")]
    return next(reversed(real or defined), None)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, also those below if, else and try; what except handlers do is a substitute."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, field, []))


def _bindings(body: list[ast.stmt], module: str, package: bool, name: str) -> Iterator[tuple[str, str]]:
    """Yield the modules and names that a name may stand for: imports, aliases, and then stars."""
    stars = []
    for statement in body:
        if isinstance(statement, ast.ImportFrom):
            target = _absolute(statement, module, package)
            names = {alias.asname or alias.name: alias.name for alias in statement.names}
            if name in names:
                yield target, names[name]
            elif "*" in names:
                stars.append(target)
        elif (
            isinstance(statement, ast.Assign)
            and isinstance(statement.value, ast.Name)
            and name in map(ast.unparse, statement.targets)
        ):
            yield module, statement.value.id
    yield from ((target, name) for target in stars)


def _absolute(statement: ast.ImportFrom, module: str, package: bool) -> str:
    """Return the module that is imported from, without leading dots."""
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    parents = parts[: len(parts) - statement.level + package]
    return ".".join([*parents, *filter(None, [statement.module])])


def read(path: Path, label: str) -> Sources:
    """Return the Python files of a wheel, zip, tar or folder. Raises `UsageError`."""
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*.py")}
        return Sources(label, {name: file.read_text(errors="replace") for name, file in files.items()})
    with tempfile.TemporaryDirectory() as folder:
        try:
            shutil.unpack_archive(path, folder, "zip" if zipfile.is_zipfile(path) else None)
        except (OSError, shutil.ReadError) as error:
            raise UsageError(f"cannot read '{path}' as a folder, wheel, zip or tar: {error}.") from error
        return read(Path(folder), label)


# ----------------------------------------------------------------------------------------------- wheels

DOWNLOAD_SECONDS = 600
# Wheels are only read, so those of any Linux do, and for any Python.
_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64", "linux_x86_64", "any")


def wheel(requirement: str) -> Sources:
    """Download one wheel with pip ("name" or "name==1.0") and read it. Raises `UsageError`."""
    name = requirement.partition("==")[0]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
            "--disable-pip-version-check", "--ignore-requires-python", "--dest", folder,
            *(word for platform in _PLATFORMS for word in ("--platform", platform)), requirement,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise UsageError(f"pip download {requirement} took more than {DOWNLOAD_SECONDS} s.") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            said = errors[-1].removeprefix("ERROR: ").rstrip(".") if errors else "pip does not say why"
            raise UsageError(
                f"pip download {requirement} failed: {said}. Without a network, download the wheel elsewhere "
                f"and give it with --source {name}=FILE."
            )
        return given(next(Path(folder).glob("*.whl")), name)


def given(path: Path, name: str) -> Sources:
    """Read a wheel, archive or folder; a wheel's name says its version. Raises `UsageError`."""
    if not path.exists():
        raise UsageError(f"--source {name}: there is no '{path}'.")
    version = path.name.split("-")[1] if path.suffix == ".whl" else f"at {path.name or path}"
    return read(path, f"{name} {version}")
