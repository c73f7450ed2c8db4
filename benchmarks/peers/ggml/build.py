#!/usr/bin/env python3
"""Build the ggml of ik_llama.cpp, or of llama.cpp, and our driver of its ops.

\b
    git clone https://github.com/ikawrakow/ik_llama.cpp
    python benchmarks/peers/ggml/build.py ik_llama.cpp --into ~/ggml-native
    python benchmarks/peers/ggml/build.py ik_llama.cpp --into ~/ggml-avx2 --isa avx2

SOURCE is a checkout, or a folder that holds its `ggml` folder; nothing is written there. Needs CMake 3.14 and
a compiler for C++20, such as GCC 11.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

import click
import msgspec

from benchmarks.peers.ggml.peer import DRIVER, FACTS, PeerError
from mla.command import console
from mla.command.exit_codes import guarded
from mla_backends import host

SOURCES = Path(__file__).parent / "driver"
# Name -> options of ggml. What is not named is off when GGML_NATIVE is.
ISAS = {
    "native": ("-DGGML_NATIVE=ON",),
    "avx2": (
        "-DGGML_NATIVE=OFF",
        *(f"-DGGML_{name}=ON" for name in ("AVX", "AVX2", "FMA", "F16C")),
        *(f"-DGGML_{name}=OFF" for name in ("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")),
    ),
}
# Without kernels for caches below eight bits, which take most of the time and are not compared.
COMMON = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_IQK_FA_ALL_QUANTS=OFF", "--no-warn-unused-cli")


def ggml_folder(source: Path) -> Path:
    """Return the ggml folder of a checkout. Raises `PeerError`."""
    for folder in (source / "ggml", source):
        if (folder / "CMakeLists.txt").is_file() and (folder / "include" / "ggml.h").is_file():
            return folder.resolve()
    raise PeerError(
        f"'{source}' holds no ggml/CMakeLists.txt and ggml/include/ggml.h: give a checkout, such as one of "
        "https://github.com/ikawrakow/ik_llama.cpp."
    )


def commit_of(ggml: Path) -> str:
    """Return the commit of the checkout that holds this folder, "unknown" if it is none of its files."""
    words = ["git", "-C", str(ggml)]
    try:
        tracked = subprocess.run(
            [*words, "ls-files", "--error-unmatch", "CMakeLists.txt"], capture_output=True, check=False
        )
        name = subprocess.run(
            [*words, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return name.stdout.strip() if tracked.returncode == name.returncode == 0 else "unknown"


def facts_of(folder: Path) -> dict[str, str]:
    """Return what was noted when the driver in `folder` was built; empty if nothing was."""
    try:
        return msgspec.json.decode((folder / FACTS).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}


def run(step: str, *words: str) -> None:
    """Run one step, which says itself what is wrong. Raises `PeerError`."""
    console.note(step)
    try:
        done = subprocess.run(words, check=False)
    except FileNotFoundError as error:
        raise PeerError(
            f"{words[0]} is not installed: `pip install {words[0]}`, or take your system's."
        ) from error
    if done.returncode:
        raise PeerError(f"{step} failed, as said above; needed are CMake 3.14 and a compiler for C++20.")


@click.command(help=__doc__)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--into", type=click.Path(path_type=Path), required=True, help="Folder for everything built.")
@click.option(
    "--isa",
    type=click.Choice(list(ISAS)),
    default="native",
    show_default=True,
    help="Instructions for it.",
)
@click.option("--commit", help="The source's commit, where it has no git.")
@click.option("--jobs", type=click.IntRange(1), help="Compilers at a time.  [one per CPU]")
@click.option(
    "--library",
    type=click.Path(path_type=Path),
    help="Its libggml.a, if already built.",
)
def build(
    source: Path, into: Path, isa: str, commit: str | None, jobs: int | None, library: Path | None
) -> None:
    """Carry out the command line."""
    ggml = ggml_folder(source)
    if library and not library.is_file():
        raise PeerError(
            f"there is no library '{library}': name a libggml.a, or leave --library out to build it."
        )
    into.mkdir(parents=True, exist_ok=True)
    where = (f"-DGGML_FOLDER={ggml}", f"-DGGML_LIBRARY={library.resolve() if library else ''}")
    run("configuring", "cmake", "-S", str(SOURCES), "-B", str(into), *COMMON, *ISAS[isa], *where)
    words = ["cmake", "--build", str(into), "--target", DRIVER, "--parallel", str(jobs or host.cpu_limit())]
    run("building", *words)
    facts = {"commit": commit or commit_of(ggml), "isa": "of its library" if library else isa}
    (into / FACTS).write_bytes(msgspec.json.encode(facts))
    console.out(f"built {into / DRIVER} from commit {facts['commit']}\n")


if __name__ == "__main__":
    sys.exit(guarded(lambda: build(standalone_mode=False)))
