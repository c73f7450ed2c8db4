"""`new-backend`: a complete project for the backend of a new device, written from `template/`."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template

import mla
from mla.errors import MLAError
from mla_backends import API_VERSION
from mla_backends.known import KNOWN
from mla_backends.registry import entries

TEMPLATE = Path(__file__).with_name("template")
SUFFIX = ".template"  # keeps linters and type checkers away from templates
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")  # fits a module, a distribution and a torch device
MAX_NAME_LENGTH = 32  # the template's lines are formatted for names up to this length
COMMANDS = """\
pip install -e .
python -m mla.bench doctor {name}
python -m mla.bench --backend {name}
python -m mla.conformance --backend {name} --xfails xfails.txt"""


class NewBackendError(MLAError):
    """The project cannot be written."""


def create(name: str, folder: Path) -> None:
    """Write the project of backend `name` to `folder`, whole or not at all. Raises `NewBackendError`."""
    _check_name(name)
    try:
        _check_folder(folder)
        _write(render(name), folder)
    except OSError as error:
        raise NewBackendError(f"cannot write '{folder}': {error.strerror or error}.") from error


def next_commands(name: str, folder: Path) -> str:
    """Return the message to print once the project is written."""
    lines = [f"cd {shlex.quote(str(folder))}", *COMMANDS.format(name=name).splitlines()]
    listed = "".join(f"  {line}\n" for line in lines)
    return f"wrote the project of backend '{name}'; continue with\n\n{listed}"


def render(name: str) -> dict[str, str]:
    """Return path -> text of every file of the project."""
    major, minor = mla.__version__.split(".")[:2]
    values = {
        "name": name,
        "class_name": "".join(map(str.capitalize, name.split("_"))) + "Backend",
        "package": f"mla_backend_{name}",
        "distribution": f"mla-backend-{name.replace('_', '-')}",
        "extension": f"torch_{name}",
        "api_version": str(API_VERSION),
        "bound": f">={major}.{minor},<{major}.{int(minor) + 1}",
        "commands": COMMANDS.format(name=name),
    }
    project = {}
    for source in sorted(TEMPLATE.rglob(f"*{SUFFIX}")):
        path = source.relative_to(TEMPLATE).as_posix().removesuffix(SUFFIX)
        text = Template(source.read_text(encoding="utf-8")).substitute(values)
        project[re.sub("^package/", f"{values['package']}/", path)] = text
    return project


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise NewBackendError(
            f"'{name}' is not a valid backend name: use up to {MAX_NAME_LENGTH} lower-case letters, digits "
            "and single underscores, starting with a letter, as in 'acme' or 'acme_npu'."
        )
    owners = [entry.origin for entry in entries() if entry.name == name]
    if not owners and name in KNOWN:
        owners = ["a backend of this project"]
    if name == "torch":  # its class would be TorchBackend
        owners = ["torch itself"]
    if owners:
        raise NewBackendError(f"the name '{name}' is taken by {' and '.join(owners)}: choose another.")


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        fault = "it is not empty" if any(folder.iterdir()) else ""
    elif os.path.lexists(folder):
        fault = "it is not a folder"
    else:
        fault = "" if folder.parent.is_dir() else f"there is no folder '{folder.parent}'"
    if fault:
        raise NewBackendError(f"cannot write '{folder}': {fault}.")


def _write(files: Mapping[str, str], folder: Path) -> None:
    """Write everything elsewhere on the same file system, then rename it: a disk may fill up before.

    A folder that is there is kept: it may be a shell's working directory.
    """
    place = folder if folder.is_dir() else folder.parent
    with tempfile.TemporaryDirectory(prefix=".new-backend-", dir=place) as staging:
        for path, text in files.items():
            target = Path(staging, "project", path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for entry in Path(staging, "project").iterdir():
            entry.rename(folder / entry.name)
