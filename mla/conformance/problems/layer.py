"""The whole layer on a poisoned cache: problems, their truth from the oracle, and running them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mla.cache import LatentCache
from mla.cache.ragged_batch import RaggedBatch
from mla.config import MLAConfig, YarnScaling
from mla.conformance.problems.attention import Lengths
from mla.conformance.trial import CheckFailed, Trial
from mla.layer.attention import MLA
from mla.verify.layer_check import Checker
from mla.verify.layer_oracle import oracle
from mla.verify.poison import Poison
from mla.weights import random_state_dict

History = list[tuple[torch.Tensor, torch.Tensor]]  # per request kv [s, c] normed, pe [s, r] rotated

# Small, but with the head widths that kernels are made for: without and with a query LoRA.
PLAIN = MLAConfig(
    256, 16, rope_scaling=YarnScaling(40, 4096, mscale=0.707, mscale_all_dim=0.707), name="plain"
)
LORA = MLAConfig(
    192, 16, q_lora_rank=128, rope_scaling=YarnScaling(40, 4096, mscale=1.0, mscale_all_dim=1.0), name="lora"
)
# What few models have: biases, and channels rotated in halves.
VARIANT = MLAConfig(192, 16, q_lora_rank=128, attention_bias=True, rope_interleave=False, name="variant")
MODES = ("auto", "absorbed", "expanded")


@dataclass(frozen=True)
class LayerProblem:
    """`steps` forwards of a layer in a row, with the same new tokens per request each."""

    query_lens: Lengths
    history: Lengths
    config: MLAConfig = PLAIN
    steps: int = 1
    seed: int = 0
    model: int = 0  # seed of the weights

    @property
    def label(self) -> str:
        steps = f", {self.steps} steps" * (self.steps > 1)
        lengths = ",".join(f"{new}+{old}" for new, old in zip(self.query_lens, self.history, strict=True))
        return f"{self.config.name}, new+old {lengths}{steps}"


@dataclass(frozen=True)
class LayerData:
    """The host's side of a problem."""

    state: dict[str, torch.Tensor]
    history: History
    hidden: torch.Tensor  # [steps, T, d]
    truth: torch.Tensor  # [steps, T, d] float64


@functools.lru_cache(maxsize=8)
def weights(config: MLAConfig, dtype: torch.dtype, model: int = 0) -> dict[str, torch.Tensor]:
    """Return host weights N(0, 1 / fan_in)."""
    return random_state_dict(config, model, dtype)


@functools.lru_cache(maxsize=64)
def data(problem: LayerProblem, dtype: torch.dtype) -> LayerData:
    """Draw N(0, 1) inputs; all steps' truth comes from one prefill of all their tokens."""
    generator = torch.Generator().manual_seed(problem.seed + 7)
    config, state = problem.config, weights(problem.config, dtype, problem.model)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    widths = (config.kv_lora_rank, config.qk_rope_head_dim)
    history = [(draw(length, widths[0]), draw(length, widths[1])) for length in problem.history]
    hidden = draw(problem.steps, sum(problem.query_lens), config.hidden_size)
    by_request = hidden.split(list(problem.query_lens), dim=1)  # each [steps, t, d]
    lengths = [length * problem.steps for length in problem.query_lens]
    flat = oracle(config, state, torch.cat([one.flatten(0, 1) for one in by_request]), lengths, history)
    parts = [one.unflatten(0, (problem.steps, -1)) for one in flat.split(lengths) if len(one)]
    return LayerData(state, history, hidden, torch.cat(parts, dim=1))


@dataclass
class PreparedLayer:
    """A layer and a cache holding a problem's history, with all other slots poisoned."""

    problem: LayerProblem
    layer: MLA
    cache: LatentCache
    ids: list[int]
    hidden: torch.Tensor  # [steps, T, d] on the device

    def extend(self) -> RaggedBatch:
        """Return the next step's batch."""
        return self.cache.extend(self.ids, self.problem.query_lens)

    def extend_in_shape(self) -> RaggedBatch:
        """Return the next step's batch, with a block table as wide as the last step needs."""
        most = max(_final_lengths(self.problem))
        return self.cache.extend(self.ids, self.problem.query_lens, table_tokens=most)

    def forward(self, step: int, batch: RaggedBatch) -> torch.Tensor:
        """Run one step. What it does not write is NaN."""
        hidden = self.hidden[step]
        return self.layer(hidden, batch, self.cache.pages[0], out=torch.full_like(hidden, torch.nan))

    def run(self) -> torch.Tensor:
        """Run every step and return the outputs [steps, T, d] on the host."""
        outputs = [self.forward(step, self.extend()).cpu() for step in range(self.problem.steps)]
        return torch.stack(outputs)


def make_layer(trial: Trial, config: MLAConfig, attention: str, *, model: int = 0, **arguments: Any) -> MLA:
    """Build a layer with the backend's ops and random weights."""
    layer = MLA(
        config, backend=trial.backend, dtype=trial.dtype, attention=attention, ops=trial.policy, **arguments
    )
    layer.load_state_dict(weights(config, trial.dtype, model))
    return layer


def prepare_layer(
    trial: Trial,
    problem: LayerProblem,
    attention: str = "auto",
    *,
    page_size: int = 64,
    shuffle: int = 0,
    layer: MLA | None = None,
    **arguments: Any,
) -> PreparedLayer:
    """Set up a problem: history in shuffled pages, poison in every other slot."""
    made = data(problem, trial.dtype)
    layer = layer or make_layer(trial, problem.config, attention, model=problem.model, **arguments)
    cache, ids = _filled(problem, made.history, trial.dtype, trial.device, page_size, shuffle)
    final = _final_lengths(problem)
    Poison(cache, ids, final, layer.ops["latent_attention"].op.nan_safe_tail).apply()
    return PreparedLayer(problem, layer, cache, ids, made.hidden.to(trial.device, copy=True))


def _final_lengths(problem: LayerProblem) -> list[int]:
    pairs = zip(problem.query_lens, problem.history, strict=True)
    return [old + new * problem.steps for new, old in pairs]


def _filled(
    problem: LayerProblem,
    history: History,
    dtype: torch.dtype,
    device: torch.device,
    page_size: int = 64,
    shuffle: int = 0,
) -> tuple[LatentCache, list[int]]:
    """Return a cache that holds the history and has room for every step, and the sequences."""
    pages = sum(-(-length // page_size) for length in _final_lengths(problem)) + 3
    cache = LatentCache(
        problem.config,
        max_tokens=pages * page_size,
        page_size=page_size,
        device=device,
        dtype=dtype,
        shuffle=shuffle,
    )
    ids = cache.new_sequences(len(problem.history))
    for sequence, (kv, pe) in zip(ids, history, strict=True):
        cache.load(sequence, kv, pe)
    return cache, ids


@functools.lru_cache(maxsize=64)
def reference(problem: LayerProblem, dtype: torch.dtype) -> torch.Tensor:
    """Return the reference's outputs on the host."""
    made = data(problem, dtype)
    layer = MLA(problem.config, dtype=dtype)
    layer.load_state_dict(made.state)
    cache, ids = _filled(problem, made.history, dtype, torch.device("cpu"))
    return PreparedLayer(problem, layer, cache, ids, made.hidden).run()


def judge(trial: Trial, problem: LayerProblem, found: torch.Tensor) -> None:
    """Compare outputs [steps, T, d] with the oracle, by the runner's rules. Raises `CheckFailed`."""
    checker = Checker(data(problem, trial.dtype).truth, trial.dtype, lambda: reference(problem, trial.dtype))
    verdict = checker.check(found, held_to_reference=True)
    trial.worst = max(verdict.error_ratio or 0.0, trial.worst or 0.0)
    if verdict.status != "ok":
        raise CheckFailed(verdict.reason)


def check_layer(
    trial: Trial, *problems: LayerProblem, modes: Sequence[str] = MODES, **arguments: Any
) -> None:
    """Run problems in every attention mode, one case each."""
    for problem in problems:
        for mode in modes:
            with trial.case(f"{mode}, {problem.label}"):
                judge(trial, problem, prepare_layer(trial, problem, mode, **arguments).run())
