"""The Python files of a wheel, an archive or a folder: where a name of theirs is defined, and its signature.

Nothing is imported: griffe reads the sources. Wheels come with pip from its index, or from a path.
"""

from __future__ import annotations

import ast
import atexit
import functools
import inspect
import shutil
import subprocess
import sys
import tempfile
import zipfile
from inspect import Parameter
from pathlib import Path

import griffe

from mla.errors import UsageError

KINDS = {kind.description: kind for kind in inspect._ParameterKind}  # griffe's words are Python's
MOST_NAMES = 12  # assignments that are followed from one name


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


def signature(function: griffe.Function) -> Signature:
    """Return the signature of a definition; of a method without its first argument."""
    method = function.parent is not None and function.parent.is_class
    own = list(function.parameters)[method and "staticmethod" not in function.labels :]
    return Signature({each.name: _parameter(each) for each in own})


def _parameter(taken: griffe.Parameter) -> Parameter:
    assert taken.kind is not None
    kind = KINDS[taken.kind.value]
    gathers = kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    default = Parameter.empty if gathers or taken.default is None else str(taken.default)
    return Parameter(taken.name, kind, default=default)


class _Tried(griffe.Extension):
    """Leaves out what except handlers do, which is a substitute."""

    def on_module_node(self, *, node: ast.AST | griffe.ObjectNode, **_: object) -> None:
        for tried in ast.walk(node) if isinstance(node, ast.AST) else ():
            if isinstance(tried, ast.Try):
                tried.handlers.clear()


class Sources:
    """The packages in a folder. What is above them (`name-1.0/`, `src/`) does not matter."""

    def __init__(self, label: str, folder: Path) -> None:
        self.label, self._folder = label, folder  # the label is distribution and version, for sentences

    def signature(self, module: str, name: str) -> Signature:
        """Return the signature of a function, or of a method ("Class.method"). Raises `Lost`."""
        owner, _, method = name.partition(".")
        definition = self._definition(module, owner)
        if method and not (definition.is_class and method in definition.all_members):
            raise Lost(f"{module}.{owner} has no method {method}")
        inner = _followed(definition.all_members[method]) if method else definition
        if not isinstance(inner, griffe.Function):
            raise Lost(f"{module}.{name} is a {inner.kind.value}, not a function")
        return signature(inner)

    def _definition(self, module: str, name: str) -> griffe.Object:
        """Return what a name of a module stands for: imports and assignments are followed. Raises `Lost`."""
        known = self._modules(module)
        for _ in range(MOST_NAMES):
            try:
                target = _followed(known[f"{module}.{name}"])
            except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
                break
            if not (isinstance(target, griffe.Attribute) and isinstance(target.value, griffe.ExprName)):
                return target
            module, name = target.module.path, target.value.name
        raise Lost(f"{module} has no {name}")

    @functools.cache  # noqa: B019  # one object per command
    def _modules(self, module: str) -> griffe.ModulesCollection:
        """Return the modules of a package, read. Raises `Lost` where this one is not there."""
        places = (module.replace(".", "/") + end for end in (".py", "/__init__.py"))
        files = [file for place in places for file in self._folder.rglob(place)]
        if not files:
            raise Lost(f"there is no module {module}")
        file = min(files, key=lambda path: len(path.parts))
        root = file.parents[module.count(".") + (file.name == "__init__.py")]
        tried = griffe.load_extensions(_Tried)
        loader = griffe.GriffeLoader(search_paths=[root], allow_inspection=False, extensions=tried)
        loader.load(module.partition(".")[0], try_relative_path=False)
        loader.resolve_aliases(implicit=True, external=False)
        return loader.modules_collection


def _followed(target: griffe.Object | griffe.Alias) -> griffe.Object:
    return target.final_target if isinstance(target, griffe.Alias) else target


def read(path: Path, label: str) -> Sources:
    """Return the Python files of a wheel, zip, tar or folder. Raises `UsageError`."""
    if path.is_dir():
        return Sources(label, path)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        shutil.unpack_archive(path, folder, "zip" if zipfile.is_zipfile(path) else None)
    except (OSError, shutil.ReadError) as error:
        raise UsageError(f"cannot read '{path}' as a folder, wheel, zip or tar: {error}.") from error
    return Sources(label, folder)


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
