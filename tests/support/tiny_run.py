"""A config and a workload that run in a blink, as files for the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

DIMS = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
# What is timed where no variant is looked at.
HEADLINE = ("--mode", "eager", "--cache", "warm", "--clock", "host")
WORKLOAD = """
[[scenario]]
name = "prefill"
mode = "prefill"
query_lens = [3, 5]
history = [4, 0]
runs = {prefill_runs}
passes = {passes}
warmups = 1

[[scenario]]
name = "decode"
mode = "decode"
query_lens = ["1*2"]
history = {history}
runs = {decode_runs}
passes = {passes}
warmups = 1
"""


def write_tiny_run(
    folder: Path,
    *,
    passes: int = 2,
    prefill_runs: int = 2,
    decode_runs: int = 3,
    history: Sequence[int] = (62, 9),  # the first request crosses the end of a page of 64
    **dims: int,
) -> list[str]:
    """Write tiny.json and tiny.toml, and return the options that choose them; `dims` change the config."""
    (folder / "tiny.json").write_text(json.dumps({**DIMS, **dims}))
    counts = {"passes": passes, "prefill_runs": prefill_runs, "decode_runs": decode_runs}
    (folder / "tiny.toml").write_text(WORKLOAD.format(**counts, history=list(history)))
    return ["--config", "tiny.json", "--workload", "tiny.toml"]
