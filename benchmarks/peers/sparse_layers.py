#!/usr/bin/env python3
"""How a layer that selects compares with the dense one, with what its parts allow, and with `transformers`.

\b
    python benchmarks/peers/sparse_layers.py -o sparse-layers.json

One decode step of DeepSeek-V3.2's layer; all are interleaved, in another order each round. `projections` is
the dense layer without history (W), `products` a product of two square matrices (its rate is F). With R
requests, attention of the dense layer is D FLOPs and that of the sparse one S, indexer included: no more than
(W + R D / F) / (W + R S / F) can be gained. Then `transformers` and ours take turns with `--few` requests, as
its memory allows. Outputs after at most 4096 tokens are compared: one that differs is WRONG (exit code 4).
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter_ns as now_ns
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

import click
import msgspec
import torch

from mla import MLAConfig, load_backend
from mla.bench import results
from mla.bench.results.stats import median_interval
from mla.bench.subjects.inputs import Inputs, make_inputs
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.subjects.transformers_layer import classes_of, dims, rope
from mla.bench.workload.scenario import Scenario
from mla.command import console
from mla.command.environment import environment
from mla.command.exit_codes import Exit, guarded
from mla.cost import latent_attention_flops
from mla.verify.layer_oracle import State
from mla.weights import random_state_dict

SIDE = 2048  # of the matrices whose product is timed
COMPARED = 4096  # tokens at most: with many more, scores that round alike let both select other keys
TOLERATED = 0.05  # relative difference of outputs: both round to bf16, and may select near ties differently

Step = Callable[[], Any]


class Measured(msgspec.Struct):
    """The schema of `-o FILE`. Times are ms; `ci95` is that of the median over rounds."""

    environment: dict[str, str]
    history: int
    requests: int
    few: int
    ms: dict[str, float]
    ci95: dict[str, tuple[float, float] | None]
    tflops: float  # F
    gain: float  # of the sparse layer over the dense one
    allowed: float  # what W and F allow it to be
    over_transformers: float | None = None
    difference: float | None = None  # of the outputs after at most `COMPARED` tokens


class Stock:
    """The attention of `transformers` on one batch of equal requests, whose cache is as before each step."""

    def __init__(self, config: MLAConfig, state: State, inputs: Inputs) -> None:
        from transformers import DynamicCache

        attention, rotary, config_class = classes_of("deepseek_v32", "DeepseekV32")
        indexer = {name: getattr(config, name) for name in ("index_n_heads", "index_head_dim", "index_topk")}
        built = config_class(**dims(config), **indexer, **rope(config, "deepseek_v32"), num_hidden_layers=1)
        built._attn_implementation = "sdpa"
        self._layer = attention(built, 0).to(torch.bfloat16).eval()
        self._layer.load_state_dict(dict(state))
        self._hidden = inputs.hidden[0][:, None]  # [requests, 1, d]
        kv, pe = (torch.stack(part)[:, None].bfloat16() for part in zip(*inputs.history, strict=True))
        self._kept = kv, torch.cat((pe[..., 0::2], pe[..., 1::2]), dim=-1)
        self._index, length = torch.stack(inputs.index).bfloat16(), kv.shape[2]
        positions = torch.full((len(kv), 1), length)
        assert rotary is not None
        self._arguments = {"position_embeddings": rotary(built)(self._hidden, positions)}
        self._arguments["attention_mask"] = torch.ones(len(kv), 1, 1, length + 1, dtype=torch.bool)
        self._make = lambda: DynamicCache(config=built)

    def before(self) -> None:
        """Make the cache anew: a step adds to it."""
        self._cache = self._make()
        self._cache.update(*self._kept, 0)
        self._cache.update_indexer(self._index, 0)

    def step(self) -> torch.Tensor:
        """Return the outputs [requests, d]."""
        out: torch.Tensor = self._layer(self._hidden, cache=self._cache, **self._arguments)[0][:, 0]
        return out


def loaded(
    kind: type[MlaLayer], setting: Setting, state: State, lengths: tuple[int, ...]
) -> tuple[MlaLayer, Inputs]:
    """Return our layer with so many tokens of history per request, for steps of one token each."""
    scenario = Scenario(
        name="step", mode="prefill", query_lens=(1,) * len(lengths), history=lengths, runs=1, passes=1
    )
    inputs = make_inputs(setting.config, scenario, setting.seed, setting.dtype)
    layer = kind(setting, state)
    layer.load(scenario, inputs)
    return layer, inputs


def take_turns(
    steps: Mapping[str, Step], before: Mapping[str, Step], rounds: int, seed: int
) -> dict[str, list[float]]:
    """Return the ms of each step in each round, after two untimed rounds."""
    order, draw = list(steps), random.Random(seed)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-2, rounds):
        draw.shuffle(order)
        for name in order:
            before.get(name, lambda: None)()
            start = now_ns()
            steps[name]()
            if number >= 0:
                taken[name].append((now_ns() - start) / 1e6)
    return taken


def attention_flops(config: MLAConfig, keys: int) -> tuple[int, int]:
    """Return the FLOPs of a query over so many keys: of dense attention, and of an indexer and sparse one."""
    per_key = latent_attention_flops(
        config.num_attention_heads, 1, config.kv_lora_rank, config.qk_rope_head_dim
    )
    scores = 2 * config.index_n_heads * config.index_head_dim * keys
    return per_key * keys, scores + per_key * min(keys, config.index_topk)


def difference(setting: Setting, state: State, history: int, few: int) -> float:
    """Return how far the outputs of `transformers` are from ours, relative to ours."""
    ours, inputs = loaded(MlaLayer, setting, state, (history,) * few)
    stock = Stock(setting.config, state, inputs)
    for call in (stock.before, partial(ours.before, 0), partial(ours.step, 0), partial(ours.after, 0)):
        call()
    theirs, mine = stock.step().double(), ours.outputs()[0].double()
    return ((theirs - mine).norm() / mine.norm()).item()


@torch.no_grad()
def measure(config: MLAConfig, history: int, requests: int, few: int, rounds: int) -> Measured:
    """Measure all parties; `few` requests of `transformers`, or none."""
    backend = load_backend("cpu")
    plain = replace(config, index_topk=0, index_n_heads=0)
    setting = Setting(config, backend, torch.bfloat16, "auto", 64, seed=0)
    state = random_state_dict(config, 0, setting.dtype)
    dense_state = {name: weight for name, weight in state.items() if not name.startswith("indexer.")}
    dense = replace(setting, config=plain)
    parties = {"sparse": loaded(MlaLayer, setting, state, (history,) * requests)}
    parties["dense"] = loaded(MlaLayer, dense, dense_state, (history,) * requests)
    parties["projections"] = loaded(MlaLayer, dense, dense_state, (0,) * requests)
    steps: dict[str, Step] = {name: partial(layer.step, 0) for name, (layer, _) in parties.items()}
    before: dict[str, Step] = {name: partial(layer.before, 0) for name, (layer, _) in parties.items()}
    a, b = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    steps["products"] = lambda: a @ b
    taken = take_turns(steps, before, rounds, seed=0)
    differs = None
    if few:  # in turns of their own: steps of seconds cool the caches of the others
        differs = difference(setting, state, min(history, COMPARED), few)
        layer, inputs = loaded(MlaLayer, setting, state, (history,) * few)
        stock = Stock(config, state, inputs)
        steps = {"sparse, few": partial(layer.step, 0), "transformers": stock.step}
        before = {"sparse, few": partial(layer.before, 0), "transformers": stock.before}
        taken |= take_turns(steps, before, rounds, seed=0)
    ms = {name: statistics.median(times) for name, times in taken.items()}
    rate = 2 * SIDE**3 / ms["products"]  # FLOPs per ms
    full, sparse = (requests * flops / rate for flops in attention_flops(config, history + 1))
    return Measured(
        environment(backend), history, requests, few, ms,
        {name: median_interval(times) for name, times in taken.items()}, rate / 1e9,
        gain=ms["dense"] / ms["sparse"],
        allowed=(ms["projections"] + full) / (ms["projections"] + sparse),
        over_transformers=ms["transformers"] / ms["sparse, few"] if few else None, difference=differs,
    )  # fmt: skip


@click.command(help=__doc__)
@click.option("--history", default=32768, show_default=True, help="Tokens of each request before the step.")
@click.option("--requests", default=16, show_default=True, help="Requests of the batch.")
@click.option("--few", default=1, show_default=True, help="Requests of transformers; 0 leaves it out.")
@click.option("--rounds", default=15, show_default=True, help="Timed steps of each.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(history: int, requests: int, few: int, rounds: int, output: Path | None) -> int:
    """Carry out the command line."""
    measured = measure(MLAConfig.named("deepseek-v3.2"), history, requests, few, rounds)
    for name, ms in measured.ms.items():
        interval = measured.ci95[name]
        between = f"  ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
        console.out(f"{name:14}{ms:10.2f} ms{between}\n")
    console.out(f"products run at {measured.tflops:.2f} TFLOP/s\n")
    share = measured.gain / measured.allowed
    console.out(
        f"sparse is {measured.gain:.2f}x dense; W and F allow {measured.allowed:.2f}x: {share:.2f} of it\n"
    )
    wrong = measured.difference is not None and not measured.difference <= TOLERATED
    if measured.over_transformers is not None:
        verdict = "WRONG" if wrong else f"sparse is {measured.over_transformers:.1f}x transformers"
        console.out(f"{verdict} with {few} requests; outputs differ by {measured.difference:.4f}\n")
    if output:
        results.write(measured, output)
    return Exit.WRONG if wrong else Exit.OK


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(standalone_mode=False)))
