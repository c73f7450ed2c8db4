"""A layer assembled from third-party kernels, with the fastest candidate for each part.

One product per projection over all new tokens, then absorbed attention over the latents (decode) or ordinary
attention over rebuilt keys and values (prefill), then the output projection.

The cache is one contiguous tensor, requests back to back, each with room for its final length. Positions,
slots, rotations and masks of every step are computed before timing, which slightly favours the peers: our
layer computes them in every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from mla.bench.subjects.base import Facts, LayerImplementation
from mla.bench.subjects.inputs import History, Inputs, Turn
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.config import MLAConfig
from mla.errors import MLAError
from mla.layer.rope import RotaryTable
from mla.verify.layer_oracle import State

TRIAL_S, MIN_TRIALS = 0.1, 4  # of each candidate for a part

Product = Callable[[torch.Tensor], torch.Tensor]  # x [T, k] -> [T, n]
BatchedProduct = Callable[[torch.Tensor], torch.Tensor]  # x [T, h, k] -> [T, h, n]
LatentAttention = Callable[[torch.Tensor, int], torch.Tensor]  # q [T, h, c + r], step -> [T, h, c]
Attention = Callable[[torch.Tensor, int], torch.Tensor]  # q [T, h, n + r] rotated, step -> [T, h, v]


class Unavailable(MLAError):
    """A peer that cannot run here; the message says why."""


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
        and config.is_ops_alone
        and config.q_latent_scale == config.kv_latent_scale == 1
    )
    if not plain:
        raise Unavailable(
            f"assembled peers compute DeepSeek's layer only, and '{config.name}' differs from it."
        )


def fastest(candidates: Mapping[str, Callable[[], object]]) -> str:
    """Return the name of the candidate with the shortest single time; trials are interleaved."""
    if len(candidates) == 1:
        return next(iter(candidates))
    best = dict.fromkeys(candidates, float("inf"))
    end, done = time.perf_counter() + TRIAL_S * len(candidates), 0
    while done < MIN_TRIALS or time.perf_counter() < end:
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            best[name] = min(best[name], time.perf_counter() - start)
        done += 1
    return min(best, key=best.__getitem__)


def built(
    what: str, makers: Mapping[str, Callable[[], Callable[..., object]]]
) -> dict[str, Callable[..., object]]:
    """Build the candidates that support this machine and shapes. Raises `Unavailable` if none does."""
    made, refused = {}, []
    for name, make in makers.items():
        try:
            made[name] = make()
        # RuntimeError: torch and its extensions reject a dtype, shape or processor.
        # AttributeError: this build of torch lacks the library and so its ops.
        except (RuntimeError, AttributeError) as error:
            refused.append(f"{name}: {str(error).partition(chr(10))[0]}")
    if not made:
        raise Unavailable(f"cannot compute {what}: {'; '.join(refused)}.")
    return made


@dataclass(frozen=True)
class Toolbox:
    """The candidates a peer may choose from, by name."""

    product: Mapping[str, Callable[[torch.Tensor, int], Product]]  # weight [n, k], tokens
    batched: Mapping[str, Callable[[torch.Tensor], BatchedProduct]]  # weight [h, n, k]
    decode: Mapping[str, Callable[[PeerProblem], LatentAttention]]
    prefill: Mapping[str, Callable[[Parts], Attention]]


class Parts:
    """A layer's weights split for one scenario, each prepared once by its fastest candidate."""

    def __init__(self, problem: PeerProblem, state: State, tools: Toolbox) -> None:
        self.problem, self._state, self._tools = problem, state, tools
        self.chosen: dict[str, str] = {}
        config, tokens = problem.config, problem.scenario.tokens
        self._heads = (config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim)
        first = "q_proj" if config.q_lora_rank is None else "q_a_proj"
        names = (f"{first}.weight", "kv_a_proj_with_mqa.weight")
        self.first = self._product("qkv_a", torch.cat([state[name] for name in names]), tokens)
        self.q_b = (
            None if config.q_lora_rank is None else self._product("q_b", state["q_b_proj.weight"], tokens)
        )
        self.o = self._product("o_proj", state["o_proj.weight"], tokens)

    def _product(self, role: str, weight: torch.Tensor, tokens: int) -> Product:
        x = torch.randn(tokens, weight.shape[1]).to(weight.dtype)
        return self._choose(role, self._tools.product, (weight, tokens), (x,))

    def kv_b(self, tokens: int) -> Product:
        """Return the product that rebuilds keys and values [S, h * (n + v)] from latents [S, c]."""
        return self._product("kv_b", self._state["kv_b_proj.weight"], tokens)

    def absorb(self) -> tuple[BatchedProduct, BatchedProduct]:
        """Return the products with W_UK, [T, h, n] -> [T, h, c], and W_UV, [T, h, c] -> [T, h, v]."""
        n = self.problem.config.qk_nope_head_dim
        weight = self._state["kv_b_proj.weight"].unflatten(0, self._heads)
        w_uk, w_uv = weight[:, :n].transpose(1, 2).contiguous(), weight[:, n:].contiguous()
        return self._batched("w_uk", w_uk), self._batched("w_uv", w_uv)

    def _batched(self, role: str, weight: torch.Tensor) -> BatchedProduct:
        x = torch.randn(self.problem.scenario.tokens, weight.shape[0], weight.shape[2]).to(weight.dtype)
        return self._choose(role, self._tools.batched, (weight,), (x,))

    def attention(self) -> Attention:
        """Return the attention of the scenario's mode, from rotated queries to values of every head."""
        problem, config = self.problem, self.problem.config
        heads, tokens = config.num_attention_heads, problem.scenario.tokens
        problem.rows.nan_to_num_(nan=0.0)  # trials read new slots too; `reset` poisons them again
        if problem.scenario.mode == "prefill":
            q = torch.randn(tokens, heads, config.qk_head_dim).to(problem.dtype)
            return self._choose("expanded_attention", self._tools.prefill, (self,), (q, 0))
        q = torch.randn(tokens, heads, config.latent_dim).to(problem.dtype)
        attend = self._choose(
            "latent_attention", self._tools.decode, (problem,), (q, problem.scenario.inputs // 2)
        )
        return absorbed(self, attend)

    def _choose(
        self,
        role: str,
        makers: Mapping[str, Callable[..., Any]],
        given: tuple[Any, ...],
        trial: tuple[Any, ...],
    ) -> Any:
        """Return the fastest candidate on `trial` of those made from `given`, and record its name."""

        def maker(make: Callable[..., Any]) -> Callable[[], Any]:
            def made() -> Any:
                candidate = make(*given)
                candidate(*trial)  # a kernel that rejects its arguments does so here
                return candidate

            return made

        candidates = built(role, {name: maker(make) for name, make in makers.items()})
        name = fastest({name: partial(candidate, *trial) for name, candidate in candidates.items()})
        self.chosen[role] = name
        return candidates[name]


def absorbed(parts: Parts, attend: LatentAttention) -> Attention:
    """Return attention over the latents, with W_UK before it and W_UV after it."""
    w_uk, w_uv = parts.absorb()
    n = parts.problem.config.qk_nope_head_dim

    def attention(q: torch.Tensor, step: int) -> torch.Tensor:
        joined = torch.cat((w_uk(q[..., :n]), q[..., n:]), dim=-1)
        return w_uv(attend(joined, step))

    return attention


class Assembled(LayerImplementation):
    """A peer: the fastest candidate of one toolbox for each part of a scenario."""

    tools: Toolbox  # of a subclass
    _problem: PeerProblem  # of the scenario that is loaded

    def __init__(self, setting: Setting, state: State) -> None:
        super().__init__(setting)
        self._state = state

    @torch.no_grad()
    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        again = hasattr(self, "_parts") and self.loaded(scenario)
        self.prepare_buffers(scenario, inputs)
        if again:  # what is timed stays what was chosen
            self._problem.load(inputs.history)
        else:
            self._prepare(scenario, inputs)
        self.restore()

    def _prepare(self, scenario: Scenario, inputs: Inputs) -> None:
        """Choose the fastest candidate for each part."""
        config = self.setting.config
        self._problem = PeerProblem(config, scenario, self.setting.dtype, inputs.history)
        self._parts = Parts(self._problem, self._state, self.tools)
        self._attention = self._parts.attention()
        self._widths = (
            config.q_lora_rank or config.num_attention_heads * config.qk_head_dim,
            config.kv_lora_rank,
            config.qk_rope_head_dim,
        )

    def restore(self, number: int = 0) -> None:
        super().restore(number)
        self._problem.reset()

    def take(self, turn: Turn) -> None:
        super().take(turn)
        self._problem.sign_history(turn.signs.tolist())

    @torch.no_grad()
    def step(self, index: int) -> None:
        step = self._problem.scenario.step(index)
        q, kv, pe = self._parts.first(self.x).split(self._widths, dim=-1)
        self._write(kv, pe, step)
        heads = self._attention(self._queries(q, step), step)
        self.out.copy_(self._parts.o(heads.flatten(1)))

    def _write(self, kv: torch.Tensor, pe: torch.Tensor, step: int) -> None:
        """Normalize and rotate the new latents and write them to their slots."""
        normed = self._norm(kv, "kv_a_layernorm")
        rotated = rotate(pe[:, None], self._problem.rotations[step])[:, 0]
        self._problem.rows.index_copy_(0, self._problem.slots[step], torch.cat((normed, rotated), dim=1))

    def _queries(self, q: torch.Tensor, step: int) -> torch.Tensor:
        """Return the queries [T, h, n + r], rotated."""
        config = self.setting.config
        if self._parts.q_b is not None:
            q = self._parts.q_b(self._norm(q, "q_a_layernorm"))
        q = q.unflatten(1, (config.num_attention_heads, config.qk_head_dim))
        q_pe = q[..., config.qk_nope_head_dim :]
        q_pe.copy_(rotate(q_pe, self._problem.rotations[step]))
        return q

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self._state[f"{name}.weight"]
        return functional.rms_norm(x, weight.shape, weight, self.setting.config.rms_norm_eps)

    def facts(self) -> Facts:
        loaded = hasattr(self, "_parts")
        return Facts(
            cache_bytes=self._problem.rows.nbytes if loaded else 0,
            weight_bytes=sum(weight.nbytes for weight in self._state.values()),
            ops=self._parts.chosen if loaded else {},
        )
