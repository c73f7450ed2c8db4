"""Files and configs go by their shortest telling names."""

from __future__ import annotations

import itertools

import pytest

from mla.bench.report.names import config_names, short_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/b/run.json"], ["run.json"]),
        (["/a/x.json", "/b/y.json"], ["x.json", "y.json"]),
        (["/r/old/run.json", "/r/new/run.json"], ["old/run.json", "new/run.json"]),
        (["/r/old/deep/run.json", "/r/new/deep/run.json"], ["old/…/run.json", "new/…/run.json"]),
        (["C:\\r\\a\\run.json", "C:\\r\\b\\run.json"], ["a/run.json", "b/run.json"]),
        (["run.json", "a/run.json"], ["run.json", "a/run.json"]),
        (["", "/", "run.json"], ["", "/", "run.json"]),
    ],
)
def test_names_are_as_short_as_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert list(short_names(paths).values()) == names


def test_different_paths_never_share_a_name() -> None:
    every = ["/".join(parts) for length in (1, 2, 3, 4) for parts in itertools.product("ab", repeat=length)]
    every += [f"./{path}" for path in every] + [f"{path}/x/run.json" for path in every]
    assert len(set(short_names(every).values())) == len(every)


def test_a_config_goes_without_extension_unless_that_tells_it_apart() -> None:
    assert list(config_names(["/x/tiny.json", "deepseek-v2-lite"]).values()) == ["tiny", "deepseek-v2-lite"]
    assert list(config_names(["/x/tiny.json", "tiny"]).values()) == ["tiny.json", "tiny"]
