"""Run every SGLang kernel once, in a process that may crash: `python try_sglang.py LIBRARY`.

Prints each kernel's name before calling it, so that the parent knows which one crashed. A kernel that rejects
its arguments with an exception is not a failure here: the peer skips it and reports why.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

import torch

from benchmarks.peers.assembled import Parts, PeerProblem
from benchmarks.peers.sglang_tools import SGLANG
from benchmarks.peers.torch_tools import TORCH
from mla.bench.subjects.inputs import make_inputs
from mla.bench.workload.scenario import Scenario
from mla.config import MLAConfig
from mla.weights import random_state_dict

CONFIG = MLAConfig(hidden_size=256, num_attention_heads=16)
DECODE = Scenario(name="decode", mode="decode", query_lens=(1,) * 4, history=(50, 50, 300, 700), runs=1)
PREFILL = Scenario(name="prefill", mode="prefill", query_lens=(64, 200), history=(300, 0))


def parts(scenario: Scenario) -> Parts:
    """Return a small layer's parts for a scenario, its cache filled."""
    dtype = torch.bfloat16
    problem = PeerProblem(CONFIG, scenario, dtype, make_inputs(CONFIG, scenario, 0, dtype).history)
    problem.rows.nan_to_num_(nan=0.0)
    return Parts(problem, random_state_dict(CONFIG), TORCH)


def attempt(name: str, make: Callable[..., Any], given: tuple[Any, ...], trial: tuple[Any, ...]) -> None:
    """Print a candidate's name, build it from `given`, and call it once."""
    print(name, flush=True)  # noqa: T201
    with contextlib.suppress(RuntimeError):
        make(*given)(*trial)


def normal(*shape: int) -> torch.Tensor:
    """Return random numbers."""
    return torch.randn(shape).to(torch.bfloat16)


def main(library: str) -> None:
    """Load the library and run all it offers."""
    print("load_library", flush=True)  # noqa: T201
    torch.ops.load_library(library)
    torch.set_grad_enabled(False)
    for tokens in (4, 264):
        for name, product in SGLANG.product.items():
            attempt(name, product, (normal(192, 256), tokens), (normal(tokens, 256),))
    for name, batched in SGLANG.batched.items():
        attempt(name, batched, (normal(16, 512, 128),), (normal(4, 16, 128),))
    decoding, filling = parts(DECODE), parts(PREFILL)
    for name, decode in SGLANG.decode.items():
        attempt(name, decode, (decoding.problem,), (normal(4, 16, 576), 0))
    for name, prefill in SGLANG.prefill.items():
        attempt(name, prefill, (filling,), (normal(264, 16, 192), 0))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (OSError, RuntimeError) as error:  # a library built for another torch does not load
        sys.exit(str(error.__cause__ or error).partition("\n")[0])  # torch's own message has no cause
