"""A decode step of a `transformers` model with one layer of real dimensions: theirs, and with our ops.

    python -m benchmarks.transformers.decode --backend cpu --history 512 --history 4096 --history 16384

Random bfloat16 weights, one request; the faster of eager and sdpa counts. All run in turns, each with its own
history; a step is that of the whole model, whose other parts are small.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from mla.bench.results.stats import median
from mla.bench.terminal.digits import number
from mla.command.console import note, out
from mla.command.table import markdown
from mla.config import MLAConfig
from mla.integrations.transformers import restore, use_mla

CONFIGS = ("deepseek-r1", "deepseek-v2-lite")
NAMES = ("hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank")
HEAD = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def make_model(name: str) -> Any:
    """Return a model of one layer and a small vocabulary."""
    config = MLAConfig.named(name)
    sizes: dict[str, Any] = {one: getattr(config, one) for one in (*NAMES, *HEAD)}
    rest: dict[str, Any] = {
        "vocab_size": 1024,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
    }
    heads = config.num_attention_heads
    built = DeepseekV3Config(**sizes, **rest, num_key_value_heads=heads, max_position_embeddings=163840)
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(built).bfloat16().eval()


@torch.no_grad()
def steps(model: Any, history: int, count: int) -> list[float]:
    """Return the milliseconds of decode steps after `history` cached tokens."""
    config: Any = model.config
    found: list[float] = []
    cache: Any = DynamicCache(config=config)
    widths = (config.kv_lora_rank, config.qk_rope_head_dim)
    cache.update(*(torch.randn(1, 1, history, width).to(model.device, model.dtype) for width in widths), 0)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    for _ in range(count + 1):
        start = time.perf_counter()
        model(input_ids=ids, cache=cache, use_cache=True).logits.cpu()
        found.append(1e3 * (time.perf_counter() - start))
    return found[1:]  # the first one warms up


def compare(model: Any, backend: str, history: int, rounds: int) -> tuple[float, float, float]:
    """Return median milliseconds of sdpa, eager and our ops, in turns."""
    found: dict[str, list[float]] = {"sdpa": [], "eager": [], "mla": []}
    for _ in range(rounds):
        for name in ("sdpa", "eager"):
            model.set_attn_implementation(name)
            found[name] += steps(model, history, 2)
        use_mla(model, backend)
        found["mla"] += steps(model, history, 8)
        restore(model)
    sdpa, eager, ours = map(median, found.values())
    return sdpa, eager, ours


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each history."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--config", default="deepseek-r1", choices=CONFIGS)
    parser.add_argument("--history", type=int, action="append", help="cached tokens; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(arguments)
    model, rows = make_model(asked.config), []
    for history in asked.history or [512, 4096, 16384]:
        sdpa, eager, ours = compare(model, asked.backend, history, asked.rounds)
        note(f"{history} tokens: sdpa {number(sdpa)}, eager {number(eager)}, mla {number(ours)} ms")
        times = map(number, (sdpa, eager, ours))
        rows.append((asked.config, str(history), *times, f"{min(sdpa, eager) / ours:.1f}x"))
    out(markdown(("config", "history", "sdpa ms", "eager ms", "mla ms", "as fast"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
