"""The whole layer compared with the float64 oracle, over the steps in which the classic bugs show."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mla.config import MLAConfig
from mla.conformance.problems.layer import (
    LORA,
    MODES,
    PLAIN,
    VARIANT,
    LayerProblem,
    check_layer,
    data,
    judge,
    make_layer,
    prepare_layer,
    weights,
)
from mla.conformance.problems.small_call import expect_untouched
from mla.conformance.registry import LAYER, check
from mla.conformance.trial import Trial, expect
from mla.layer.plan import rebuilt_bytes
from mla.layer.rope import RotaryTable
from mla.verify.bounds import ALLOWED, TWICE
from mla.verify.op_oracle import true_norm, true_rotation
from mla.verify.tolerances import relative_error, same_bits

# A prefill, a decode, several tokens after a history, and a request without new tokens.
MIXED = ((20, 1, 0, 3), (0, 70, 5, 64))


def layer_check(
    name: str, catches: str, fails: str = "formula"
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a check that runs once per dtype and policy of ops."""
    return check(f"layer.{name}", catches=catches, scope=LAYER, fails=fails)


@layer_check("prefill", "a mask that leaks future tokens, which a long history hides")
def prefill(trial: Trial) -> None:
    """Requests without history, with and without a query LoRA, on every attention path."""
    check_layer(trial, *(LayerProblem((5, 1, 30), (0, 0, 0), config) for config in (PLAIN, LORA)))


@layer_check("history", "new tokens that are rotated for, or masked at, the wrong position")
def history(trial: Trial) -> None:
    """New tokens after a history attend to it and to themselves."""
    check_layer(trial, LayerProblem((3, 9, 2), (40, 7, 64), LORA))


@layer_check("mixed", "tokens of one request that land in the rows of another")
def mixed(trial: Trial) -> None:
    """Prefill, decode, several tokens after a history and a request without any share a batch."""
    check_layer(trial, LayerProblem(*MIXED))


@layer_check("decode", "a token that is cached at the wrong place, which only later steps see", "state")
def decode(trial: Trial) -> None:
    """Twenty decode steps give what one prefill of the same tokens gives."""
    check_layer(trial, LayerProblem((1, 1, 1), (50, 0, 120), steps=20), modes=("auto", "absorbed"))


@layer_check("pages", "pages that are assumed to be contiguous", "tiles")
def pages(trial: Trial) -> None:
    """The order and the size of pages do not matter; sizes may be refused with a reason."""
    problem = LayerProblem((2, 1), (140, 70))
    for page_size, shuffle in ((64, 1), (64, 2), (64, 3), (16, 1), (128, 1)):
        with trial.case(f"page {page_size}, order {shuffle}, {problem.label}"):
            ready = prepare_layer(trial, problem, "absorbed", page_size=page_size, shuffle=shuffle)
            judge(trial, problem, ready.run())


@layer_check(
    "chunks", "a log-sum-exp that is wrong, which shows only when parts of a context are merged", "tiles"
)
def chunks(trial: Trial) -> None:
    """A workspace too small for the context makes the expanded path merge several rounds."""
    problem = LayerProblem((30, 6), (100, 0))
    workspace = rebuilt_bytes(problem.config, trial.dtype.itemsize, 40)
    check_layer(trial, problem, modes=("expanded",), workspace_bytes=workspace)


@layer_check("variant", "biases that are dropped, or channels rotated in the usual order only")
def variant(trial: Trial) -> None:
    """A layer with biases and half-split rotary channels."""
    check_layer(trial, LayerProblem((5, 1), (0, 30), VARIANT))


@layer_check("cached", "a latent that is cached before its norm, or a key before its rotation")
def cached(trial: Trial) -> None:
    """A step caches the normed latent and the rotated key."""
    problem = LayerProblem((5, 1, 30), (0, 70, 3))
    with trial.case(problem.label):
        made, ready = data(problem, trial.dtype), prepare_layer(trial, problem)
        ready.run()
        bound = TWICE * ALLOWED[trial.dtype].layer
        parts = zip(ready.ids, made.hidden[0].split(list(problem.query_lens)), problem.history, strict=True)
        for sequence, hidden, old in parts:
            kv, pe = ready.cache.read(sequence)
            truth = true_latents(problem.config, made.state, hidden, old)
            for name, found, true in zip(("latent", "key"), (kv[old:], pe[old:]), truth, strict=True):
                error = relative_error((found, true))
                expect(
                    error <= bound, f"the cached {name} has relative error {error:.1e}, allowed {bound:.0e}"
                )


def true_latents(
    config: MLAConfig, state: Mapping[str, torch.Tensor], hidden: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what must be cached for tokens from position `first` on: kv [t, c] and pe [t, r], float64."""
    projected = hidden.double() @ state["kv_a_proj_with_mqa.weight"].double().T
    latent, key = projected.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=1)
    stop = first + len(hidden)
    cos_sin = RotaryTable(config, torch.device("cpu"), stop).table[first:stop]
    norm = true_norm(latent, state["kv_a_layernorm.weight"], config.rms_norm_eps)
    return norm, true_rotation(key, cos_sin, config.rope_interleave)


@layer_check("untouched", "latents written to a page that belongs to another request", "memory")
def untouched(trial: Trial) -> None:
    """A step changes the slots of its new tokens and no other bit of the cache."""
    problem = LayerProblem(*MIXED)
    for mode in MODES:
        with trial.case(f"{mode}, {problem.label}"):
            ready = prepare_layer(trial, problem, mode)
            before = ready.cache.pages[0].cpu().clone()
            batch = ready.extend()
            ready.forward(0, batch)
            others = torch.ones(before.shape[:2].numel(), dtype=torch.bool)
            others[batch.slots.cpu()] = False
            expect_untouched(ready.cache.pages[0].cpu(), before, others)


@layer_check("again", "an op that accumulates into its output or the cache", "state")
def again(trial: Trial) -> None:
    """Running a batch again gives the same result."""
    problem = LayerProblem(*MIXED)
    for mode in MODES:
        with trial.case(f"{mode}, {problem.label}"):
            ready = prepare_layer(trial, problem, mode)
            batch = ready.extend()
            for _ in range(3):
                judge(trial, problem, ready.forward(0, batch)[None].cpu())


@layer_check(
    "shared_plan", "a plan or a sequence that one forward uses up, or that remembers its cache", "state"
)
def shared_plan(trial: Trial) -> None:
    """A layer runs one batch repeatedly, alternating between two caches."""
    first, second = (LayerProblem(*MIXED, seed=seed) for seed in (0, 1))
    for mode in MODES:
        with trial.case(f"{mode}, {first.label}"):
            layer = make_layer(trial, first.config, mode)
            ready, other = (prepare_layer(trial, one, mode, layer=layer) for one in (first, second))
            batch = ready.extend()
            other.extend()  # so that its tables are the same
            for one in (ready, ready, other, ready):  # the second one may be recorded by the backend
                judge(trial, one.problem, one.forward(0, batch)[None].cpu())


@layer_check(
    "two_layers", "weights or scratch memory that another layer of the same shape takes over", "state"
)
def two_layers(trial: Trial) -> None:
    """Two layers run a batch by turns, each on its part of the cache, and leave each other's output alone."""
    problems = [LayerProblem(*MIXED, seed=seed, model=seed) for seed in (0, 1)]
    for mode in MODES:
        with trial.case(f"{mode}, {problems[0].label}"):
            pair = [prepare_layer(trial, problem, mode) for problem in problems]
            batch, _ = (one.extend() for one in pair)  # whose tables are the same
            outputs = [(one, one.forward(0, batch)) for one in (*pair, *pair[::-1])]
            for one, out in outputs:
                judge(trial, one.problem, out[None].cpu())


@layer_check(
    "weights", "a packed layout that loses bits, so that a checkpoint cannot be saved again", "contract"
)
def state_dict(trial: Trial) -> None:
    """The layer returns the weights it was given, bit for bit."""
    for config in (PLAIN, VARIANT):
        with trial.case(config.name):
            given, back = weights(config, trial.dtype), make_layer(trial, config, "auto").state_dict()
            expect(set(back) == set(given), "state_dict() has different names from the weights it was given")
            different = [name for name, weight in given.items() if not same_bits(back[name], weight)]
            expect(not different, f"weight {', '.join(different)} came back with different bits")
