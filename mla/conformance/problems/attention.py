"""Attention problems: lengths and widths, inputs drawn from a seed, and the truth in float64.

A problem's host side (inputs, truth, the reference's own output) is made once and shared by every op, dtype
by dtype.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from mla.cases.case import OpCase
from mla.cases.memory import Layout
from mla_backends.api import AttentionSpec

Lengths = tuple[int, ...]

PAGE = 64  # tokens
MANY = 1 << 20  # numbers: of problems up to this size many are kept, of larger ones few
MOST_WORDS = 12  # of a label, for lengths
EVEN = 0.1  # magnitude of queries that give all keys about the same weight
AIMED = 3.0  # logit of the key that an aimed query is for, above the logarithm of the number of keys
TILE = 64  # keys: aimed queries look at the first key of the last tile


@dataclass(frozen=True)
class Dims:
    """Widths of one head and of the latent."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int

    @property
    def latent(self) -> int:
        """Width of a cached row."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def key(self) -> int:
        """Width of an expanded key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def scale(self) -> float:
        """The usual softmax scale."""
        return float(self.key**-0.5)


DEEPSEEK = Dims(512, 64, 128, 128)  # what every model of the family has, and every kernel is made for
SMALL = Dims(32, 8, 16, 12)


def attention_spec(
    heads: int, dims: Dims, scale: float, dtype: torch.dtype, device: torch.device
) -> AttentionSpec:
    """Return the contract's description of a layer's attention."""
    return AttentionSpec(
        num_heads=heads,
        kv_lora_rank=dims.kv_lora_rank,
        qk_nope_head_dim=dims.qk_nope_head_dim,
        qk_rope_head_dim=dims.qk_rope_head_dim,
        v_head_dim=dims.v_head_dim,
        softmax_scale=scale,
        dtype=dtype,
        device=device,
    )


@dataclass(frozen=True)
class AttentionProblem:
    """One attention call. `absorbed` is `latent_attention`, otherwise it is `expanded_attention`.

    `magnitude` scales the queries, and with them the logits, whose standard deviation is about 1.7 at 1.
    `aimed` queries see to it that no key can be lost unseen: see `_aimed`.
    """

    absorbed: bool
    query_lens: Lengths
    kv_lens: Lengths
    heads: int = 16
    page_size: int = PAGE  # absorbed only
    causal: bool = True  # absorbed attention always is
    dims: Dims = DEEPSEEK
    scale_factor: float = 1.0
    magnitude: float = 1.0
    aimed: bool = False
    seed: int = 0
    common: int = 0  # first keys of every request that are the same, and whose full pages all share
    query_seed: int | None = None  # of the queries, where keys change and they do not

    @property
    def scale(self) -> float:
        return self.dims.scale * self.scale_factor

    @property
    def label(self) -> str:
        """What is special about the problem, for reports."""
        words = [f"q {_runs(self.query_lens)} kv {_runs(self.kv_lens)}", f"heads {self.heads}"]
        words += [f"page {self.page_size}"] * self.absorbed
        words += ["no mask"] * (not self.causal)
        words += [f"latent {self.dims.kv_lora_rank}"] * (self.dims != DEEPSEEK)
        words += [f"scale {self.scale_factor:g}"] * (self.scale_factor != 1)
        words += [f"magnitude {self.magnitude:g}"] * (self.magnitude != 1)
        words += ["aimed"] * self.aimed
        words += [f"{self.common} in common"] * (self.common != 0)
        words += [f"seed {self.seed}"] * (self.seed != 0)
        return " ".join(words)

    @property
    def numbers(self) -> int:
        """How many numbers the inputs hold, about."""
        rows = sum(self.query_lens) * self.heads + sum(self.kv_lens) * (1 if self.absorbed else self.heads)
        return rows * (self.dims.latent if self.absorbed else self.dims.key)

    @property
    def logits(self) -> int:
        """How many pairs of a query and a key there are, masked ones included."""
        return self.heads * sum(new * keys for new, keys in zip(self.query_lens, self.kv_lens, strict=True))

    def in_pages_of(self, size: int) -> AttentionProblem:
        """Return the problem in other pages, whose truth is the same."""
        return self if self.page_size == size else replace(self, page_size=size)

    @property
    def kind(self) -> str:
        return "latent_attention" if self.absorbed else "expanded_attention"

    def spec(self, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        return attention_spec(self.heads, self.dims, self.scale, dtype, device)

    def case(self, dtype: torch.dtype, device: torch.device) -> OpCase:
        """Return the call without its operands."""
        spec, layout = self.spec(dtype, device), Layout(self.page_size)
        return OpCase(self.kind, spec, self.query_lens, self.kv_lens, causal=self.causal, layout=layout)


def _runs(lengths: Lengths) -> str:
    """Return lengths with repeats shortened, 1x6,5, and of many the first few."""
    groups = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    words = [f"{length}x{count}" if count > 1 else str(length) for length, count in groups]
    if len(words) > MOST_WORDS:
        words = [*words[:3], f"...{len(lengths)} in all, sum {sum(lengths)}"]
    return ",".join(words)


@dataclass(frozen=True)
class AttentionData:
    """The host's side of a problem. Absorbed: keys are latent rows and values their first columns."""

    q: torch.Tensor  # [T, h, dk]
    keys: tuple[torch.Tensor, ...]  # per request [s, 1 or h, dk]
    values: tuple[torch.Tensor, ...]  # per request [s, 1 or h, dv]
    out: torch.Tensor  # [T, h, dv] float64
    lse: torch.Tensor  # [T, h] float64


def data(problem: AttentionProblem, dtype: torch.dtype) -> AttentionData:
    """Draw N(0, 1) inputs in `dtype` and attend them in float64."""
    made = _data_of_many if problem.numbers <= MANY else _data_of_few
    return made(problem.in_pages_of(PAGE), dtype)


def _data(problem: AttentionProblem, dtype: torch.dtype) -> AttentionData:
    dims, heads = problem.dims, problem.heads
    draw = _drawing(problem.seed, dtype)
    if problem.absorbed:
        keys = tuple(draw(length, 1, dims.latent) for length in problem.kv_lens)
        keys = tuple(torch.cat((keys[0][: problem.common], own[problem.common :])) for own in keys)
        values = tuple(rows[..., : dims.kv_lora_rank] for rows in keys)
    else:
        keys = tuple(draw(length, heads, dims.key) for length in problem.kv_lens)
        values = tuple(draw(length, heads, dims.v_head_dim) for length in problem.kv_lens)
    q = _queries(problem, keys, dtype)
    case, every = problem.case(dtype, torch.device("cpu")), torch.cat(keys)
    shared = {"keys": every[:, 0]} if problem.absorbed else {"k": every, "v": torch.cat(values)}
    truth = case.entry.truth(case.spec, {"q": q, **shared, **case.scalars}, case.lengths)
    return AttentionData(q, keys, values, truth["out"], truth["lse"])


_data_of_many = functools.lru_cache(maxsize=512)(_data)
_data_of_few = functools.lru_cache(maxsize=6)(_data)


def _drawing(seed: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Return a function that draws N(0, 1) numbers of a shape, in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def _queries(problem: AttentionProblem, keys: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Draw the queries [T, h, dk]."""
    seed = problem.seed if problem.query_seed is None else problem.query_seed
    draw = _drawing(-1 - seed, dtype)  # others than those of the keys
    width = problem.dims.latent if problem.absorbed else problem.dims.key
    q = draw(sum(problem.query_lens), problem.heads, width) * problem.magnitude
    if not problem.aimed:
        return q
    parts = zip(q.split(list(problem.query_lens)), keys, strict=True)
    return torch.cat([_aimed(part, rows, problem, index) for index, (part, rows) in enumerate(parts)])


def _aimed(q: torch.Tensor, keys: torch.Tensor, problem: AttentionProblem, request: int) -> torch.Tensor:
    """Aim three of four queries of a request at one key each: the last, a tile's first, and any.

    The key has nearly all the weight, so that the output is another one without it. The rest see all keys
    alike: they miss what is lost in bulk.
    """
    (tokens, heads, _), length = q.shape, keys.shape[0]
    if not tokens or not length:
        return q
    token, head = torch.arange(tokens)[:, None], torch.arange(heads)[None]
    last = (length - tokens + token).clamp_min(0) if problem.causal else torch.full((tokens, 1), length - 1)
    kind = (token * heads + head + request) % 4
    anywhere = (token * 7919 + head * 104729 + request * 1299709) % (last + 1)
    place = torch.where(kind == 0, last, torch.where(kind == 1, last // TILE * TILE, anywhere))
    chosen = keys[place, head if keys.shape[1] > 1 else 0].double()
    logit = AIMED + (last + 1).double().log()
    at = chosen * (logit / problem.scale / chosen.square().sum(-1).clamp_min(1))[..., None]
    return torch.where((kind == 3)[..., None], q * (EVEN / problem.magnitude), at.to(q.dtype))


def cumulative(lengths: Sequence[int]) -> list[int]:
    """Return where each request starts, and the end of the last."""
    return [0, *itertools.accumulate(lengths)]
