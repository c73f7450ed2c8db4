"""One forward of every case, for a dry run: what it takes here says more than the device's rates."""

from __future__ import annotations

import time

import torch

from mla.bench.plan.estimate import Estimator
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.subjects.fixture import Fixture, make_fixture
from mla.command.console import note
from mla_backends.errors import describe, plugin_code

# Seconds after which no further case is tried, and those of a forward that is too long to try.
SECONDS, LONGEST = 20.0, 3.0


def probe(request: Request, estimator: Estimator) -> int:
    """Let the estimator learn a forward of the cases that can run, within `SECONDS`; return how many it was.

    What is spread over ranks is not tried: all would have to take part.
    """
    end, tried = time.monotonic() + SECONDS, 0
    for scenario in request.scenarios if request.setting.ranks is None else ():
        fixture = make_fixture(scenario.setting, scenario.point, request.state)
        for name in request.implementations:
            short = estimator.forward(scenario, name) <= LONGEST
            if scenario.memory.fits and short and name not in scenario.refused and time.monotonic() < end:
                tried += _learn(estimator, fixture, scenario, name)
    return tried


def _learn(estimator: Estimator, fixture: Fixture, scenario: ScenarioPlan, name: str) -> bool:
    try:
        with plugin_code(), torch.no_grad():
            estimator.learn(scenario, name, _forward(fixture, scenario, name))
    except Exception as error:  # noqa: BLE001  # a dry run says what would happen
        note(f"{scenario.name}, {name}: one forward was tried and failed: {describe(error)}")
        return False
    return True


def _forward(fixture: Fixture, scenario: ScenarioPlan, name: str) -> float:
    """Return the seconds of the second forward; the first one may compile what all others use."""
    inputs = fixture.inputs()
    one, synchronize = fixture.build(name), scenario.setting.backend.synchronize
    one.load(scenario.point, inputs)
    for _ in range(2):
        one.restore()
        start = time.monotonic()
        one.before(0)
        one.step(0)
        synchronize()
        taken = time.monotonic() - start
        one.after(0)
    return taken
