"""What `list --configs` and `list --workloads` print: what is shipped, and where its numbers are from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mla.bench.workload.grid import points_of
from mla.bench.workload.workload_file import PRESETS as SHIPPED
from mla.bench.workload.workload_file import read_workload
from mla.command.display import aligned
from mla.config import LongRopeScaling, MLAConfig, YarnScaling
from mla.config.presets import DEFAULT_CONFIG, PRESETS

_CONFIGS = ("name", "hidden", "heads", "q_lora", "latent", "nope/v", "rotation", "source")
_WORKLOADS = ("name", "scenarios", "config", "op", "about", "source")


def configs_table() -> str:
    """Return a table with one line per preset; "-" means none."""
    return aligned(_CONFIGS, map(_row, PRESETS), words=("name", "nope/v", "rotation", "source"))


def configs() -> list[dict[str, Any]]:
    """Return per preset the config, its checkpoint, its config.json, and what was read in its place."""
    return [
        {**_numbers(name), **{key: getattr(preset, key) for key in ("checkpoint", "source", "read_from")}}
        for name, preset in PRESETS.items()
    ]


def _numbers(name: str) -> dict[str, Any]:
    config = MLAConfig.preset(name)
    return {**asdict(config), "softmax_scale": config.softmax_scale}


def _row(name: str) -> tuple[str, ...]:
    config = MLAConfig.preset(name)
    return (
        name,
        str(config.hidden_size),
        str(config.num_attention_heads),
        str(config.q_lora_rank or "-"),
        f"{config.kv_lora_rank}+{config.qk_rope_head_dim}",
        f"{config.qk_nope_head_dim}/{config.v_head_dim}",
        _rotation(config),
        PRESETS[name].source,
    )


def _rotation(config: MLAConfig) -> str:
    """Return channel order, theta and scaling as one phrase."""
    if config.rope_theta is None:
        return "none"
    words = ["" if config.rope_interleave else "half-split", f"theta {config.rope_theta:.12g}"]
    if isinstance(config.rope_scaling, YarnScaling):
        words.append(f"yarn {config.rope_scaling.factor:g}")
    if isinstance(config.rope_scaling, LongRopeScaling):
        words.append("longrope")
    return " ".join(filter(None, words))


def workloads_table() -> str:
    """Return a table with one line per shipped workload; "-" means none."""
    rows = ([str(value) if value else "-" for value in facts.values()] for facts in workloads())
    return aligned(_WORKLOADS, map(tuple, rows), words=("name", "config", "op", "about", "source"))


def workloads() -> list[dict[str, Any]]:
    """Return per shipped workload its number of scenarios, its default config and op, and its source."""
    return list(map(_facts, SHIPPED))


def _facts(name: str) -> dict[str, Any]:
    workload = read_workload(name)
    return {
        "name": name,
        "scenarios": len(points_of(workload.scenarios, {})),
        "config": workload.config or DEFAULT_CONFIG,
        "op": workload.op,
        "about": workload.about,
        "source": workload.source,
    }
