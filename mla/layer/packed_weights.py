"""`PackedWeights`: a layer's weights in the layouts its ops need, and back again bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from weakref import WeakValueDictionary

import torch

from mla.checkpoint import LazyState, StoredLayer, finite
from mla.config import MLAConfig
from mla.errors import WeightError
from mla.layer.ops import Ops
from mla.weights import FP32, INDEX_WEIGHTS, SINKS, weight_shapes
from mla_backends.api import Packed

# Matrices of the indexer by the role that each has in a layer.
INDEXER = {
    "indexer.wq_b.weight": "index_q_proj",
    "indexer.wk.weight": "index_k_proj",
    INDEX_WEIGHTS: "index_weights_proj",
}
State = Mapping[str, torch.Tensor]
# What packed a weight -> the weight: of layers with one state dict, for as long as one of them holds it.
SharedWeights = WeakValueDictionary[Hashable, Packed]
Use = Callable[[torch.Tensor], torch.Tensor]  # from a weight to what one role packs of it


class PackedWeights:
    """Matrices by role (`qkv_a_proj`, `o_proj`, `w_uk`, ...) in `packed`, norms and biases in `vectors`.

    q_proj (or q_a_proj) and kv_a_proj_with_mqa read the same input, so they are one weight. kv_b_proj is
    kept twice, since expanding the context (`kv_b_proj`) and absorption (`w_uk`, `w_uv`) contract different
    axes.
    """

    def __init__(self, config: MLAConfig, ops: Ops, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._ops, self._dtype, self._device = config, ops, dtype, device
        self._first = "q_proj" if config.q_lora_rank is None else "q_a_proj"
        self.packed: dict[str, Packed] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        self._unscaled: dict[str, torch.Tensor] = {}  # norms as loaded, where `vectors` holds scaled ones
        self.shared: SharedWeights | None = None  # with layers that load the same state dict

    def load(self, state: State, strict: bool = True) -> None:
        """Pack plain weights one at a time. On an error the previous weights stay."""
        shapes = weight_shapes(self._config)
        check_weights(state, shapes, strict)
        vectors = {name: self._take(state, name) for name, shape in shapes.items() if len(shape) == 1}
        if self._config.attention_bias:
            vectors["qkv_a_proj.bias"] = self._fused_bias(vectors)
        unscaled = self._fold_latent_scales(vectors)
        self.packed, self.vectors, self._unscaled = dict(self._pack_all(state)), vectors, unscaled

    def load_kv_b(self, weight: torch.Tensor) -> None:
        """Pack kv_b_proj [h (n + v), c] alone."""
        name = "kv_b_proj.weight"
        check_weights({name: weight}, {name: weight_shapes(self._config)[name]}, strict=True)
        self.packed = dict(self._pack({name: weight}, [name], self._uses_of_kv_b()))

    def _fold_latent_scales(self, vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Scale norm weights by the config's latent scales, in place; return the plain ones."""
        scales = {"q_a_layernorm.weight": self._config.q_latent_scale}
        scales["kv_a_layernorm.weight"] = self._config.kv_latent_scale
        plain = {name: vectors[name] for name, scale in scales.items() if scale != 1}
        for name, weight in plain.items():
            vectors[name] = (weight.float() * scales[name]).to(self._dtype)
        return plain

    def _pack_all(self, state: State) -> Iterator[tuple[str, Packed]]:
        """Yield every packed matrix; large ones first, because packing may hold one of them twice."""
        alone = {f"{role}.weight": role for role in ("o_proj", "g_proj", "q_b_proj")} | INDEXER
        for name, role in alone.items():
            if role in self._ops:
                yield from self._pack(state, [name], {role: _whole})
        first = [f"{self._first}.weight", "kv_a_proj_with_mqa.weight"]
        yield from self._pack(state, first, {"qkv_a_proj": _whole})
        yield from self._pack(state, ["kv_b_proj.weight"], self._uses_of_kv_b())

    def _uses_of_kv_b(self) -> Mapping[str, Use]:
        n, v = self._config.qk_nope_head_dim, self._config.v_head_dim

        def per_head(weight: torch.Tensor) -> torch.Tensor:  # [h, n + v, c]
            return weight.unflatten(0, (self._config.num_attention_heads, n + v))

        return {
            "kv_b_proj": _whole,
            "w_uk": lambda weight: per_head(weight)[:, :n].transpose(1, 2),  # [h, c, n]
            "w_uv": lambda weight: per_head(weight)[:, n:],  # [h, v, c]
        }

    def _pack(
        self, state: State, names: Sequence[str], uses: Mapping[str, Use]
    ) -> Iterator[tuple[str, Packed]]:
        """Yield a weight packed for its roles; it is read only if another layer has not packed it for all."""
        shared = WeakValueDictionary() if self.shared is None else self.shared
        keys = {role: (role, *self._ops[role].key()) for role in uses}
        known = {role: shared.get(key) for role, key in keys.items()}
        held = {role: packed for role, packed in known.items() if packed is not None}
        missing = [role for role in uses if role not in held]
        weight = self._take(state, *names) if missing else torch.empty(0, device="cpu")
        for role in missing:
            shared[keys[role]] = held[role] = self._ops[role].op.pack(uses[role](weight))
        yield from held.items()

    def _take(self, state: State, *names: str) -> torch.Tensor:
        """Return a copy of the weights, stacked by rows, in the layer's dtype on its device."""
        shapes = weight_shapes(self._config)
        rows = [shapes[name][0] for name in names]
        dtype = torch.float32 if names[0] in FP32 else self._dtype
        out = torch.empty(sum(rows), *shapes[names[0]][1:], dtype=dtype, device=self._device)
        for name, part in zip(names, out.split(rows), strict=True):
            if isinstance(state, LazyState):
                state.read_into(name, part)
            else:
                part.copy_(state[name].detach())
            if not isinstance(state, StoredLayer) and not finite(part):  # which names the rows
                raise WeightError(f"weight '{name}' holds NaN or infinity, or does in {self._dtype}.")
        return out

    def _fused_bias(self, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the bias of the fused first projection; that of q_proj is zero."""
        kv_a = vectors["kv_a_proj_with_mqa.bias"]
        width = self._ops["qkv_a_proj"].spec.out_features - kv_a.shape[0]
        return torch.cat((vectors.get(f"{self._first}.bias", kv_a.new_zeros(width)), kv_a))

    def leave_to_sinks(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Take from attention out [t, h, ...], with lse [t, h] fp32, what sinks have of the softmax."""
        if (sinks := self.vectors.get(SINKS)) is not None:
            out.mul_((lse - sinks).sigmoid_()[..., None])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return plain copies of the weights under Hugging Face names."""
        shapes = weight_shapes(self._config)
        rows = (shapes[f"{self._first}.weight"][0], self._config.latent_dim)
        q, kv_a = self.unpack("qkv_a_proj").split(rows)
        vectors = {**self.vectors, **self._unscaled}
        plain = {f"{self._first}.weight": q, "kv_a_proj_with_mqa.weight": kv_a, **vectors}
        for name in shapes:
            if name not in plain:
                plain[name] = self.unpack(INDEXER.get(name, name.removesuffix(".weight")))
        return {name: plain[name].clone() for name in shapes}

    def unpack(self, role: str) -> torch.Tensor:
        """Return the weight of a role, which may be a view of the packed one."""
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


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _shape(name: str, weight: torch.Tensor) -> tuple[int, ...]:
    """Return a weight's shape. Raises `WeightError` for what holds no numbers of a weight."""
    if not isinstance(weight, torch.Tensor):
        raise WeightError(f"weight '{name}' is a {type(weight).__name__}, expected a tensor.")
    if not weight.is_floating_point() or weight.layout != torch.strided or weight.is_meta:
        what = "a meta tensor" if weight.is_meta else f"{weight.dtype} ({weight.layout})"
        raise WeightError(f"weight '{name}' is {what}, expected a dense tensor of floating-point numbers.")
    return tuple(weight.shape)


def check_weights(state: State, shapes: Mapping[str, tuple[int, ...]], strict: bool) -> None:
    """Raise `WeightError` naming a weight that is missing, misshapen, no dense floating-point tensor or, if
    `strict`, unknown.
    """
    for name, shape in shapes.items():
        if name not in state:
            raise WeightError(f"weight '{name}' is missing.")
        actual = state.shape(name) if isinstance(state, LazyState) else _shape(name, state[name])
        if actual != shape:
            raise WeightError(f"weight '{name}' has shape {list(actual)}, expected {list(shape)}.")
    unknown = sorted(set(state) - set(shapes)) if strict else []
    if unknown:
        raise WeightError(f"weight '{unknown[0]}' does not belong to this layer ({len(unknown)} unknown).")
