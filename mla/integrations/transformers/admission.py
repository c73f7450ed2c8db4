"""Admission: what our ops do not do is refused before anything is changed, or a cache is written.

`survey` looks at a model before it is used, `Check` at what `generate` is asked for and at every forward
before its layers run, and `visible_keys` at the mask, which `transformers` asks for."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import nn
from transformers.cache_utils import Cache

from mla.config import MLAConfig
from mla.errors import ConfigError, MLAError

NO_WEIGHTS = (
    "`use_mla` computes no attention weights: leave output_attentions out, or `restore(model)` and select "
    "eager attention to get them."
)
NOT_CAUSAL = (
    "a layer of this model has is_causal = False, but `use_mla` computes causal attention only: call "
    "`restore(model)` before setting it."
)
NOT_PREPARED = (
    "this config was copied from a model under `use_mla`, as `use_mtp` does: leave that out. Give another "
    "model its own config and call `model.set_attn_implementation('sdpa')` first."
)
NOT_NUMBERED = (
    "the requests of this forward have different lengths in the PagedCache: give position_ids "
    "[batch, tokens]."
)
NO_BEAMS = (
    "a PagedCache keeps the order of its requests: use a stock cache for beams, or leave num_beams out."
)
NO_DRAFTS = (
    "the draft layers of use_mtp are copies of this model's, and cannot run our ops: leave use_mtp out, or "
    "`restore(model)` first."
)
NO_BATCHING = (
    "`generate_batch` takes attention functions of `transformers` alone: `restore(model)` first, or batch "
    "with a PagedCache, as examples/serve_loop.py does."
)
NOT_TRAINED = (
    "`use_mla` serves inference: call `model.eval()` and run under `torch.no_grad()`, or `restore(model)` to "
    "train."
)
NOT_ALL = "layer {} of this cache keeps a window of {}: `use_mla` needs all of them, as `DynamicCache` has."
NO_FORMAT = "only a PagedCache holds {}: make one of this model, and pass `**cache.argument`."
OWN_MASK = "`use_mla` takes no mask [batch, 1, queries, keys]: give attention_mask [batch, tokens], or none."


class UnsupportedModel(MLAError):
    """A model, a cache or a feature of `transformers` that `use_mla` does not serve."""


def require_inference(*tensors: torch.Tensor, training: bool = False) -> None:
    """Raise `UnsupportedModel` where gradients are wanted: our ops have none."""
    if training or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        raise UnsupportedModel(NOT_TRAINED)


F = TypeVar("F", bound=Callable[..., object])


def uncompiled(function: F) -> F:
    """Keep `torch.compile` out of a function: steps are worked out on the host, and ops are a backend's."""
    return cast("F", torch.compiler.disable(function))


NAME = "mla"  # of our attention function and its masks among those of `transformers`


@uncompiled
def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    **other: Any,
) -> torch.Tensor:
    """Return which keys each request sees, the last query's among them, on the host: [B, 1, 1, s] int32.

    An `AttentionMaskInterface`, called once per forward. Every query sees visible keys up to its own. With
    four dimensions it passes for a finished mask, which `transformers` leaves alone; `is_ours` knows it from
    those of others. Raises `UnsupportedModel` for masks that say anything else.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function or int(kv_offset):
        raise UnsupportedModel(
            "`use_mla` serves plain causal attention only, and this step has packed sequences, a window or "
            "another mask: call `restore(model)` first."
        )
    tokens = int(q_offset) + q_length
    if attention_mask is None:
        return _marked(torch.ones(batch_size, 1, 1, tokens, dtype=torch.int32, device="cpu"), q_length)
    fits = attention_mask.ndim == 2 and tokens <= attention_mask.shape[1] <= kv_length
    if not fits or attention_mask.shape[0] != batch_size:
        raise UnsupportedModel(
            f"attention_mask has shape {list(attention_mask.shape)} for {tokens} tokens so far of "
            f"{batch_size} requests: `use_mla` takes a mask [batch, tokens] of all tokens so far."
        )
    return _marked(attention_mask[:, None, None, :tokens].to("cpu", torch.int32), q_length)


def _marked(flags: torch.Tensor, queries: int) -> torch.Tensor:
    held: Any = flags
    held.mla_queries = queries
    return flags


def is_ours(mask: object, queries: int | None = None) -> bool:
    """Return whether `visible_keys` made this mask, for a step of `queries` queries; None is any."""
    made_for = getattr(mask, "mla_queries", None)
    return made_for is not None and queries in (None, made_for)


# ------------------------------------------------------------------------------------------- survey
# Which layers of a model can run our ops, and why it may not be served: asked before anything is changed.

# A layer's projections; no family has all.
PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "g_proj", "o_proj")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_hf_hook")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Survey(NamedTuple):
    """The layers that are to run our ops, and what they have in common."""

    layers: list[Any]
    models: list[Any]  # those that hold them, from the outermost one
    owner: Any  # of these the language model, whose config says what all of them attend with
    config: MLAConfig
    dtype: torch.dtype
    device: torch.device


def survey(model: Any) -> Survey:
    """Return what there is to serve. Raises `UnsupportedModel`."""
    if isinstance(model, type) or not hasattr(model, "set_attn_implementation"):
        kind = type(model).__name__
        raise UnsupportedModel(f"{kind} is not a model of `transformers` 5.20 or later: load one first.")
    layers = find_attention(model)
    if any(hasattr(layer, "mla_attention") for layer in layers):
        raise UnsupportedModel("this model runs our ops already: call `restore(model)` first.")
    if not layers:
        raise UnsupportedModel(f"{type(model).__name__} has no multi-head latent attention (no kv_b_proj).")
    models = [
        part for part in model.modules() if hasattr(part, "set_attn_implementation") and find_attention(part)
    ]
    try:
        config = MLAConfig.from_dict(layers[0].config.to_dict())
    except ConfigError as error:
        raise UnsupportedModel(f"{type(model).__name__} cannot be served: {error}") from error
    owner = _owner(model, models, layers)
    for fault in _faults(model, layers, config):
        raise UnsupportedModel(fault)
    weight = layers[0].kv_b_proj.weight
    return Survey(layers, models, owner, config, weight.dtype, weight.device)


def find_attention(model: Any) -> list[Any]:
    """Return the model's latent attention layers, in their order."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [
        module for module in modules if hasattr(module, "kv_b_proj") and hasattr(module, "kv_a_layernorm")
    ]


def _owner(model: Any, models: list[Any], layers: list[Any]) -> Any:
    """Return the model that all layers have their config from; other parts attend as they did."""
    owner = next((part for part in models if all(layer.config is part.config for layer in layers)), None)
    if owner is None:
        raise UnsupportedModel(
            f"{type(model).__name__} holds several language models: call `use_mla` on each of them."
        )
    if any(part.config.output_attentions for part in models):
        raise UnsupportedModel(NO_WEIGHTS)
    if owner.config._attn_implementation == NAME:
        raise UnsupportedModel(NOT_PREPARED)
    return owner


def _faults(model: Any, layers: list[Any], config: MLAConfig) -> Iterator[str]:
    """Yield why a model cannot be served whose layers are to run our ops, a sentence each."""
    devices = {str(weight.device) for layer in layers for weight in layer.parameters()}
    mapped = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 or len(mapped) > 1 or "meta" in devices:  # all have to be on one, and stay there
        places = ", ".join(sorted(map(str, mapped or devices)))
        where = f"over devices or offloaded ({places})"
        yield f"this model is split {where}: load it on one, without `device_map`."
    for layer in layers:
        yield from _faults_of(layer, config)
    # Packing a projection takes its weight away, from other modules as well.
    modules = Counter(id(linear) for layer in layers for _, linear in _projections(layer))
    weights = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for layer in layers:
        for name, linear in _projections(layer):
            if modules[id(linear)] > 1 or weights[id(linear.weight)] > 1:
                yield (
                    f"{name} of layer {layer.layer_idx} shares its weight with another module, and packing "
                    "would take it away: untie them first."
                )
    if len(dtypes := {linear.weight.dtype for layer in layers for _, linear in _projections(layer)}) > 1:
        yield (
            f"this model's projections differ in dtype ({', '.join(sorted(map(str, dtypes)))}): cast it to "
            "one with `model.to(...)`."
        )


def _faults_of(layer: Any, config: MLAConfig) -> Iterator[str]:
    """Yield why one layer cannot be served: it computes something else than its config announces."""
    kind, number = type(layer).__name__, layer.layer_idx
    gate, indexer = getattr(layer, "g_proj", None), getattr(layer, "indexer", None)
    if not hasattr(layer, "expand_kv"):
        yield (
            f"{kind} is not a class of `transformers`, and caches expanded keys: load the "
            "model without `trust_remote_code`."
        )
    for name, linear in _projections(layer):
        if more := _more_than_a_weight(linear, name != "kv_b_proj"):
            yield (
                f"{name} of this model is {more}: load it unquantized, without adapters or offloading, in "
                "bfloat16, float16 or float32."
            )
    for what, has, announced in (
        ("output gates per token", 0 if gate is None else gate.weight.shape[0], config.gate_width),
        ("index heads", 0 if indexer is None else indexer.n_heads, config.of_layer(number).index_n_heads),
        ("as the scale of logits", layer.scaling, config.softmax_scale),
    ):
        if abs(has - announced) > 1e-6 * announced:
            yield (
                f"layer {number}, a {kind}, has {has:.6g} {what}, and its config announces {announced:.6g}: "
                "this class computes another model."
            )


def _projections(layer: Any) -> list[tuple[str, Any]]:
    return [(name, linear) for name in PROJECTIONS if (linear := getattr(layer, name, None)) is not None]


def _more_than_a_weight(linear: Any, may_have_bias: bool) -> str:
    """Return what a projection is if it is not its weight (and bias) and nothing else; "" if it is."""
    kind, weight = type(linear), getattr(linear, "weight", None)
    if kind is not nn.Linear:
        return f"{kind.__module__}.{kind.__name__}"
    if type(weight) is not nn.Parameter:
        return f"an nn.Linear whose weight is a {type(weight).__name__}"
    if weight.dtype not in DTYPES:
        return f"an nn.Linear of {weight.dtype}"
    if "forward" in vars(linear):
        return "an nn.Linear with a forward of its own"
    if linear.bias is not None and not may_have_bias:
        return "an nn.Linear with a bias"
    hooked = weight._backward_hooks or any(getattr(linear, name, None) for name in HOOKS)
    return "an nn.Linear with hooks" if hooked else ""


# -------------------------------------------------------------------------------------------- check
# `Check`: what our ops do not do is refused before a layer runs, so that no cache has been written yet.
class Check:
    """A forward pre-hook of the innermost model, which runs the layers, and of `generate` by `watch`."""

    def __init__(self, surveyed: Survey) -> None:
        self._device = surveyed.device.type
        self._layers = surveyed.layers
        self._signature = inspect.signature(surveyed.models[-1].forward)

    def watch(self, model: Any, inner: Any) -> None:
        """Refuse what `generate` of a model around `inner` cannot do, before its first forward.

        Neither is kept alive by the other. `leave_alone` undoes this.
        """
        kind, weak, around = type(model), weakref.ref(model), weakref.ref(inner)

        def prepare(config: Any, given: dict[str, Any], *arguments: Any, **words: Any) -> Any:
            for fault in chain(self._faults_of_generation(config, given), self._faults_of_state(around())):
                raise UnsupportedModel(fault)
            return getattr(kind, PREPARES)(weak(), config, given, *arguments, **words)

        for name, instead in ((PREPARES, prepare), (BATCHES, _no_batching)):
            if hasattr(model, name):
                setattr(model, name, instead)

    @uncompiled
    def __call__(self, model: Any, arguments: tuple[Any, ...], words: dict[str, Any]) -> None:
        """Raise `UnsupportedModel` for a forward that cannot be served."""
        given = {**words, **self._signature.bind_partial(*arguments, **words).arguments}
        for fault in chain(self._faults(model, given), self._faults_of_state(model)):
            raise UnsupportedModel(fault)
        require_inference(*_tensors(given.values()))

    def _faults(self, model: Any, given: dict[str, Any]) -> Iterator[str]:
        """Yield why a forward cannot be served, a sentence each."""
        caches = _caches(given)
        inputs = [given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None]
        shape = inputs[0].shape[:2] if inputs else None
        if given.get("output_attentions", model.config.output_attentions):
            yield NO_WEIGHTS
        if not all(_is_of_this_step(x, shape, caches) for x in _tensors(given.values()) if x.ndim == 4):
            yield OWN_MASK
        if given.get("position_ids") is None and any(getattr(cache, "is_uneven", False) for cache in caches):
            yield NOT_NUMBERED
        for index, kept in _layers_of(caches):
            if getattr(kept, "is_sliding", False) and kept.get_mask_sizes(1)[1]:
                yield NOT_ALL.format(index, "tokens and has dropped some")

    def _faults_of_generation(self, config: Any, given: dict[str, Any]) -> Iterator[str]:
        """Yield why `generate` cannot do what its `GenerationConfig` and keywords ask for."""
        caches, core = _caches(given), self._layers[0].mla_attention.core
        paged = any(getattr(cache, "is_paged", False) for cache in caches)
        if config.output_attentions:
            yield NO_WEIGHTS
        if getattr(config, "use_mtp", False):
            yield NO_DRAFTS
        if paged and config.num_beams > 1:
            yield NO_BEAMS
        if not paged and (kept := core.cache_format or core.index_format):
            yield NO_FORMAT.format(kept)
        for index, kept in _layers_of(caches):
            window = getattr(kept, "sliding_window", None) or getattr(kept, "max_cache_len", None)
            if getattr(kept, "is_sliding", False) and window and window < config.max_length - 1:
                yield NOT_ALL.format(index, f"{window} tokens, fewer than this generates")

    def _faults_of_state(self, model: Any) -> Iterator[str]:
        """Yield what is wrong whatever is run: modes, and what was changed since `use_mla`."""
        selected = model.config._attn_implementation
        if torch.is_autocast_enabled(self._device):
            yield "`use_mla` computes in the dtype of the model's weights: leave autocast out."
        if selected != NAME:
            yield (
                f"{selected} attention was selected for a model that runs our ops: call `restore(model)` "
                "before."
            )
        if not all(getattr(layer, "is_causal", True) for layer in self._layers):
            yield NOT_CAUSAL
        trains = any(layer.training for layer in self._layers)
        if not trains and torch.is_grad_enabled():  # or no weight is asked, since that takes a while
            trains = any(weight.requires_grad for weight in model.parameters())
        if trains:
            yield NOT_TRAINED


# What `generate` calls with all that it was asked for before its first forward, and what starts batching.
PREPARES, BATCHES = "_prepare_cache_for_generation", "init_continuous_batching"


def leave_alone(model: Any) -> None:
    """Undo `Check.watch`."""
    for name in (PREPARES, BATCHES):
        vars(model).pop(name, None)


def _no_batching(*arguments: Any, **words: Any) -> NoReturn:
    raise UnsupportedModel(NO_BATCHING)


def _caches(given: dict[str, Any]) -> list[Cache]:
    return [value for value in given.values() if isinstance(value, Cache)]


def _layers_of(caches: list[Cache]) -> Iterator[tuple[int, Any]]:
    return chain(*(enumerate(cache.layers) for cache in caches))


def _is_of_this_step(mask: torch.Tensor, shape: torch.Size | None, caches: list[Cache]) -> bool:
    """Return whether `visible_keys` made a mask [B, 1, 1, s] for this step of B, t = shape tokens."""
    if shape is None:  # the model says that it needs them
        return is_ours(mask)
    if not is_ours(mask, shape[1]) or mask.shape[0] != shape[0]:
        return False
    held: list[Any] = [cache.get_seq_length() for cache in caches]
    if any(isinstance(count, torch.Tensor) and count.device.type != "cpu" for count in held):
        return True  # or the device would be waited for
    return bool(mask.shape[-1] == shape[1] + sum(map(int, held)))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among a forward's arguments; masks may be several in a dict."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
