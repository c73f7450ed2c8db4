"""The sides of the comparison: `transformers` with each of its attentions and dtypes, and with our ops.

All have one layer of real dimensions and the same random weights; the rest of the model is small.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from benchmarks.transformers.meters import Memory
from mla.config import MLAConfig
from mla.integrations.transformers import PagedCache, restore, use_mla

ATTENTIONS = ("sdpa", "eager")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SIZES = ("hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank")
_HEAD = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(eq=False)
class Side:
    """One way to run the model."""

    name: str
    model: Any
    weight_bytes: int  # of the attention layer
    backend: str = ""  # of our ops; "" for `transformers` alone
    pages: int = 0  # tokens of a `PagedCache`; 0 for a stock cache

    @property
    def dtype(self) -> str:
        """The name of the weights' dtype."""
        return str(self.model.dtype).removeprefix("torch.")

    def start(self) -> None:
        """Give back scratch memory, and select this side's attention."""
        if self.backend:
            use_mla(restore(self.model), self.backend)
        else:
            self.select()

    def select(self) -> None:
        """Select the attention, which sides of one model share."""
        if not self.backend:
            self.model.set_attn_implementation(self.name)

    def cache(self, latent: torch.Tensor, pe: torch.Tensor) -> dict[str, Any]:
        """Return a cache that holds latent [b, 1, s, c] and pe [b, 1, s, r], as the model's argument."""
        requests, _, tokens, _ = latent.shape
        like = {"device": self.model.device, "dtype": self.model.dtype}
        if not self.pages:
            stock: Any = DynamicCache(config=self.model.config)
            if tokens:
                stock.update(latent.to(**like), pe.to(**like), 0)
            return {cache_argument(self.model): stock}
        paged = PagedCache(self.model, max_tokens=self.pages)
        if tokens:
            sequences = paged.latents.new_sequences(requests)
            for index, sequence in enumerate(sequences):
                paged.latents.load(sequence, latent[index, 0].to(**like), pe[index, 0].to(**like), 0)
            paged.use(sequences)
        return paged.argument

    def cache_bytes(self, words: dict[str, Any]) -> int:
        """Return the bytes of the latents that a cache holds, in whole pages where it has pages."""
        (cache,) = words.values()
        if self.pages:
            latents = cache.latents
            return int(latents.pages.nbytes * (latents.num_pages - latents.free_pages) // latents.num_pages)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def cache_argument(model: Any) -> str:
    """Return what this `transformers` calls the cache among a forward's arguments."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def make_model(config: MLAConfig, dtype: torch.dtype) -> Any:
    """Return a model of one layer and a small vocabulary; in every dtype with the weights of bfloat16."""
    sizes: dict[str, Any] = {name: getattr(config, name) for name in (*_SIZES, *_HEAD)}
    rest: dict[str, Any] = {
        "vocab_size": 1024,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": config.num_attention_heads,
        "max_position_embeddings": 163840,
    }
    torch.manual_seed(0)
    model: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **rest))
    return model.bfloat16().to(dtype).eval()


def make_sides(config: MLAConfig, backend: str, device: torch.device, tokens: int) -> Iterator[Side]:
    """Yield all sides, ours last; `tokens` is the most that a cache must hold."""
    memory = Memory(device)
    _warm_up(config, backend, device)
    for dtype in DTYPES:
        before = memory.in_use()
        model = make_model(config, dtype).to(device)
        taken = memory.in_use() - before - _beside_attention(model)
        yield from (Side(name, model, taken) for name in ATTENTIONS)
    before = memory.in_use()
    model = make_model(config, torch.bfloat16).to(device)
    memory.in_use()  # gives back what making it took besides, before plain weights are freed in between
    beside = _beside_attention(model)
    use_mla(model, backend)
    taken = memory.in_use() - before - beside
    yield Side("mla", model, taken, backend)
    yield Side("mla-paged", model, taken, backend, tokens)


def _beside_attention(model: Any) -> int:
    """Return the bytes of all weights that are not the attention layer's."""
    whole, attention = (
        sum(parameter.nbytes for parameter in part.parameters())
        for part in (model, model.model.layers[0].self_attn)
    )
    return int(whole - attention)


def _warm_up(config: MLAConfig, backend: str, device: torch.device) -> None:
    """Load what is loaded at the first use, so that no side's memory has it."""
    model = make_model(config, torch.bfloat16).to(device)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.no_grad():
        model(ids)
        use_mla(model, backend)(ids)
