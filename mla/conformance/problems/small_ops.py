"""Problems for projections, norm, rotation and cache write: operands from a seed, and the truth in float64.

Every op but the cache's order of slots works row by row, so the host draws rows once, and a call with more of
them repeats those.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch

from mla.cases.case import OpCase
from mla.conformance.problems.attention import DEEPSEEK, Dims, attention_spec
from mla.reference import REFERENCE
from mla_backends.api import AttentionSpec, LinearSpec, NormSpec

SIZES = 3  # of rows, where they are spread
Parts = tuple[tuple[str, slice], ...]  # names, and columns of the output


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return N(0, 1) on the host."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return [tokens, width] fp32: cosines and then sines of angles all around the circle."""
    turn = 3 * draw(tokens, width // 2, seed=seed)
    return torch.cat((turn.cos(), turn.sin()), dim=1)


@dataclass(frozen=True)
class Host:
    """The host's side of a call. Operands have the contract's names."""

    rows: Mapping[str, torch.Tensor]  # one row per token
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)  # by all tokens
    weight: torch.Tensor | None = None  # to be packed
    truth: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [T, ...] float64, from `host`


@dataclass(frozen=True, kw_only=True)
class SmallProblem:
    """What problems of every kind have."""

    kind: ClassVar[str] = ""
    # Fields that a label has no special words for.
    always: ClassVar[tuple[str, ...]] = ("tokens", "drawn")
    tokens: int
    seed: int = 0
    model: int = 0  # seed of a weight that is packed
    gain: float = 1.0  # of the output
    spread: int = 0  # rows are times 2^-spread, 1 and 2^spread by turns
    drawn: int = 0  # rows drawn, which others repeat; 0: all

    @property
    def label(self) -> str:
        """The size of the problem and what is special about it, for reports."""
        return ", ".join((f"{self.tokens} tokens", self.size_words, *self._special()))

    @property
    def size_words(self) -> str:
        """How large it is apart from tokens."""
        raise NotImplementedError

    def _special(self) -> Iterator[str]:
        """Yield words for what is not as usual."""
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in self.always and value != one.default:
                yield _words(one.name, value)

    @property
    def parts(self) -> Parts:
        """What is judged by itself."""
        return (("out", slice(None)),)

    @property
    def base(self) -> SmallProblem:
        """The problem whose rows this one has."""
        return replace(self, tokens=self.drawn or self.tokens, drawn=0)

    def spec(self, dtype: torch.dtype, device: torch.device) -> Any:
        raise NotImplementedError

    def case(self, dtype: torch.dtype, device: torch.device) -> OpCase:
        """Return the call without its operands."""
        own = {name: value for name, value in vars(self).items() if name in ("biased", "eps", "interleaved")}
        return OpCase(self.kind, self.spec(dtype, device), (self.tokens,), (self.tokens,), **own)

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return operands that are no tensors."""
        case = self.case(dtype, torch.device("cpu"))
        return case.scalars | dict.fromkeys({"bias"} & case.entry.operands.keys() if not case.biased else ())

    def draw(self, dtype: torch.dtype) -> Host:
        """Draw the operands of all rows."""
        raise NotImplementedError

    def _rows(self, *shape: int) -> torch.Tensor:
        """Return N(0, 1) [T, *shape], spread."""
        turn = torch.arange(self.tokens).remainder(SIZES).sub(1).mul(self.spread)
        scale = torch.ldexp(torch.ones(self.tokens), turn).view(-1, *(1,) * len(shape))
        return draw(self.tokens, *shape, seed=self.seed) * scale


def _words(name: str, value: Any) -> str:
    """Return words for a field of a problem."""
    if isinstance(value, bool):
        return name if value else f"not {name}"
    if isinstance(value, Dims):
        return f"widths {value.kv_lora_rank} and {value.qk_rope_head_dim}"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


@dataclass(frozen=True)
class MatMul(SmallProblem):
    """x [T, i] or [T, h, i] ~ N(0, 1) times a weight [o, i] or [h, o, i] ~ N(0, 1 / i)."""

    always = (*SmallProblem.always, "inputs", "outputs", "groups")
    tokens: int
    inputs: int
    outputs: int
    groups: int = 0  # heads of batched_linear; 0 is linear
    biased: bool = False
    cancels: bool = False  # the first half of every sum nearly cancels the second
    outlier: bool = False  # the first input is 200 times as large as others, and its weights are as small

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "batched_linear" if self.groups else "linear"

    @property
    def size_words(self) -> str:
        return f"{self.groups} heads, " * bool(self.groups) + f"{self.inputs} to {self.outputs}"

    def spec(self, dtype: torch.dtype, device: torch.device) -> LinearSpec:
        return LinearSpec(self.inputs, self.outputs, max(1, self.groups), dtype, device)

    def draw(self, dtype: torch.dtype) -> Host:
        heads = (self.groups,) * bool(self.groups)
        x = self._rows(*heads, self.inputs) * self.gain
        seed = 2 * self.model + 1
        weight = draw(*heads, self.outputs, self.inputs, seed=seed) * self.inputs**-0.5
        if self.cancels:
            half = self.inputs // 2
            x[..., half : 2 * half] = x[..., :half]
            weight[..., half : 2 * half] = weight[..., half : 2 * half] / 8 - weight[..., :half]
        if self.outlier:
            x[..., 0] *= 200
            weight[..., 0] /= 200
        x, weight = x.to(dtype), weight.to(dtype)
        shared = {"bias": draw(self.outputs, dtype=dtype, seed=self.seed + 2)} if self.biased else {}
        return Host({"x": x}, shared, weight)


@dataclass(frozen=True)
class Norm(SmallProblem):
    """Rows of any width; `size` is theirs."""

    kind = "rms_norm"
    always = (*SmallProblem.always, "features")
    tokens: int = 7
    features: int = 512
    size: float = 1.0
    eps: float = 1e-6

    @property
    def size_words(self) -> str:
        return f"{self.features} features"

    def spec(self, dtype: torch.dtype, device: torch.device) -> NormSpec:
        return NormSpec(self.features, dtype, device)

    def draw(self, dtype: torch.dtype) -> Host:
        x = (self._rows(self.features) * self.size).to(dtype)
        weight = (draw(self.features, seed=self.seed + 1) * self.gain).to(dtype)
        return Host({"x": x}, {"weight": weight})


@dataclass(frozen=True)
class Rotation(SmallProblem):
    """Heads of `width` channels."""

    kind = "rotate_query"
    always = (*SmallProblem.always, "heads")
    tokens: int = 7
    heads: int = 16
    interleaved: bool = True
    width: int = DEEPSEEK.qk_rope_head_dim

    @property
    def size_words(self) -> str:
        return f"{self.heads} heads"

    def spec(self, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        dims = replace(DEEPSEEK, qk_rope_head_dim=self.width)
        return attention_spec(self.heads, dims, dims.scale, dtype, device)

    def draw(self, dtype: torch.dtype) -> Host:
        x = (self._rows(self.heads, self.width) * self.gain).to(dtype)
        return Host({"x": x, "cos_sin": angles(self.tokens, self.width, self.seed)})


@dataclass(frozen=True)
class LatentWrite(SmallProblem):
    """New tokens of one step and where they go."""

    kind = "write_latent"
    always = (*SmallProblem.always, "page_size")
    tokens: int = 9
    page_size: int = 64
    dims: Dims = DEEPSEEK
    interleaved: bool = True
    eps: float = 1e-6
    size: float = 1.0  # of the input
    order: str = "shuffled"  # or one of those in `slots`

    @property
    def size_words(self) -> str:
        return f"page {self.page_size}"

    @property
    def parts(self) -> Parts:
        width = self.dims.kv_lora_rank
        return ("latent", slice(width)), ("rotated key", slice(width, None))

    @property
    def pages(self) -> int:
        """Pages of the cache; there are always slots that are not written."""
        return -(-(self.tokens + min(2 * self.tokens, 1000)) // self.page_size) + 1

    @property
    def spare(self) -> int:
        """The last slot, which is never written."""
        return self.pages * self.page_size - 1

    def slots(self) -> torch.Tensor:
        """Return [T] int64, with unwritten slots between them."""
        generator = torch.Generator().manual_seed(self.tokens + self.seed)
        slots = torch.randperm(self.spare, generator=generator)[: self.tokens]
        if self.order == "rising":
            return slots.sort().values
        if self.order == "falling":
            return slots.sort(descending=True).values
        if self.order == "a run":
            return torch.arange(self.tokens) + self.page_size // 2
        if self.order == "a shuffled run":  # its ends are where those of a run are
            slots = torch.randperm(self.tokens, generator=generator)
            ends = slots == 0, slots == self.tokens - 1
            slots[ends[0]], slots[0] = slots[0].clone(), 0
            slots[slots.eq(self.tokens - 1).int().argmax()], slots[-1] = slots[-1].clone(), self.tokens - 1
            return slots + self.page_size // 2
        return slots

    def spec(self, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        return attention_spec(16, self.dims, self.dims.scale, dtype, device)

    def draw(self, dtype: torch.dtype) -> Host:
        c = self.dims.kv_lora_rank
        kv_a = self._rows(self.dims.latent) * self.size
        kv_a[:, c:] *= self.gain
        kv_a = kv_a.to(dtype)
        weight = (draw(c, seed=self.seed + 1) * self.gain).to(dtype)
        cos_sin = angles(self.tokens, self.dims.qk_rope_head_dim, self.seed)
        return Host({"kv_a": kv_a, "cos_sin": cos_sin}, {"weight": weight})


@functools.lru_cache(maxsize=48)
def _drawn(problem: SmallProblem, dtype: torch.dtype) -> Host:
    one, case = problem.draw(dtype), problem.case(dtype, torch.device("cpu"))
    weight = {} if one.weight is None else {"weight": one.weight}
    given = {**one.rows, **one.shared, **weight, **case.scalars}
    truth = case.entry.truth(case.spec, given, case.lengths)
    return replace(one, truth=torch.cat(list(truth.values()), -1))


def host(problem: SmallProblem, dtype: torch.dtype) -> Host:
    """Return the host's side of the rows that were drawn for a problem."""
    return _drawn(problem.base, dtype)


@functools.lru_cache(maxsize=48)
def _of_reference(problem: SmallProblem, dtype: torch.dtype) -> torch.Tensor:
    op, one = REFERENCE[problem.kind], _drawn(problem, dtype)
    packed = () if one.weight is None else (op.pack(one.weight),)
    out = torch.empty(one.truth.shape, dtype=dtype)
    where = {"out": out}
    if problem.kind == "write_latent":
        where = {"cache": out[:, None], "slots": torch.arange(len(out))}
    op(*packed, **one.rows, **one.shared, **problem.options(dtype), **where)
    return out


def reference(problem: SmallProblem, dtype: torch.dtype) -> torch.Tensor:
    """Return what the reference gives on the host for the rows that were drawn."""
    return _of_reference(problem.base, dtype)
