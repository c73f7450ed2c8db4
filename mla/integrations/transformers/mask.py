"""Which keys a step's queries see, as `transformers` says it: one range of keys for each request."""

from __future__ import annotations

from typing import Any

import torch

from mla.integrations.transformers.errors import UnsupportedModel

NAME = "mla"  # of our attention function and its masks among those of `transformers`


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
    """Return each request's first visible key and the one after its last, on the host: [B, 1, 1, 2] int32.

    An `AttentionMaskInterface`, called once per forward. Every query sees the keys up to its own. With four
    dimensions it passes for a finished mask, which `transformers` leaves alone. Raises `UnsupportedModel` for
    masks that say anything else.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function or int(kv_offset):
        raise UnsupportedModel(
            "this step's mask is not plain causal attention (packed sequences, a window, or a mask of its "
            "own), which the ops of `use_mla` do not serve: call `restore(model)` before."
        )
    stop = int(q_offset) + q_length
    if attention_mask is None:
        return _ranges(torch.zeros(batch_size, dtype=torch.int32), stop)
    if attention_mask.ndim != 2 or not stop <= attention_mask.shape[1] <= kv_length:
        raise UnsupportedModel(
            f"attention_mask has shape {list(attention_mask.shape)}, and there are {stop} tokens so far: "
            "`use_mla` takes a mask [batch, tokens] of all tokens so far."
        )
    seen = attention_mask[:, :stop].to("cpu", torch.bool)
    start = stop - seen.sum(dim=1)
    if not torch.equal(seen, torch.arange(stop) >= start[:, None]):
        raise UnsupportedModel(
            "attention_mask hides tokens in the middle or at the end of a prompt: `use_mla` takes padding on "
            "the left alone (`tokenizer.padding_side = 'left'`)."
        )
    return _ranges(start, stop)


def _ranges(start: torch.Tensor, stop: int) -> torch.Tensor:
    return torch.stack((start, torch.full_like(start, stop)), dim=1).int()[:, None, None]
