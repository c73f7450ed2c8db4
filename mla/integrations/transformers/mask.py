"""Which keys a step's queries see, as `transformers` says it: one range of keys for each request."""

from __future__ import annotations

from typing import Any

import torch

from mla.integrations.transformers.errors import UnsupportedModel
from mla.integrations.transformers.uncompiled import uncompiled

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
            "this step's mask is not plain causal attention (packed sequences, a window, or a mask of its "
            "own), which the ops of `use_mla` do not serve: call `restore(model)` before."
        )
    tokens = int(q_offset) + q_length
    if attention_mask is None:
        return _marked(torch.ones(batch_size, 1, 1, tokens, dtype=torch.int32, device="cpu"), q_length)
    fits = attention_mask.ndim == 2 and tokens <= attention_mask.shape[1] <= kv_length
    if not fits or attention_mask.shape[0] != batch_size:
        raise UnsupportedModel(
            f"attention_mask has shape {list(attention_mask.shape)}, and there are {tokens} tokens so far of "
            f"{batch_size} requests: `use_mla` takes a mask [batch, tokens] of all tokens so far."
        )
    return _marked(attention_mask[:, None, None, :tokens].to("cpu", torch.int32), q_length)


def _marked(flags: torch.Tensor, queries: int) -> torch.Tensor:
    held: Any = flags
    held.mla_queries = queries
    return flags


def is_ours(mask: object, queries: int | None = None) -> bool:
    """Return whether `visible_keys` made this mask, for a step of so many queries; None is any."""
    made_for = getattr(mask, "mla_queries", None)
    return made_for is not None and queries in (None, made_for)
