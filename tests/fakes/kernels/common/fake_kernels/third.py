"""The third generation of `flash_mla`: a plan is an object, which remembers what it was first used with."""

from __future__ import annotations

import dataclasses

ADVICE = "Please make sure the input arguments are consistent across different invocations"


@dataclasses.dataclass
class FlashMLASchedMeta:
    have_initialized: bool = False
    config: tuple | None = None
    tile_scheduler_metadata: object | None = None
    num_splits: object | None = None


def enter(metadata, num_splits, q, k_cache, causal):
    """Check a plan against a call; the first call decides."""
    assert isinstance(metadata, FlashMLASchedMeta), (
        "tile_scheduler_metadata must be of type FlashMLASchedMeta"
    )
    assert num_splits is None, "num_splits must be None"
    config = (*q.shape[:3], *k_cache.shape[1:3], causal)
    if not metadata.have_initialized:
        metadata.have_initialized, metadata.config = True, config
    assert metadata.config == config, f"sched_meta.config {metadata.config} is not {config}. {ADVICE}"


def refuse(**asked):
    """Raise for arguments that the fake does not know."""
    wanted = [name for name, value in asked.items() if value not in (None, False)]
    assert not wanted, f"{', '.join(wanted)} must be None here."
