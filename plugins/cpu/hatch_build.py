"""Puts the compiled kernels into the wheel, which is a platform wheel then; see "Kernels" in README.md."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "MLA_CPU_KERNELS"
CHOICES = ("auto", "require", "off")


class KernelsHook(BuildHookInterface):
    """Compiles all levels, if a compiler is here; an editable installation compiles at first use."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get(VARIABLE) or "auto"
        if wanted not in CHOICES:
            self.app.abort(f"{VARIABLE} must be auto, require or off, but is '{wanted}'.")
        if version == "editable" or wanted == "off":
            return
        folder = str(Path(self.root, "mla_backend_cpu"))
        sys.path.insert(0, folder)  # not the package, whose dependencies are not here
        try:
            import compilation
        finally:
            sys.path.remove(folder)  # its other modules must not stand in for somebody else's
        self._compilation = compilation
        try:
            self._add_kernels(build_data, wanted == "require")
        except (compilation.BuildError, OSError) as error:
            self._without(wanted == "require", f"no kernels in this wheel, since {error}")

    def _add_kernels(self, build_data: dict[str, Any], all_of_them: bool) -> None:
        """Compile, and tell hatchling what belongs into the wheel. Raises `BuildError` or OSError."""
        compilation = self._compilation
        if platform.system() != "Linux" or sys.byteorder != "little":
            raise OSError(f"they need little-endian Linux, and this is {platform.platform()}")
        command = compilation.find_compiler()
        target = compilation.compiled_machine(command)
        self.app.display_info(f"compiling the CPU kernels for {target} with {command[0]} ...")
        self._folder = tempfile.TemporaryDirectory()
        made = compilation.make_all_kernels(command, target, Path(self._folder.name))
        for level, reason in made.items():
            self._without(all_of_them, f"no kernels for {level} in this wheel, since {reason}")
        build_data["force_include"][self._folder.name] = "mla_backend_cpu/kernels"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{target}"  # reached through ctypes: any Python 3

    def _without(self, fatal: bool, message: str) -> None:
        if fatal:
            self.app.abort(f"{message} ({VARIABLE}=require).")
        self.app.display_warning(message)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()
