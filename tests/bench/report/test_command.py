"""The command `report`: what it writes, what it refuses, and that it never destroys a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_it_writes_one_page_and_overwrites_only_a_page(bench: Any, files: list[str]) -> None:
    done = bench("report", *files, "--html", "out.html")
    assert (done.code, done.out) == (0, "")
    assert done.error.startswith("wrote out.html: 22 cases of 2 files, ")
    first = Path("out.html").read_bytes()
    assert first.startswith(b"<!doctype html>")
    assert bench("report", files[0], "--html", "out.html").code == 0
    second = Path("out.html").read_bytes()
    assert second.startswith(b"<!doctype html>")
    assert second != first
    assert sorted(path.name for path in Path().iterdir()) == ["one.json", "out.html", "two.json"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        *(
            (name, f"cannot write '{name}': it is one of the result files; name another file.")
            for name in ("two.json", "alias.html")
        ),
        (
            "notes.txt",
            "cannot write 'notes.txt': it exists and is not a report; remove it or name another file.",
        ),
        ("gone/out.html", "cannot write 'gone/out.html': there is no folder 'gone'."),
        (".", "cannot write '.': it is a folder."),
    ],
)
def test_no_other_file_is_overwritten(bench: Any, files: list[str], target: str, message: str) -> None:
    Path("notes.txt").write_text("precious")
    Path("alias.html").symlink_to("one.json")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    done = bench("report", *files, "--html", target)
    assert (done.code, done.err) == (2, f"error: {message}\n")
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.usefixtures("files")
def test_an_unreadable_file_is_one_sentence_and_no_page(bench: Any) -> None:
    Path("broken.json").write_text("{}")
    for name, message in (
        ("gone.json", "error: cannot read 'gone.json': No such file or directory."),
        ("broken.json", "error: 'broken.json' is not a result file: "),
    ):
        done = bench("report", "one.json", name, "--html", "out.html")
        assert done.code == 2
        assert done.err.startswith(message)
        assert len(done.err.splitlines()) == 1
    assert not Path("out.html").exists()


def test_usage(bench: Any) -> None:
    assert bench("report", "--html", "out.html").code == 2
    assert "Missing option '-o'" in bench("report", "/dev/null").err


def test_a_page_without_a_name_is_called_as_the_first_file(bench: Any, files: list[str]) -> None:
    assert bench("report", *files).code == bench("report", *files, "-o", "out.html").code == 0
    assert Path("one.html").read_bytes() == Path("out.html").read_bytes()
    Path("one.html").write_text("precious")
    done = bench("report", *files)
    assert (done.code, Path("one.html").read_text()) == (2, "precious")


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
@pytest.mark.usefixtures("files")
def test_missing_libraries_are_one_sentence(process: Any, tmp_path: Path, library: str) -> None:
    (tmp_path / f"{library}.py").write_text(f"raise ModuleNotFoundError('no {library}')")
    done = process("report", "one.json", "--html", "out.html", path=[tmp_path])
    assert done.code == 2
    assert done.err == (
        f"error: a report needs matplotlib and jinja2, and one cannot be imported (no {library}): "
        "`pip install matplotlib jinja2`, or in a checkout `pip install '.[report]' ./backends`.\n"
    )
    assert not (tmp_path / "out.html").exists()
    for words in (("show", "one.json"), ("compare", "one.json", "two.json"), ("report", "--help")):
        assert process(*words, path=[tmp_path]).code == 0, words
