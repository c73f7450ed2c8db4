"""What tests of the core share: a layer on a poisoned cache, attention problems with their truth, checks.

The checks are the same for right and for deliberately wrong code (test_mutations.py). Errors are relative,
per row of the last dimension: per token for the layer, per token and head for an attention op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mla import MLA, LatentCache, MLAConfig, RaggedBatch
from mla.cases.case import OpCase
from mla.cases.memory import Layout
from mla.cases.played import Laid
from mla.config import YarnScaling
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict
from mla_backends import FusedOp
from mla_backends.api import AttentionSpec
from mla_backends.testing import HostBackend

# Per token, for the whole layer with tiny heads; 9.7e-3 and 7e-7 were measured.
LAYER_BOUND = {torch.bfloat16: 2e-2, torch.float32: 1e-5}

Lengths = Sequence[int]
DTYPES = (torch.float32, torch.bfloat16)


def _row_errors(out: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return |out - truth| / |truth| over the last dimension, in float64."""
    scale = truth.double().norm(dim=-1).clamp_min(1e-300)
    return (out.double() - truth.double()).norm(dim=-1) / scale


@pytest.fixture(scope="session")
def assert_rows_close() -> Callable[[torch.Tensor, torch.Tensor, float], None]:
    """Return a check that every row is finite and within a relative error."""

    def check(out: torch.Tensor, truth: torch.Tensor, bound: float) -> None:
        assert out.shape == truth.shape
        assert out.isfinite().all(), "the output has NaN or infinity"
        worst = _row_errors(out, truth).max().item() if out.numel() else 0.0
        assert worst <= bound, f"worst row error {worst:.3g} > {bound:.3g}"

    return check


# ----------------------------------------------------------------------------------------------- layer


@dataclass
class Case:
    """A layer, one step's batch and everything the oracle needs to judge the output."""

    config: MLAConfig
    layer: MLA
    cache: LatentCache
    ids: list[int]
    batch: RaggedBatch
    hidden: torch.Tensor
    state: dict[str, torch.Tensor]
    history: list[tuple[torch.Tensor, torch.Tensor]]
    index: list[torch.Tensor | None]  # per request the index keys [s, D] of its history

    def run(self, **kwargs: Any) -> torch.Tensor:
        return self.layer(self.hidden, self.batch, *self.cache.of_layer(0), **kwargs)

    def truth(self) -> torch.Tensor:
        """Return the outputs, given what the layer selected in its last run."""
        given = (self.config, self.state, self.hidden, self.batch.query_lens, self.history)
        return oracle(*given, selection=self.layer.selection)


def index_keys(config: MLAConfig, length: int, dtype: torch.dtype, seed: int) -> torch.Tensor | None:
    """Return random index keys [s, D], N(0, 1); None of a config without an indexer."""
    if not config.index_n_heads:
        return None
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randn(length, config.index_head_dim, generator=generator).to(dtype)


@pytest.fixture(scope="session")
def make_case(tiny: Any, make_history: Any) -> Callable[..., Case]:
    """Return a maker of cases. Every slot that no request owns is NaN, and pages are handed out shuffled.

    `layer_config` builds the layer from another config than the oracle, for tests that expect a failure.
    """

    def make(
        query_lens: Lengths,
        history_lens: Lengths,
        config: MLAConfig | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "auto",
        page_size: int = 16,
        hidden_scale: float = 1.0,
        history_scale: float = 1.0,
        ops: Mapping[str, FusedOp] | None = None,
        layer_config: MLAConfig | None = None,
        seed: int = 0,
        cache_format: str | None = None,
        index_format: str | None = None,
    ) -> Case:
        config = config or tiny()
        backend = HostBackend(ops=ops) if ops else None
        formats = {"cache_format": cache_format, "index_format": index_format}
        layer = MLA(layer_config or config, backend=backend, dtype=dtype, attention=attention, **formats)
        state = random_state_dict(config, seed, dtype)
        layer.load_state_dict(state)
        history = [
            (kv * history_scale, pe * history_scale)
            for kv, pe in make_history(config, history_lens, dtype, seed + 1)
        ]
        tokens = sum(query_lens) + sum(history_lens) + 2 * page_size * len(query_lens) + 1
        cache = LatentCache(
            config, max_tokens=tokens, page_size=page_size, dtype=dtype, shuffle=seed, **formats
        )
        for pages in (cache.pages, cache.index_pages):
            pages.fill_(torch.nan if pages.is_floating_point() else 255)
        ids = cache.new_sequences(len(query_lens))
        index = [index_keys(config, length, dtype, seed + 3) for length in history_lens]
        for sequence, past, keys in zip(ids, history, index, strict=True):
            cache.load(sequence, *past, index=keys)
        batch = cache.extend(ids, query_lens)
        generator = torch.Generator().manual_seed(seed + 2)
        hidden = torch.randn(sum(query_lens), config.hidden_size, generator=generator, device="cpu")
        hidden *= hidden_scale
        return Case(config, layer, cache, ids, batch, hidden.to(dtype), state, history, index)

    return make


@pytest.fixture(scope="session")
def check_layer(make_case: Any, tiny: Any, assert_rows_close: Any) -> Callable[..., None]:
    """Return a check of a layer against the oracle over the steps in which the classic bugs show.

    Keyword arguments are those of `make_case`; `mutate` turns the right config into the layer's own.
    """
    steps: tuple[tuple[Lengths, Lengths, float], ...] = (
        ((5, 1, 20), (0, 0, 0), 1.0),  # prefill: a mask bug shows
        ((3, 9, 2), (40, 7, 16), 1.0),  # short history
        ((1, 1, 1), (33, 47, 65), 1.0),  # decode: a page bug shows
        ((4, 2), (0, 5), 1e-2),  # inputs so small that eps counts
    )

    def check(
        mutate: Callable[[MLAConfig], MLAConfig] | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> None:
        yarn = YarnScaling(40, 64, mscale=0.707, mscale_all_dim=0.707)
        config = tiny(q_lora_rank=24, rope_scaling=yarn)
        for query_lens, history_lens, scale in steps:
            case = make_case(
                query_lens,
                history_lens,
                config,
                hidden_scale=scale,
                dtype=dtype,
                layer_config=mutate(config) if mutate else None,
                **kwargs,
            )
            assert_rows_close(case.run(), case.truth(), LAYER_BOUND[dtype])

    return check


# ----------------------------------------------------------------------------------------- attention ops


def attention_case(kind: str, query_lens: Lengths, kv_lens: Lengths, **changes: Any) -> OpCase:
    """Return a call of attention with small heads, over shuffled pages if it has any."""
    spec = AttentionSpec(3, 32, 16, 8, 12, 24**-0.5, torch.float32, torch.device("cpu"))
    layout = Layout(16, shuffle=1, unowned=torch.nan)
    return OpCase(kind, spec, tuple(query_lens), tuple(kv_lens), layout=layout).but(**changes)


@pytest.fixture(scope="session")
def check_latent() -> Callable[[FusedOp], None]:
    """Return a check of a latent attention op against float64, per token and head, out and lse."""
    steps = (((5, 1, 20), (5, 1, 20)), ((3, 1, 9, 2), (40, 7, 30, 18)), ((1,) * 6, (33, 16, 47, 3, 65, 1)))
    return lambda op: check_op("latent_attention", op, *steps)


@pytest.fixture(scope="session")
def check_expanded() -> Callable[..., None]:
    """Return a check of an expanded attention op against float64, per token and head, out and lse."""

    def check(
        op: FusedOp,
        query_lens: Lengths = (5, 1, 20, 3),
        kv_lens: Lengths = (5, 9, 20, 31),
        **changes: Any,
    ) -> None:
        check_op("expanded_attention", op, (query_lens, kv_lens), **changes)

    return check


def check_op(kind: str, op: FusedOp, *steps: tuple[Lengths, Lengths], **changes: Any) -> None:
    for dtype in DTYPES:
        for lengths in steps:
            reason = Laid(attention_case(kind, *lengths, dtype=dtype, **changes), op).call()
            assert not reason, reason
