"""The project's own GPU kernels in Triton, offered through the op contract.

One source for every GPU that has a Triton: what differs between cards is data, a `Tuning` that the plugin
chooses. Nothing imports Triton before an op is tried, and what Triton lacks is a reason in `--list-ops`::

    from mla_backends.triton_ops import Tile, Tuning, triton_ops

    class Acme(TorchBackend):
        def ops(self):
            tuning = Tuning(latent={1: Tile(16, 16, 4, 1)}, expanded={1: Tile(32, 32, 4, 1)})
            return triton_ops(tuning, self.multiprocessors())  # keep it: ops hold scratch memory

| op | launches | what it does |
|---|---|---|
| `triton_latent` | 1, or 2 where requests are split | flash decoding over pages of any size |
| `triton_expanded` | 1 | flash attention over all segments |
| `triton_write_latent` | 1 | norm, rotation and scatter of a token's latent |
| `triton_rotate_query` | 1 | rotation of all heads |
| `triton_rms_norm` | 1 | norm of the query latent |
"""

from __future__ import annotations

from mla_backends.api import FusedOp
from mla_backends.triton_ops.expanded import ExpandedAttention
from mla_backends.triton_ops.latent import LatentAttention
from mla_backends.triton_ops.launcher import DeviceReason, Launcher
from mla_backends.triton_ops.pointwise import RmsNorm, RotateQuery, WriteLatent
from mla_backends.triton_ops.tuning import Tile, Tuning, read_tuning, write_tuning

__all__ = ["Launcher", "Tile", "Tuning", "read_tuning", "triton_ops", "write_tuning"]


def triton_ops(
    tuning: Tuning,
    multiprocessors: int | None,
    launcher: Launcher | None = None,
    device_reason: DeviceReason | None = None,
) -> dict[str, FusedOp]:
    """Return the ops by name. `device_reason` says why a device cannot run them, "" if it can."""
    starts = launcher or Launcher()
    return {
        "triton_latent": LatentAttention(starts, tuning, multiprocessors, device_reason),
        "triton_expanded": ExpandedAttention(starts, tuning, device_reason),
        "triton_write_latent": WriteLatent(starts, device_reason),
        "triton_rotate_query": RotateQuery(starts, device_reason),
        "triton_rms_norm": RmsNorm(starts, device_reason),
    }
