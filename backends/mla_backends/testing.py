"""A backend to test with: the CPU, with the ops and facts a test gives it. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mla_backends.api import API_VERSION, Availability, Backend, DeviceInfo, FusedOp

if TYPE_CHECKING:
    import torch


class HostBackend(Backend):
    """The CPU of this process, set up and ready, offering whatever ops a test passes in.

    Use it to test an op inside a layer on a machine without the device, or subclass it to plant a fault:

    ```python
    import torch
    from mla import MLA, MLAConfig
    from mla_backends.testing import HostBackend
    from my_backend import MyLinear

    def test_a_layer_uses_my_linear():
        backend = HostBackend(ops={"my_linear": MyLinear()})
        config = MLAConfig(hidden_size=64, num_attention_heads=2, kv_lora_rank=32)
        layer = MLA(config, backend=backend, dtype=torch.float32)
        assert layer.ops.names()["o_proj"] == "my_linear", layer.ops.explain()
    ```

    It is a complete backend: `python -m mla.conformance --backend mla_backends.testing:HostBackend` passes.
    """

    name = "host"
    api_version = API_VERSION  # shipped with the contract, so never behind it

    def __init__(
        self,
        options: Mapping[str, str] | None = None,
        *,
        ops: Mapping[str, FusedOp] | None = None,
        **facts: Any,
    ) -> None:
        """Offer `ops`, by implementation name, best first; `facts` are fields of `DeviceInfo`.

        Raises `TypeError` for a fact that `DeviceInfo` does not have, `BackendOptionError` for an option.
        """
        super().__init__(options)
        self._ops = dict(ops or {})
        self._info = DeviceInfo(**{"name": self.name, **facts})
        self.device = self.setup()

    def probe(self) -> Availability:
        return Availability(ok=True, evidence={"device": "the CPU is always there"})

    def setup(self, index: int | None = None) -> torch.device:
        import torch

        return torch.device("cpu")

    def synchronize(self) -> None:
        """Return at once: nothing is ever pending."""

    def device_info(self) -> DeviceInfo:
        return self._info

    def ops(self) -> Mapping[str, FusedOp]:
        return self._ops
