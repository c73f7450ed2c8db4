"""`PackedWeights`: a layer's weights in the layouts its ops want, and back again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mla.config import MLAConfig
from mla.errors import WeightError
from mla.ops import Ops
from mla.weights import weight_shapes
from mla_backends.api import Packed

State = Mapping[str, torch.Tensor]


class PackedWeights:
    """Matrices by role (`qkv_a_proj`, `o_proj`, `w_uk`, ...) in `packed`, norms and biases in `vectors`.

    q_proj (or q_a_proj) and kv_a_proj_with_mqa read the same input, so they are one weight. kv_b_proj is
    kept twice: for expanding context (`kv_b_proj`) and for absorption (`w_uk`, `w_uv`), which contract other
    axes.
    """

    def __init__(self, config: MLAConfig, ops: Ops, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._ops, self._dtype, self._device = config, ops, dtype, device
        self._first = "q_proj" if config.q_lora_rank is None else "q_a_proj"
        self.packed: dict[str, Packed] = {}
        self.vectors: dict[str, torch.Tensor] = {}

    def load(self, state: State, strict: bool = True) -> None:
        """Pack plain weights one at a time. Raises `WeightError` before anything is replaced."""
        shapes = weight_shapes(self._config)
        _check(state, shapes, strict)
        fused = (f"{self._first}.weight", "kv_a_proj_with_mqa.weight")
        self._pack("qkv_a_proj", torch.cat([self._take(state[name]) for name in fused]))
        if self._config.q_lora_rank is not None:
            self._pack("q_b_proj", self._take(state["q_b_proj.weight"]))
        self._pack_kv_b(self._take(state["kv_b_proj.weight"]))
        self._pack("o_proj", self._take(state["o_proj.weight"]))
        vectors = (name for name, shape in shapes.items() if len(shape) == 1)
        self.vectors = {name: self._take(state[name]) for name in vectors}
        if self._config.attention_bias:
            self.vectors["qkv_a_proj.bias"] = self._fused_bias()

    def _take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a detached copy in the layer's dtype on its device."""
        return tensor.detach().to(self._device, self._dtype, copy=True)

    def _pack(self, role: str, weight: torch.Tensor) -> None:
        self.packed[role] = self._ops[role].op.pack(weight)

    def _pack_kv_b(self, weight: torch.Tensor) -> None:
        n, v = self._config.qk_nope_head_dim, self._config.v_head_dim
        per_head = weight.unflatten(0, (self._config.num_attention_heads, n + v))  # [h, n + v, c]
        self._pack("kv_b_proj", weight)
        self._pack("w_uk", per_head[:, :n].transpose(1, 2))  # [h, c, n]
        self._pack("w_uv", per_head[:, n:])  # [h, v, c]

    def _fused_bias(self) -> torch.Tensor:
        """Return the bias of the fused first projection; q_proj has none, which counts as zero."""
        kv_a = self.vectors["kv_a_proj_with_mqa.bias"]
        width = self._ops["qkv_a_proj"].spec.out_features - kv_a.shape[0]
        return torch.cat((self.vectors.get(f"{self._first}.bias", kv_a.new_zeros(width)), kv_a))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return plain copies of the weights under Hugging Face names."""
        shapes = weight_shapes(self._config)
        rows = (shapes[f"{self._first}.weight"][0], self._config.latent_dim)
        q, kv_a = self._unpack("qkv_a_proj").split(rows)
        plain = {f"{self._first}.weight": q, "kv_a_proj_with_mqa.weight": kv_a, **self.vectors}
        for name in shapes:
            if name not in plain:
                plain[name] = self._unpack(name.removesuffix(".weight"))
        return {name: plain[name].clone() for name in shapes}

    def _unpack(self, role: str) -> torch.Tensor:
        return self._ops[role].op.unpack(self.packed[role])

    def nbytes(self) -> int:
        """Return the bytes the packed matrices keep alive; views of one storage count once."""
        storages: dict[int, int] = {}
        for packed in self.packed.values():
            if torch.is_tensor(packed.data):
                storage = packed.data.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            else:
                storages[id(packed)] = packed.nbytes
        return sum(storages.values())


def _check(state: State, shapes: Mapping[str, tuple[int, ...]], strict: bool) -> None:
    for name, shape in shapes.items():
        if name not in state:
            raise WeightError(f"weight '{name}' is missing.")
        found = tuple(state[name].shape)
        if found != shape:
            raise WeightError(f"weight '{name}' has shape {list(found)}, expected {list(shape)}.")
    unknown = sorted(set(state) - set(shapes)) if strict else []
    if unknown:
        raise WeightError(f"weight '{unknown[0]}' does not belong to this layer ({len(unknown)} unknown).")
