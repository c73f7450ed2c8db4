"""The float64 oracle: one MLA layer as the paper writes it, on the host, one request at a time.

Independent of the layer on purpose: heads are expanded, nothing is paged, absorbed or fused, and no
code of `attention.py`, `reference/` or `cache.py` is used. Shared are the config's softmax scale
and YaRN magnitude and `rope.inverse_frequencies`, which tests compare with `transformers`. Angles
stay fp32(position) * fp32(inv_freq), because that is what a checkpoint was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from mla.config import MLAConfig
from mla.layer.rope import inverse_frequencies

State = Mapping[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
Held = Callable[[torch.Tensor], torch.Tensor]  # which of some positions [n] are attended, bool [n]


# Logits of so many bytes are made at once, or of one choice.
LOGITS_BYTES = 256 << 20
FEW_BYTES = 1 << 21  # of all that heads are given which are attended together


def oracle(
    config: MLAConfig,
    state: State,
    hidden: torch.Tensor,  # [T, d], requests back to back
    query_lens: Sequence[int],
    history: Sequence[Pair],  # per request kv [s, c] normed, pe [s, r] rotated
    held: Held | None = None,
    selection: torch.Tensor | None = None,  # [T, topk]
) -> torch.Tensor:
    """Return the layer's output [T, d] in float64; weights and inputs are taken as they are stored.

    Only tokens at positions that are `held` are attended, by default all; without any, attention is 0.
    Given a `selection`, a token attends the positions within its request that it names (-1 is none).
    """
    picks = None if selection is None else selection[None]
    return oracle_of_choices(config, state, hidden[None], query_lens, history, held, picks)[0]


def oracle_of_choices(
    config: MLAConfig,
    state: State,
    hidden: torch.Tensor,  # [n, T, d]: choices of new tokens, requests back to back
    query_lens: Sequence[int],
    history: Sequence[Pair],
    held: Held | None = None,
    selections: torch.Tensor | None = None,  # [n, T, topk]
) -> torch.Tensor:
    """Return the outputs [n, T, d] in float64 of every choice; the history is expanded once for all."""
    wide = {name: weight.double() for name, weight in _host(state).items()}
    lengths = list(query_lens)
    picks = [None] * len(lengths) if selections is None else selections.cpu().long().split(lengths, dim=1)
    requests = zip(hidden.cpu().split(lengths, dim=1), picks, history, strict=True)
    outputs = [
        _request(config, wide, new.double(), *past, held, pick)
        for new, pick, past in requests
        if new.shape[1]
    ]
    return torch.cat(outputs or [hidden.cpu().double()], dim=1)


def oracle_of_last(
    config: MLAConfig,
    state: State,
    hidden: torch.Tensor,  # [T, d], requests back to back
    last: torch.Tensor,  # [n, B, d]: what may stand in place of each request's last token
    query_lens: Sequence[int],
    history: Sequence[Pair],
    held: Held | None = None,
) -> torch.Tensor:
    """Return the outputs [n, B, d] in float64 of the replaced last tokens; no other row sees them."""
    wide = {name: weight.double() for name, weight in _host(state).items()}
    requests = zip(hidden.cpu().double().split(list(query_lens)), last.unbind(1), history, strict=True)
    rows = [
        _last_rows(config, wide, new[:-1], last.cpu().double(), *past, held) for new, last, past in requests
    ]
    return torch.stack(rows, dim=1)


def _last_rows(
    config: MLAConfig,
    state: State,
    before: torch.Tensor,  # [t - 1, d]
    last: torch.Tensor,  # [n, d]
    kv: torch.Tensor,
    pe: torch.Tensor,
    held: Held | None,
) -> torch.Tensor:
    """Return the outputs [n, d] of one request whose last token is one of several."""
    positions = torch.arange(kv.shape[0], kv.shape[0] + before.shape[0])
    new_kv, new_pe = _latents(config, state, before, positions)
    past = torch.cat((kv.cpu().double(), new_kv)), torch.cat((pe.cpu().double(), new_pe))
    return _request(config, state, last[:, None], *past, held)[:, 0]


def _latents(config: MLAConfig, state: State, hidden: torch.Tensor, positions: torch.Tensor) -> Pair:
    """Return what new tokens are cached as: kv [t, c] normed, pe [t, r] rotated."""
    c = config.kv_lora_rank
    latent = _project(state, "kv_a_proj_with_mqa", hidden)
    kv = _norm(latent[:, :c], state["kv_a_layernorm.weight"], config.rms_norm_eps) * config.kv_latent_scale
    pe = _rotate(config, latent[:, None, c:], positions)[:, 0]
    return kv, pe


def _host(state: State) -> dict[str, torch.Tensor]:
    return {name: weight.cpu() for name, weight in state.items()}


def _request(
    config: MLAConfig,
    state: State,
    hidden: torch.Tensor,
    kv: torch.Tensor,
    pe: torch.Tensor,
    held: Held | None,
    selection: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return one request's outputs [n, t, d] for choices of new tokens [n, t, d] and selections [n, t, k]."""
    choices, t = hidden.shape[:2]
    nope, rows = config.qk_nope_head_dim, hidden.flatten(0, 1)
    positions = torch.arange(kv.shape[0], kv.shape[0] + t).repeat(choices)
    q = _queries(config, state, rows) * _by_position(config, positions)  # [n t, h, nope + r]
    q = torch.cat((q[..., :nope], _rotate(config, q[..., nope:], positions)), dim=-1)
    new_kv, new_pe = (part.unflatten(0, (choices, t)) for part in _latents(config, state, rows, positions))
    past, unseen = (kv.cpu().double(), pe.cpu().double()), torch.zeros(t, dtype=torch.bool)
    if held is not None:
        kept = held(torch.arange(kv.shape[0]))
        past, unseen = (past[0][kept], past[1][kept]), ~held(positions[:t])
    left = None
    if selection is not None:  # column 0 stands for -1
        named = torch.zeros(choices, t, kv.shape[0] + t + 1, dtype=torch.bool)
        left = ~named.scatter_(2, selection + 1, True)[..., 1:]
    heads = _attend(config, state, q.unflatten(0, (choices, t)), past, (new_kv, new_pe), unseen, left)
    if config.output_gate is not None:
        heads = heads / (1 + (-_gate(config, state, hidden)).exp())
    return _project(state, "o_proj", heads.flatten(2))


def _gate(config: MLAConfig, state: State, hidden: torch.Tensor) -> torch.Tensor:
    """Return what the gates of hidden [n, t, d] are the sigmoid of: [n, t, h, 1] or [n, t, h, v]."""
    return _project(state, "g_proj", hidden).unflatten(2, (config.num_attention_heads, -1))


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
    q: torch.Tensor,  # [n, t, h, nope + r]
    past: Pair,  # kv [p, c], pe [p, r]: seen by all choices
    new: Pair,  # kv [n, t, c], pe [n, t, r]
    unseen: torch.Tensor,  # [t] bool: new tokens that nothing attends
    left: torch.Tensor | None,  # [n, t, p + t] bool: what each query leaves out
) -> torch.Tensor:
    """Return attention [n, t, h, v] over expanded keys and values; heads and choices in turn bound memory."""
    nope, v = config.qk_nope_head_dim, config.v_head_dim
    kv_b = state["kv_b_proj.weight"].unflatten(0, (config.num_attention_heads, nope + v))
    (n, t), p = q.shape[:2], past[0].shape[0]
    at_once = max(1, LOGITS_BYTES // max(1, 8 * t * (p + t)))
    few = max(1, FEW_BYTES // max(1, 8 * (n * t * (p + t) + (n * t + p) * (q.shape[3] + v))))  # heads
    every = [torch.cat((old, now.flatten(0, 1))) for old, now in zip(past, new, strict=True)]
    sinks = state["sinks"] if config.sink_logits else torch.full((len(kv_b),), -math.inf).double()
    heads = []
    for some, sink, weight in zip(q.split(few, 2), sinks.split(few), kv_b.split(few), strict=True):
        expanded = _expanded(weight, every, nope)
        seen = [x[:, :p] for x in expanded]
        fresh = [x[:, p:].unflatten(1, (n, t)) for x in expanded]
        parts = [x.split(at_once, 1) for x in (some.movedim(2, 0), *fresh)]
        chunks = zip(*parts, [None] * len(parts[0]) if left is None else left.split(at_once), strict=True)
        attended = [_softmax_attention(config.softmax_scale, sink, unseen, *seen, *chunk) for chunk in chunks]
        heads.append(torch.cat(attended, dim=1))
    return torch.cat(heads).movedim(0, 2)


def _expanded(weight: torch.Tensor, latents: Sequence[torch.Tensor], nope: int) -> Pair:
    """Return keys [h, s, nope + r] and values [h, s, v] of latents, given weights [h, nope + v, c]."""
    kv, pe = latents
    expanded = (kv @ weight.flatten(0, 1).T).unflatten(-1, weight.shape[:2]).movedim(-2, 0)
    keys, values = expanded.split((nope, weight.shape[1] - nope), dim=-1)
    return torch.cat((keys, pe.expand(len(weight), *pe.shape)), dim=-1), values


def _softmax_attention(
    scale: float,
    sink: torch.Tensor,  # [h], logits that are not scaled, of no value
    unseen: torch.Tensor,  # [t] bool
    past_keys: torch.Tensor,  # [h, p, nope + r]
    past_values: torch.Tensor,  # [h, p, v]
    q: torch.Tensor,  # [h, n, t, nope + r]
    keys: torch.Tensor,
    values: torch.Tensor,  # [h, n, t, v]
    left: torch.Tensor | None,  # [n, t, p + t] bool
) -> torch.Tensor:
    """Return attention [h, n, t, v] over what all choices see, and each over its own tokens."""
    (n, t), past = q.shape[1:3], past_keys.shape[1]
    future = torch.ones(t, t, dtype=torch.bool).triu(1) | unseen
    among_new = (q @ keys.mT).masked_fill_(future, -torch.inf)
    logits = torch.cat((q.flatten(1, 2) @ past_keys.mT, among_new.flatten(1, 2)), dim=2)
    if left is not None:
        logits.masked_fill_(left.flatten(0, 1), -torch.inf)
    weights = logits.mul_(scale).softmax(-1)
    if left is not None or bool(unseen.any()):  # a token may attend nothing
        weights.masked_fill_(logits.isneginf().all(-1, keepdim=True), 0.0)
    if not bool(sink.isneginf().all()):  # it takes its share of what all keys had
        weights /= 1 + (sink[:, None, None] - logits.logsumexp(-1, keepdim=True)).exp()
    from_past = (weights[..., :past] @ past_values).unflatten(1, (n, t))
    return from_past + weights[..., past:].unflatten(1, (n, t)) @ values


def index_keys_of(
    config: MLAConfig, state: State, hidden: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return the index keys [t, D] of hidden [t, d] in float64 (DeepSeek-V3.2's report, section 2.1).

    LayerNorm with bias of wk(hidden), eps 1e-6, then the rotation of the first r channels.
    """
    k = _project(state, "indexer.wk", hidden)
    k = k - k.mean(-1, keepdim=True)
    k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state["indexer.k_norm.weight"]
    return _turned(config, (k + state["indexer.k_norm.bias"])[:, None], positions)[:, 0]


def _turned(config: MLAConfig, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return x [t, H, D] with its first r channels rotated, in the indexer's layout."""
    layout, r = replace(config, rope_interleave=config.indexer_rope_interleave), config.qk_rope_head_dim
    return torch.cat((_rotate(layout, x[..., :r], positions), x[..., r:]), dim=-1)


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


FLOAT64_BYTES = 8


class Run(NamedTuple):
    """What the oracle computes of one request at once: choices of new tokens over one past."""

    choices: int
    new: int
    past: int
    uncached: int = 0  # tokens of the past whose latents it computes as well

    @property
    def rows(self) -> int:
        return self.choices * self.new

    @property
    def pairs(self) -> int:
        """Query-key pairs whose logits are made, masked ones too."""
        return self.rows * (self.past + self.new)


def oracle_bytes(config: MLAConfig, runs: Sequence[Run], itemsize: int) -> int:
    """Return what inputs of `itemsize` bytes per number, the oracle and its outputs need at most.

    Weights and history count elsewhere. The bounds of a check need less, once the oracle is done.
    """
    numbers = config.hidden_size * sum(run.rows for run in runs)
    outputs = 3 * FLOAT64_BYTES * numbers  # of single requests, of all, and by step
    inputs = 3 * itemsize * numbers  # as they were drawn, all choices together, and by request
    return inputs + outputs + max(_run_bytes(config, run) for run in runs)


def _run_bytes(config: MLAConfig, run: Run) -> int:
    """Return what one run needs: rows and their queries, the past with a head's keys and values, logits."""
    per_row = 2 * config.hidden_size + 4 * config.num_attention_heads * config.qk_head_dim
    per_row += 3 * config.gate_width and config.num_attention_heads * config.v_head_dim  # gated heads
    per_key = 2 * config.latent_dim + 2 * config.qk_head_dim + config.v_head_dim
    logits = FLOAT64_BYTES * run.pairs
    at_once = min(logits, max(logits // run.choices, LOGITS_BYTES))
    uncached = run.uncached * (config.hidden_size + 2 * config.latent_dim)
    return FLOAT64_BYTES * (run.rows * per_row + run.past * per_key + uncached) + 3 * at_once
