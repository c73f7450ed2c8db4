"""What a layout's memory holds, against adding up the weights and tokens of every rank."""

from __future__ import annotations

import math

import pytest

from mla import MLAConfig
from mla.cost import parameters
from mla.errors import UsageError
from mla.parallel.layout import Layout, capacity, layouts
from mla.weights import weight_shapes

GIB = 2**30


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-r1", "kimi-k2"])
@pytest.mark.parametrize("text", ["tp=1", "tp=8", "dcp=8", "dp=8", "dp=2,tp=2,dcp=2"])
def test_tokens_are_what_is_left_after_the_weights(name: str, text: str) -> None:
    config, layout = MLAConfig.preset(name), Layout.parse(text)
    room = capacity(config, layout, 80 * GIB, layers=27)
    shapes = weight_shapes(config.with_heads(config.num_attention_heads // layout.head_parts))
    weights = 27 * 2 * sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
    assert room.weight_bytes == weights
    held = (80 * GIB - weights) // (27 * 2 * 576)  # on one device
    assert room.tokens == held * layout.world // layout.tp
    assert room.copies == layout.tp


def test_all_layouts_of_a_size_are_found_and_no_others() -> None:
    splits = list(layouts(MLAConfig.preset("deepseek-v2-lite"), 12))
    assert len(splits) == len(set(splits))
    assert set(splits) == {
        Layout(tp, dp, dcp)
        for tp in range(1, 13)
        for dp in range(1, 13)
        for dcp in range(1, 13)
        if tp * dp * dcp == 12 and 16 % (tp * dcp) == 0
    }


def test_index_keys_take_room_in_the_layers_that_have_an_indexer() -> None:
    """GLM-5.2 has one in 21 of 78 layers; DeepSeek-V3.2 in all of its."""
    glm = MLAConfig.preset("glm-5.2")
    room = capacity(glm, Layout(), 80 * GIB, layers=78)
    indexer = 32 * 128 * 2048 + 6144 * (128 + 32)
    assert room.weight_bytes == 2 * (78 * (parameters(glm) - indexer) + 21 * indexer)
    assert room.tokens == (80 * GIB - room.weight_bytes) // (2 * (78 * 576 + 21 * 128))
    deepseek = MLAConfig.preset("deepseek-v3.2")
    alone = capacity(deepseek, Layout(), 80 * GIB, layers=1)
    assert alone.tokens == (80 * GIB - alone.weight_bytes) // (2 * (576 + 128))
    stored = capacity(deepseek, Layout(), 80 * GIB, 1, cache_format="fp8_ds_mla", index_format="fp8")
    assert stored.tokens == (80 * GIB - stored.weight_bytes) // (656 + 132)
    assert capacity(deepseek, Layout(), 80 * GIB, 1, index_format="plain") == alone


def test_contexts_are_not_split_where_an_indexer_selects_from_them() -> None:
    config = MLAConfig.preset("deepseek-v3.2")
    assert {layout.dcp for layout in layouts(config, 8)} == {1}
    with pytest.raises(UsageError, match="needs whole contexts to select from: leave out dcp"):
        capacity(config, Layout(dcp=8), 80 * GIB, layers=61)
