"""The float64 oracle: one MLA layer as the paper writes it, on the host, one request at a time.

Independent of the layer on purpose: heads are expanded, nothing is paged, absorbed or fused, and no
code of `attention.py`, `reference/` or `cache.py` is used. Shared are the config's softmax scale
and YaRN magnitude and `rope.inverse_frequencies`, which tests compare with `transformers`. Angles
stay fp32(position) * fp32(inv_freq), because that is what a checkpoint was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from mla.config import MLAConfig
from mla.layer.rope import inverse_frequencies

State = Mapping[str, torch.Tensor]


def oracle(
    config: MLAConfig,
    state: State,
    hidden: torch.Tensor,  # [T, d], requests back to back
    query_lens: Sequence[int],
    history: Sequence[tuple[torch.Tensor, torch.Tensor]],  # per request kv [s, c] normed, pe [s, r] rotated
) -> torch.Tensor:
    """Return the layer's output [T, d] in float64; weights and inputs are taken as they are stored."""
    wide = {name: weight.double() for name, weight in _host(state).items()}
    outputs = [
        _request(config, wide, new, *past)
        for new, past in zip(hidden.cpu().double().split(list(query_lens)), history, strict=True)
    ]
    return torch.cat(outputs)


def oracle_of_last(
    config: MLAConfig,
    state: State,
    hidden: torch.Tensor,  # [T, d], requests back to back
    last: torch.Tensor,  # [n, B, d]: what may stand in place of each request's last token
    query_lens: Sequence[int],
    history: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Return the outputs [n, B, d] in float64 of the replaced last tokens; no other row sees them."""
    wide = {name: weight.double() for name, weight in _host(state).items()}
    requests = zip(hidden.cpu().double().split(list(query_lens)), last.unbind(1), history, strict=True)
    found = [_last_rows(config, wide, new[:-1], own.cpu().double(), *past) for new, own, past in requests]
    return torch.stack(found, dim=1)


def _last_rows(
    config: MLAConfig,
    state: State,
    before: torch.Tensor,  # [t - 1, d]
    last: torch.Tensor,  # [n, d]
    kv: torch.Tensor,
    pe: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs [n, d] of one request whose last token is one of several."""
    c, n = config.kv_lora_rank, config.qk_nope_head_dim
    start = kv.shape[0] + before.shape[0]
    keys, keys_pe = _latents(config, state, before, torch.arange(kv.shape[0], start))
    keys, keys_pe = torch.cat((kv.cpu().double(), keys)), torch.cat((pe.cpu().double(), keys_pe))
    at = torch.full((last.shape[0],), start)
    own, own_pe = _latents(config, state, last, at)
    q = _queries(config, state, last) * _by_position(config, at)
    q_pe = _rotate(config, q[..., n:], at)
    kv_b = state["kv_b_proj.weight"].view(config.num_attention_heads, n + config.v_head_dim, c)
    heads = []
    for head, weight in enumerate(kv_b):
        k_nope, value = (keys @ weight.T).split((n, config.v_head_dim), dim=1)
        own_k, own_value = (own @ weight.T).split((n, config.v_head_dim), dim=1)
        seen = q[:, head, :n] @ k_nope.T + q_pe[:, head] @ keys_pe.T
        itself = (q[:, head, :n] * own_k).sum(1) + (q_pe[:, head] * own_pe).sum(1)
        weights = (torch.cat((seen, itself[:, None]), dim=1) * config.softmax_scale).softmax(-1)
        heads.append(weights[:, :-1] @ value + weights[:, -1:] * own_value)
    return _project(state, "o_proj", torch.stack(heads, dim=1).flatten(1))


def _latents(
    config: MLAConfig, state: State, hidden: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what new tokens are cached as: kv [t, c] normed, pe [t, r] rotated."""
    c = config.kv_lora_rank
    latent = _project(state, "kv_a_proj_with_mqa", hidden)
    kv = _norm(latent[:, :c], state["kv_a_layernorm.weight"], config.rms_norm_eps) * config.kv_latent_scale
    return kv, _rotate(config, latent[:, None, c:], positions)[:, 0]


def _host(state: State) -> dict[str, torch.Tensor]:
    return {name: weight.cpu() for name, weight in state.items()}


def _request(
    config: MLAConfig, state: State, hidden: torch.Tensor, kv: torch.Tensor, pe: torch.Tensor
) -> torch.Tensor:
    """Return one request's output [t, d]."""
    n = config.qk_nope_head_dim
    positions = torch.arange(kv.shape[0], kv.shape[0] + hidden.shape[0])
    q = _queries(config, state, hidden) * _by_position(config, positions)  # [t, h, n + r]
    q_pe = _rotate(config, q[..., n:], positions)
    new_kv, new_pe = _latents(config, state, hidden, positions)
    keys = torch.cat((kv.cpu().double(), new_kv))  # [s, c]
    keys_pe = torch.cat((pe.cpu().double(), new_pe))  # [s, r]
    heads = _attend(config, state, q[..., :n], q_pe, keys, keys_pe)
    return _project(state, "o_proj", heads.flatten(1))


def _queries(config: MLAConfig, state: State, hidden: torch.Tensor) -> torch.Tensor:
    if config.q_lora_rank is None:
        q = _project(state, "q_proj", hidden)
    else:
        q_a = _project(state, "q_a_proj", hidden)
        q = _project(state, "q_b_proj", _norm(q_a, state["q_a_layernorm.weight"], config.rms_norm_eps))
    return q.unflatten(1, (config.num_attention_heads, config.qk_head_dim)) * config.q_latent_scale


def _by_position(config: MLAConfig, positions: torch.Tensor) -> torch.Tensor | float:
    """Return what each query [t, h, n + r] is multiplied by: 1 + beta ln(1 + floor(p / period))."""
    if config.query_scaling is None:
        return 1.0
    beta, period = config.query_scaling.beta, config.query_scaling.period
    factors = [1.0 + beta * math.log(1 + position // period) for position in positions.tolist()]
    return torch.tensor(factors, dtype=torch.float64)[:, None, None]


def _attend(
    config: MLAConfig,
    state: State,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    keys: torch.Tensor,
    keys_pe: torch.Tensor,
) -> torch.Tensor:
    """Return softmax attention [t, h, v] over expanded keys and values, head by head to bound memory."""
    n = config.qk_nope_head_dim
    kv_b = state["kv_b_proj.weight"].unflatten(0, (config.num_attention_heads, n + config.v_head_dim))
    t, s = q_nope.shape[0], keys.shape[0]
    future = torch.arange(s)[None, :] > torch.arange(s - t, s)[:, None]
    heads = []
    for head, weight in enumerate(kv_b):
        k_nope, value = (keys @ weight.T).split((n, config.v_head_dim), dim=1)
        logits = (q_nope[:, head] @ k_nope.T + q_pe[:, head] @ keys_pe.T) * config.softmax_scale
        heads.append(logits.masked_fill(future, -torch.inf).softmax(-1) @ value)
    return torch.stack(heads, dim=1)


def _project(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(config: MLAConfig, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate x [t, h, r] by multiplying channel pairs, as complex numbers, with e^(i angle)."""
    if config.rope_theta is None:
        return x
    angles = torch.outer(positions.float(), inverse_frequencies(config)).double()
    magnitude = config.rope_scaling.magnitude() if config.rope_scaling else 1.0
    turn = torch.polar(torch.full_like(angles, magnitude), angles)[:, None]
    if config.rope_interleave:
        pairs = torch.complex(x[..., 0::2], x[..., 1::2])
        return torch.view_as_real(pairs * turn).flatten(-2)
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)
