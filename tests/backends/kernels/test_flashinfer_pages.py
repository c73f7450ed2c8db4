"""The page tables of a step: right for any batch, made without a loop over pages, and without waiting."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mla_backends.kernels import FlashInferMla, flashinfer
from mla_backends.kernels.flashinfer import PageIndex


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 1024)


class Lines:
    """Counts the lines of Python that run in a block, in every frame and every turn of a generator."""

    def __enter__(self) -> Lines:
        self.count = 0
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        self.count += 1
        return self._trace


class Launches(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_host_does_as_much_for_many_pages_as_for_few() -> None:
    counted = []
    for pages in (10, 10, 200_000):  # the first is warm-up
        table = torch.arange(2 * pages, dtype=torch.int32).view(2, pages)
        index = PageIndex()
        with Lines() as lines:
            found = index.gather(table, (pages, pages - 3))
        assert torch.equal(found, torch.cat((table[0], table[1, :-3])))
        counted.append(lines.count)
    assert counted[1] == counted[2] < 200


def test_a_whole_plan_has_no_loop_over_pages(installed: Any, make_problem: Any) -> None:
    with installed("flashinfer"):
        problems = [make_problem([1, 1], [length, 7], page_size=1) for length in (20, 20, 3000)]
        counted = []
        for problem in problems:
            op = FlashInferMla()
            op._pool(problem.spec.device).planned = lambda state, lse: None  # the library's own part
            with Lines() as lines:
                op.prepare(problem.spec, problem.view)
            counted.append(lines.count)
        assert counted[1] == counted[2]


@pytest.mark.parametrize("counts", [(0, 0), (3,), (0, 2, 0, 1), (4, 4, 4), (1, 0)])
def test_pages_are_those_of_each_request_in_order(counts: tuple[int, ...]) -> None:
    table = torch.randperm(4 * len(counts)).int().view(len(counts), 4)
    wide = torch.nn.functional.pad(table, (0, 3))[:, :4]  # a table may be a slice of a wider one
    rows = [row[:count] for row, count in zip(table, counts, strict=True)]
    for given in (table, wide):
        assert torch.equal(PageIndex().gather(given, counts), torch.cat(rows))


def test_equal_counts_share_the_places_and_never_the_pages() -> None:
    """The next step of the same requests may find other pages in its table, at the same places."""
    index, table = PageIndex(), torch.arange(12, dtype=torch.int32).view(2, 6)
    assert index.gather(table, (3, 2)).tolist() == [0, 1, 2, 6, 7]
    with Launches() as again:
        assert index.gather(table + 100, (3, 2)).tolist() == [100, 101, 102, 106, 107]
    assert again.count["index_select"] == 1
    assert not {"arange", "repeat_interleave", "_to_copy"} & set(again.count)
    assert index.gather(table, (2, 3)).tolist() == [0, 1, 6, 7, 8]  # as many, elsewhere
    wide = torch.arange(16, dtype=torch.int32).view(2, 8)
    assert index.gather(wide, (2, 3)).tolist() == [0, 1, 8, 9, 10]
    assert index.gather(table[:1], (2,)).tolist() == [0, 1]


def test_nothing_is_read_back_from_the_device() -> None:
    with Launches() as launches:
        PageIndex().gather(torch.arange(12, dtype=torch.int32).view(2, 6), (5, 6))
    assert not {"_local_scalar_dense", "item", "nonzero"} & set(launches.count)
