"""How ranks are laid out, and what cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mla import MLAConfig
from mla.errors import UsageError
from mla.parallel.groups import Groups
from mla.parallel.layout import Layout, Place


def test_ranks_of_a_context_are_neighbours() -> None:
    layout = Layout.parse("dp=2, tp=2,dcp=2")
    assert (layout.world, str(layout)) == (8, "dp=2,tp=2,dcp=2")
    places = [layout.place(rank) for rank in range(8)]
    assert places[:4] == [Place(0, 0, 0), Place(0, 0, 1), Place(0, 1, 0), Place(0, 1, 1)]
    assert places[4:] == [replace(place, dp=1) for place in places[:4]]
    assert layout.groups(layout.head_parts) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups(layout.dcp) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [layout.head_part(rank) for rank in range(8)] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp2", "a layout has tp, dcp and dp at most once, as 'tp=2,dcp=2', got 'tp2'"),
        ("", "a layout has tp, dcp and dp at most once"),
        ("tp=-1", "a layout has tp, dcp and dp at most once"),
        ("tp=0", "tp must be between 1 and 4096, got 0"),
        ("dp=5000", "dp must be between 1 and 4096, got 5000"),
        ("pp=2", "a layout has tp, dcp and dp at most once"),
        ("tp=2,tp=4", "a layout has tp, dcp and dp at most once"),
    ],
)
def test_a_wrong_layout_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Layout.parse(text)


def test_heads_that_cannot_be_split_are_named() -> None:
    config = MLAConfig.preset("deepseek-v2-lite")
    Layout(tp=4, dcp=4).check(config)
    with pytest.raises(UsageError, match=r"'tp=3' splits heads over 3 ranks, and config '.*' has 16"):
        Layout(tp=3).check(config)


def test_without_processes_there_are_no_groups() -> None:
    with pytest.raises(UsageError, match="start this with torchrun or srun"):
        Groups(Layout(tp=2))
