"""Kernels with a mistake in their source, in the place of the real ones."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KERNELS = "mla_backends.triton_ops.jit"


@dataclass(frozen=True)
class Mutant:
    """One mistake: in the file `room` of the device code, `old` becomes `new`."""

    name: str
    room: str
    old: str
    new: str

    @contextmanager
    def installed(self, folder: Path) -> Iterator[None]:
        """Let ops start the kernels with the mistake, which are written to `folder`.

        Raises `LookupError` if the source has no such text, or has it several times.
        """
        package = importlib.import_module(KERNELS)
        shutil.copytree(Path(str(package.__file__)).parent, folder, dirs_exist_ok=True)
        file = folder / f"{self.room}.py"
        source = file.read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise LookupError(
                f"{self.room}.py has this {source.count(self.old)} times, not once: {self.old!r}"
            )
        file.write_text(source.replace(self.old, self.new), encoding="utf-8")
        real, path = _taken_out(), package.__path__
        package.__path__ = [str(folder)]
        try:
            yield
        finally:
            _taken_out()
            package.__path__ = path
            sys.modules.update(real)


def mistakes(room: str, texts: Mapping[str, tuple[str, str]]) -> tuple[Mutant, ...]:
    """Return the mistakes of a file of the device code: name -> what its source has, and what it becomes."""
    return tuple(Mutant(name, room, old, new) for name, (old, new) in texts.items())


def _taken_out() -> dict[str, object]:
    """Forget the kernels' modules, so that they are imported again, and return them."""
    names = [name for name in sys.modules if name.startswith(f"{KERNELS}.")]
    return {name: sys.modules.pop(name) for name in names}
