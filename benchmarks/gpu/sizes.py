"""How large the measurements of a campaign are: as in models, or tiny to try the campaign itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sizes:
    """Configs, shapes and counts; axes as `-a` of the runner takes them."""

    default: tuple[str, ...]  # options that choose the original's sizes
    large: tuple[str, ...]  # ... and DeepSeek-R1's
    heads: tuple[int, ...]
    batches: str
    histories: str
    layer_batches: str
    layer_histories: str
    kernel_heads: str
    kernel_histories: str
    rival_batches: str
    rival_histories: str
    large_heads: tuple[int, ...]  # for shapes that targets are judged on: (batch, history)
    large_shapes: tuple[tuple[str, str], ...]
    prompts: tuple[str, ...]  # axes of expanded attention
    prompt_heads: tuple[int, ...]
    layer: tuple[str, ...] = ()  # options of runs of the layer that interpreted kernels have to carry out
    counts: tuple[str, ...] = ()  # options of most runs
    grid_counts: tuple[str, ...] = ()  # ... of runs with many points
    rival_counts: tuple[str, ...] = ()  # ... of runs with many points and several kernels


def shapes(batches: str, histories: str) -> tuple[str, ...]:
    """Return axes of absorbed attention."""
    return ("-a", f"batch={batches}", "-a", f"kv={histories}")


FULL = Sizes(
    default=(),
    large=("--config", "deepseek-r1"),
    heads=(16, 64, 128),
    batches="1,8,32,128",
    histories="1k..64k*4",
    layer_batches="1,32,128",
    layer_histories="1k..64k*4",
    kernel_heads="16,128",
    kernel_histories="1k,16k",
    rival_batches="1,8",
    rival_histories="1k,16k,64k",
    large_heads=(16, 128),
    large_shapes=(("32", "64k"), ("128", "16k"), ("128", "64k")),  # of the grid, those that move 1 GB or more
    prompts=("-a", "batch=1,8", "-a", "q_len=512,4k", "-a", "kv=0,4k"),
    prompt_heads=(16, 128),
    grid_counts=("--runs", "20", "--passes", "6", "--clock", "host"),
    rival_counts=("--runs", "10", "--passes", "6", "--cache", "warm"),
)

_FEW = ("--runs", "2", "--passes", "2", "--warmups", "1")
_TINY = ("--config", str(HERE / "smoke.json"))
SMOKE = Sizes(
    default=_TINY,
    large=_TINY,
    heads=(4,),
    batches="1,2",
    histories="64",
    layer_batches="2",
    layer_histories="64",
    kernel_heads="4",
    kernel_histories="64",
    rival_batches="1,2",
    rival_histories="64",
    large_heads=(4,),
    large_shapes=(("3", "64"),),
    prompts=("-a", "batch=2", "-a", "q_len=8", "-a", "kv=0"),
    prompt_heads=(4,),
    layer=shapes("2", "40"),
    counts=_FEW,
    grid_counts=(*_FEW, "--clock", "host"),
    rival_counts=(*_FEW, "--cache", "warm"),
)
