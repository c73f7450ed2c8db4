"""Drift between libraries and adapters, on wheels made here: every kind is one sentence; no network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import wheels
from benchmarks.gpu.drift import compare as comparison
from benchmarks.gpu.drift.catalog import FAKES, LIBRARIES, Call, Library
from benchmarks.gpu.drift.sources import Lost, Sources, given, read
from mla.errors import UsageError

PROGRAM = Path(wheels.__file__)
FAKE = """
class Wrapper:
    def plan(self, lengths, page, scale=None, layout="split", *, causal=False): ...
"""
CALLS = (Call("Wrapper.plan", ("lengths", "page", "scale"), "acme.mla", "acme", where_taken=("log",)),)
PLAN = "class Wrapper:\n    def plan"
# The real library's definition -> what is said about it.
KINDS = {
    FAKE: [],
    PLAN + "(self, lengths, page, scale=1, layout='split', log=0, *, causal=False): ...": [],
    PLAN + "(self, *args, **kwargs): ...": [],
    PLAN + "(self, lengths, scale=None, layout='split', *, causal=False): ...": [
        "acme 1.0: Wrapper.plan has no argument `page`, which the adapter passes",
        "acme 1.0: Wrapper.plan has no argument `page`, which the fake acme takes",
    ],
    PLAN + "(self, lengths, page, scale, /, layout='split', *, causal=False): ...": [
        "acme 1.0: Wrapper.plan has no argument `lengths`, which the adapter passes",
        "acme 1.0: Wrapper.plan has no argument `page`, which the adapter passes",
        "acme 1.0: Wrapper.plan has no argument `scale`, which the adapter passes",
    ],
    PLAN + "(self, lengths, page, width, scale=None, layout='split', *, causal=False): ...": [
        "acme 1.0: Wrapper.plan needs an argument `width`, which the adapter does not pass",
    ],
    PLAN + "(self, lengths, page, scale=None, layout='split', *, causal): ...": [
        "acme 1.0: Wrapper.plan needs an argument `causal`, which the adapter does not pass",
        "acme 1.0: Wrapper.plan has no default for `causal`, which the adapter leaves out and the fake acme "
        "has the default False for",
    ],
    PLAN + "(self, lengths, page, scale=None, layout='packed', *, causal=False): ...": [
        "acme 1.0: Wrapper.plan has the default 'packed' for `layout`, which the adapter leaves out and the "
        "fake acme has the default 'split' for",
    ],
    "class Wrapper:\n    def replan(self): ...": [
        "acme 1.0: acme.mla.Wrapper has no method plan, which the adapter calls"
    ],
    "def wrapper(): ...": ["acme 1.0: acme.mla has no Wrapper, which the adapter calls"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the made-up library a fake."""
    folder = tmp_path / "fakes" / "acme" / "acme"
    folder.mkdir(parents=True)
    (folder / "mla.py").write_text(FAKE)
    monkeypatch.setattr(comparison, "FAKES", tmp_path / "fakes")


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """Write a wheel that pip accepts."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {
            **files,
            **{f"{stem}.dist-info/{name}": text for name, text in info.items()},
        }.items():
            archive.writestr(file, text)
    return path


def sources(folder: Path, label: str, files: dict[str, str]) -> Sources:
    """Write files, and read them."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read(folder, label)


@pytest.mark.parametrize(("definition", "drift"), KINDS.items())
def test_every_kind_of_drift_is_a_sentence(tmp_path: Path, definition: str, drift: list[str]) -> None:
    real = given(wheel(tmp_path, "acme", "1.0", {"acme/mla.py": definition}), "acme")
    result = comparison.compare(Library("acme", CALLS), real)
    assert result.drift == drift
    assert result.checked == 1


def test_new_arguments_that_nobody_needs_are_notes(tmp_path: Path) -> None:
    definition = FAKE.replace("*, causal", "sinks=None, *, causal")
    result = comparison.compare(
        Library("acme", CALLS), sources(tmp_path, "acme 1.0", {"acme/mla.py": definition})
    )
    assert result.drift == []
    assert result.notes == ["acme 1.0: Wrapper.plan also takes `sinks`, which the fake acme does not know"]


def test_values_by_place_are_counted(tmp_path: Path) -> None:
    library = Library("acme", (Call("planned", (), "acme", "none", placed=2),))
    for text, drift in {
        "def planned(a, b, c=1): ...": [],
        "def planned(*args, **kwargs): ...": [],
        "def planned(a): ...": [
            "acme: planned takes fewer than the 2 values that the adapter passes by place"
        ],
        "def planned(a, b, c): ...": ["acme: planned needs an argument `c`, which the adapter does not pass"],
        "def planned(a, *, b): ...": [
            "acme: planned takes fewer than the 2 values that the adapter passes by place",
            "acme: planned needs an argument `b`, which the adapter does not pass",
        ],
    }.items():
        assert comparison.compare(library, sources(tmp_path, "acme", {"acme.py": text})).drift == drift


DEFINED = "def f(here): ..."


@pytest.mark.parametrize(
    "files",
    [
        {"p/__init__.py": DEFINED},
        {"p-1.0/src/p/__init__.py": DEFINED},
        {"p/__init__.py": "from .inner import f", "p/inner.py": DEFINED},
        {"p/__init__.py": "from p.inner import g as f", "p/inner.py": "def g(here): ..."},
        {
            "p/__init__.py": "from .a import *",
            "p/a.py": "from .b.c import *",
            "p/b/__init__.py": "",
            "p/b/c.py": DEFINED,
        },
        {"p/__init__.py": "from .a import f", "p/a/__init__.py": "from ..b import f", "p/b.py": DEFINED},
        {"p/__init__.py": "def g(here): ...\nf = g"},
        {"p/__init__.py": f"try:\n    {DEFINED}\nexcept ImportError:\n    def f(*any): ..."},
        {"p/__init__.py": "try:\n    from .a import f\nexcept ImportError:\n    f = g", "p/a.py": DEFINED},
        {"p/__init__.py": f"if True:\n    {DEFINED}"},
        {"p/__init__.py": f"@overload\ndef f(a): ...\n@overload\ndef f(b): ...\n@api(trace=1)\n{DEFINED}"},
        {"p/__init__.py": f"{DEFINED}\n@typing.overload\ndef f(a): ..."},
        {"p/__init__.py": f"import p\n{DEFINED}", "other/p/__init__.py": "def f(wrong): ..."},
    ],
    ids=lambda files: files.get("p/__init__.py", "src").splitlines()[0],
)
def test_a_name_is_followed_to_its_definition(tmp_path: Path, files: dict[str, str]) -> None:
    assert [*sources(tmp_path, "p", files).signature("p", "f")] == ["here"]


def test_a_method_may_come_from_a_base_class_elsewhere(tmp_path: Path) -> None:
    files = {
        "p/__init__.py": "from .base import Base\nclass C(Base):\n    def other(self): ...",
        "p/base.py": """
class Base:
    @staticmethod
    def s(a): ...
    @classmethod
    def f(cls, b, /, c=None): ...
""",
    }
    package = sources(tmp_path, "p", files)
    assert [*package.signature("p", "C.s")] == ["a"]
    taken = package.signature("p", "C.f")
    assert [*taken] == ["b", "c"]
    assert not taken.takes("b")
    assert taken["c"].default == "None"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "there is no module p"),
        ({"p.py": "g = 1"}, "p has no f"),
        ({"p.py": "from p import f"}, "p has no f"),
        ({"p.py": "class f: ..."}, "p.f is a class, not a function"),
    ],
)
def test_a_name_that_is_not_there_is_said(tmp_path: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(Lost, match=said):
        sources(tmp_path, "p", files).signature("p", "f")


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_the_fakes_themselves_meet_the_adapters(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "FAKES", FAKES)
    for call in library.calls:
        alone = Library(library.name, (call,))
        result = comparison.compare(alone, read(FAKES / call.fake, call.fake))
        assert (result.checked, result.drift) == (1, [])


def command(*words: str, **variables: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull, **variables},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def flashinfer(tmp_path: Path) -> Callable[[str], Path]:
    """Return a maker of flashinfer wheels from our own fake, one word replaced."""

    def make(renamed: str) -> Path:
        text = (FAKES / "flashinfer_07" / "flashinfer" / "mla.py").read_text()
        assert "num_heads=None" in text
        folder = tmp_path / "index"
        folder.mkdir()
        wheel(
            folder,
            "flashinfer-python",
            "9.9",
            {"flashinfer/mla.py": text.replace("num_heads=None", f"{renamed}=None")},
        )
        return folder

    return make


def test_the_command_downloads_and_finds_drift(flashinfer: Callable[[str], Path]) -> None:
    folder = flashinfer("heads")
    done = command("flashinfer-python", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder))
    assert done.returncode == 1
    assert done.stdout.splitlines()[:1] == [
        "flashinfer-python 9.9: BatchMLAPagedAttentionWrapper.plan has no argument `num_heads`, which the "
        "adapter passes"
    ]


def test_the_command_is_content_without_drift(flashinfer: Callable[[str], Path]) -> None:
    (path,) = flashinfer("num_heads").iterdir()
    done = command("--source", f"flashinfer-python={path}")
    assert (done.returncode, done.stdout) == (0, "")
    assert "flashinfer-python 9.9: 5 calls compared, 0 differ" in done.stderr


def test_no_network_is_a_sentence(tmp_path: Path) -> None:
    done = command("tokenspeed-mla", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: pip download tokenspeed-mla failed: ")
    assert line.endswith("give it with --source tokenspeed-mla=FILE.")


@pytest.mark.parametrize(
    ("words", "places", "said"),
    [
        (("flashinfer",), (), "Did you mean 'flashinfer-python'"),
        (("FlashMLA",), (), "FlashMLA has no wheel to download"),
        ((), ("FlashMLA",), "--source takes NAME=PATH"),
        ((), ("Flash=x",), "there is no library 'Flash'"),
    ],
)
def test_wrong_usage_is_a_sentence(words: tuple[str, ...], places: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        wheels.wanted(words, places)


def test_a_source_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no archive")
    for place, said in (
        (str(tmp_path / "none"), "there is no"),
        (str(tmp_path / "text.txt"), "cannot read"),
    ):
        with pytest.raises(UsageError, match=said):
            given(Path(place), "FlashMLA")
