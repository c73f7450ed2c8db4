"""The data of an assembled peer: one scenario's latent cache, lengths and tables.

The cache is one contiguous tensor, requests back to back, each with room for its final length. Positions,
slots, rotations and masks of every step are computed before timing, which slightly favours the peers: our
layer computes them in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.peers.choice import Unavailable
from mla.bench.subjects.inputs import History
from mla.bench.workload.scenario import Scenario
from mla.config import MLAConfig
from mla.layer.rope import RotaryTable


@dataclass(frozen=True)
class LengthGroup:
    """Neighbouring requests of equal length, which one call serves."""

    first: int
    count: int
    size: int  # slots of each request


class PeerProblem:
    """A scenario as tensors on the host; `rows` [slots, c + r] is the cache."""

    def __init__(self, config: MLAConfig, scenario: Scenario, dtype: torch.dtype, history: History) -> None:
        _require_plain(config)
        if scenario.mode == "decode" and set(scenario.query_lens) != {1}:
            raise Unavailable("assembled peers decode one token per request and step.")
        self.config, self.scenario, self.dtype = config, scenario, dtype
        self.sizes = scenario.final_lens
        self.starts = _starts(self.sizes)
        self.lens = [scenario.kv_lens(step) for step in range(scenario.inputs)]
        self.firsts = _starts(scenario.query_lens)  # a request's first row among the new tokens
        self.groups = _groups(self.sizes)
        self.rows = torch.full((sum(self.sizes), config.latent_dim), torch.nan, dtype=dtype)
        self.load(history)
        table = RotaryTable(config, torch.device("cpu"), max(self.sizes)).table
        cos, sin = table.chunk(2, dim=1)
        rotations = torch.complex(cos, sin)
        self.positions = [self._positions(lens) for lens in self.lens]
        self.rotations = [rotations.index_select(0, positions)[:, None] for positions in self.positions]
        self.slots = [positions + self._offsets() for positions in self.positions]

    def load(self, history: History) -> None:
        """Write a history, of the scenario's lengths, to its slots."""
        for start, (kv, pe) in zip(self.starts, history, strict=True):
            self.rows[start : start + kv.shape[0]] = torch.cat((kv, pe), dim=1)
        self._signs = [1] * len(self.sizes)

    def _positions(self, lens: Sequence[int]) -> torch.Tensor:
        pairs = zip(lens, self.scenario.query_lens, strict=True)
        return torch.cat([torch.arange(length - new, length) for length, new in pairs])

    def _offsets(self) -> torch.Tensor:
        new = torch.tensor(self.scenario.query_lens)
        return torch.tensor(self.starts).repeat_interleave(new)

    def reset(self) -> None:
        """Fill every slot past the history with NaN, so that reading one too many is detected."""
        for start, size, past in zip(self.starts, self.sizes, self.scenario.history, strict=True):
            self.rows[start + past : start + size] = torch.nan

    def sign_history(self, signs: Sequence[int]) -> None:
        """Give each request's history a sign, 1 or -1, in place."""
        pairs = zip(self.starts, self.scenario.history, self._signs, signs, strict=True)
        for start, past, was, sign in pairs:
            if was != sign:
                self.rows[start : start + past].neg_()
        self._signs = list(signs)

    def group_rows(self, group: LengthGroup) -> torch.Tensor:
        """Return the cache of a group as a view [count, size, c + r]."""
        start = self.starts[group.first]
        return self.rows[start : start + group.count * group.size].view(group.count, group.size, -1)

    def request_rows(self, request: int) -> torch.Tensor:
        """Return the cache of a request as a view [size, c + r]."""
        return self.rows[self.starts[request] : self.starts[request] + self.sizes[request]]


def rotate(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs of x [T, h, r] by unit complex numbers [T, 1, r/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:request]) for request in range(len(sizes))]


def _groups(sizes: Sequence[int]) -> list[LengthGroup]:
    """Group neighbours with equal final lengths; in decode their lengths are equal in every step."""
    groups: list[LengthGroup] = []
    for request, size in enumerate(sizes):
        if groups and groups[-1].size == size:
            groups[-1] = LengthGroup(groups[-1].first, groups[-1].count + 1, size)
        else:
            groups.append(LengthGroup(request, 1, size))
    return groups


def _require_plain(config: MLAConfig) -> None:
    """Raise `Unavailable` for features that DeepSeek's own models lack and these peers do not compute."""
    plain = (
        not config.attention_bias
        and config.rope_interleave
        and config.rope_theta is not None
        and config.query_scaling is None
        and config.q_latent_scale == config.kv_latent_scale == 1
    )
    if not plain:
        raise Unavailable(
            f"assembled peers compute DeepSeek's layer only, and '{config.name}' differs from it."
        )
