"""Layers and ops at which forms of arithmetic are held to the bounds, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.rounding.forms import Form
from benchmarks.rounding.ops import future, ops
from mla import MLA, LatentCache, MLAConfig
from mla.reference import attention
from mla.verify.layer_check import Checker, Forward
from mla.verify.layer_oracle import oracle
from mla.verify.op_oracle import attend, product
from mla.verify.tolerances import judge, judge_lse, relative_error
from mla.weights import random_state_dict
from mla_backends.testing import HostBackend

PAGE = 64


def normal(seed: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Return a function that draws N(0, 1) of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class LayerCase:
    """A layer and the requests of one forward."""

    name: str
    config: MLAConfig
    query_lens: tuple[int, ...]
    history: tuple[int, ...]
    forms: int = 99  # the first so many of all, where more would take long
    same_weights: int = 1  # seeds that share weights
    alike: bool = False  # inputs repeat numbers of the weights: large logits, and one key decides a row


# Four heads; the widths of the smallest DeepSeek are those of `MLAConfig` by default.
TINY, WIDE = MLAConfig(256, 4), MLAConfig(2048, 16)
DECODE = LayerCase("4 heads, decode", TINY, (1,) * 5, (0, 1, 7, 100, 400))
LAYERS = (
    LayerCase("4 heads, prefill", TINY, (64, 128, 256, 256), (512, 0, 0, 256), forms=5),
    LayerCase("4 heads, prefill, alike", TINY, (64, 256), (0, 256), forms=4, alike=True),
    DECODE,
    LayerCase("4 heads, one token", replace(TINY, q_lora_rank=128), (1,), (3,)),
    LayerCase("16 heads, hidden 2048", WIDE, (5, 1, 1), (30, 200, 0), forms=3, same_weights=20),
)


class LayerProblem:
    """A case drawn in a dtype: its weights, history, two forwards of hidden states, and their truth."""

    def __init__(self, case: LayerCase, dtype: torch.dtype, seed: int) -> None:
        config, draw = case.config, normal(seed if case.alike else seed + 1_000_000, dtype)
        self.case, self.dtype = case, dtype
        self.state = random_state_dict(config, seed // case.same_weights, dtype)
        widths = config.kv_lora_rank, config.qk_rope_head_dim
        self.history = [(draw(length, widths[0]), draw(length, widths[1])) for length in case.history]
        self.hidden = draw(2, sum(case.query_lens), config.hidden_size)
        self.truth = [oracle(config, self.state, one, case.query_lens, self.history) for one in self.hidden]
        self.checker = Checker(self.truth[0][None], dtype, lambda: self.run(None)[None])

    def run(self, form: Form | None, index: int = 0) -> torch.Tensor:
        """Return the output [T, d] of the layer with a form's ops, or those of the reference."""
        case = self.case
        backend = None if form is None else HostBackend(ops=ops(form))
        layer = MLA(case.config, backend=backend, dtype=self.dtype)
        layer.load_state_dict(self.state)
        pages = [-(-sum(lens) // PAGE) for lens in zip(case.query_lens, case.history, strict=True)]
        room = {"max_tokens": sum(pages) * PAGE, "page_size": PAGE}
        cache = LatentCache(case.config, **room, device=layer.device, dtype=self.dtype)
        requests = cache.new_sequences(len(pages))
        for request, past in zip(requests, self.history, strict=True):
            cache.load(request, *past)
        return layer(self.hidden[index], cache.extend(requests, case.query_lens), cache.pages[0])

    def ratio(self, form: Form) -> float:
        """Return the largest error of a form over its bound."""
        return self._ratio(Forward(0, self.run(form), self.truth[0], ""))

    def new_ratio(self) -> float:
        """Return that of the reference on the hidden states that it was not run on before."""
        return self._ratio(Forward(0, self.run(None, 1), self.truth[1], ""))

    def _ratio(self, forward: Forward) -> float:
        return self.checker.check_forwards([forward], held_to_reference=True).error_ratio or 0.0

    def roundings(self, form: Form) -> float:
        """Return the error of a form over that of rounding the truth once."""
        truth = self.truth[0]
        return relative_error((self.run(form), truth)) / relative_error((truth.to(self.dtype), truth))


@dataclass(frozen=True)
class AttentionCase:
    """One request of one attention op: absorbed (one head of keys, which hold the values) or expanded."""

    name: str
    heads: int
    queries: int
    keys: int
    widths: tuple[int, int] = (576, 512)  # of a key and of a value
    absorbed: bool = True
    scale: float = 192**-0.5


ATTENTION = (
    AttentionCase("absorbed", 4, 16, 80),
    AttentionCase("absorbed, one row", 1, 1, 3),
    AttentionCase("absorbed, narrow", 4, 16, 40, (40, 32), scale=24**-0.5),
    AttentionCase("expanded, narrow", 4, 16, 40, (24, 12), absorbed=False, scale=24**-0.5),
    AttentionCase("absorbed, large logits", 4, 16, 80, scale=8 * 192**-0.5),
)
LONG = AttentionCase("absorbed, 2500 keys", 4, 2, 2500)


class AttentionProblem:
    """A case drawn in a dtype, its truth and the reference's result."""

    def __init__(self, case: AttentionCase, dtype: torch.dtype, seed: int) -> None:
        draw, (key, value) = normal(seed, dtype), case.widths
        self.case, self.dtype, heads = case, dtype, 1 if case.absorbed else case.heads
        self.q, self.k = draw(case.heads, case.queries, key), draw(heads, case.keys, key)
        self.v = self.k[..., :value] if case.absorbed else draw(heads, case.keys, value)
        q, k, v = (x.transpose(0, 1) for x in (self.q, self.k, self.v))
        self.out, self.lse = attend(q, k, v, case.scale, True)
        self.hidden = future(case.queries, case.keys)
        q, k, v = (x.float().expand(case.heads, -1, -1) for x in (self.q, self.k, self.v))
        self.reference = attention.attend(q, k, v, case.scale, self.hidden)[0].transpose(0, 1).to(dtype)

    def ratio(self, form: Form) -> float:
        """Return the largest error of a form over its bound."""
        q, k, v = (x.float() for x in (self.q, self.k, self.v))
        found, sums = form.attend(q, k, v, self.case.scale, self.hidden, self.dtype)
        out, lse = found.transpose(0, 1).to(self.dtype), sums[..., 0].T.float()
        ratio, _ = judge(out, self.out, self.reference, self.dtype, lse=self.lse)
        return max(ratio, judge_lse(lse, self.lse, self.dtype)[0])


def product_ratio(form: Form, dtype: torch.dtype, seed: int) -> float:
    """Return the largest error of a form's products over its bound: projections, wide and narrow."""
    return max(_products(form, dtype, normal(seed, dtype)))


def _products(form: Form, dtype: torch.dtype, draw: Callable[..., torch.Tensor]) -> Iterator[float]:
    for rows, features, outputs in ((7, 512, 96), (1, 2048, 17), (40, 33, 5)):
        x, weight = draw(rows, features), draw(outputs, features) * features**-0.5
        found = form.product(x.float(), weight.float()).to(dtype)
        yield judge(found, product(x, weight), x @ weight.T, dtype)[0]
