"""The whole layer on batches of other sizes: many requests, equal ones, many new tokens, and none."""

from __future__ import annotations

import torch

from mla.conformance.checks.layer import layer_check
from mla.conformance.problems.layer import MODES, LayerProblem, check_layer, judge, prepare_layer
from mla.conformance.problems.small_call import expect_untouched
from mla.conformance.trial import Trial, expect


@layer_check("requests", "requests beyond a launch grid, whose rows stay as they were", "grid")
def requests(trial: Trial) -> None:
    """Hundreds of requests share a batch, with up to two new tokens each."""
    batches = ((133, "absorbed"), (47, "expanded"))
    for count, mode in batches if trial.quick else (*batches, (133, "expanded"), (521, "absorbed")):
        new, old = ([request % step for request in range(count)] for step in (3, 4))
        check_layer(trial, LayerProblem(tuple(new), tuple(old)), modes=(mode,))


@layer_check("rows", "new tokens beyond a launch grid or a buffer that was made for fewer", "grid")
def rows(trial: Trial) -> None:
    """Hundreds of new tokens of one request, after a few and before others."""
    check_layer(trial, LayerProblem((3, 530, 1), (0, 0, 2)), modes=("auto",))
    if not trial.quick:
        check_layer(trial, LayerProblem((5, 1100), (9, 3)), modes=("auto", "expanded"))


@layer_check("equal", "requests of equal lengths that are put back in another order", "order")
def equal(trial: Trial) -> None:
    """Requests of equal lengths keep their places, sorted by length or not, step after step."""
    for new, old in (((1,) * 8, (5, 9, 5, 9, 5, 5, 9, 9)), ((3, 1, 3, 3, 1), (7, 7, 7, 7, 7))):
        check_layer(trial, LayerProblem(new, old, steps=2))


@layer_check("no_tokens", "an empty batch that raises, or that a later one suffers from", "emptiness")
def no_tokens(trial: Trial) -> None:
    """A batch without new tokens gives no rows, changes nothing, and the next one is right."""
    problem = LayerProblem((2, 1), (70, 0))
    for mode in MODES:
        with trial.case(f"{mode}, {problem.label}"):
            ready = prepare_layer(trial, problem, mode)
            before = ready.cache.pages[0].cpu().clone()
            for _ in range(2):
                nothing = ready.cache.extend(ready.ids, [0, 0])
                out = ready.layer(ready.hidden[0, :0], nothing, ready.cache.pages[0])
                expect(out.shape == (0, problem.config.hidden_size), f"its output is {list(out.shape)}")
            everywhere = torch.ones(before.shape[:2].numel(), dtype=torch.bool)
            expect_untouched(ready.cache.pages[0].cpu(), before, everywhere)
            judge(trial, problem, ready.run())
