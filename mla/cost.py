"""FLOPs and bytes that are needed, from actual lengths. Arithmetic: needs no torch.

A multiply-add counts as 2 FLOPs. Bytes are those that must move at least once. Letters as in the design: T
tokens, h heads, n, r, c, v. `linear_cost` and the other `_cost` functions are of one call of an op, every
operand of which moves. `role_costs` are the parts of a layer step, whose sum is `step_work`: what passes from
one part to the next (queries, latent outputs, rebuilt keys) moves no bytes there, because a step need not
take it to memory; norms, rotations and the product with a gate count nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mla.config import MLAConfig

if TYPE_CHECKING:
    from mla_backends.api import AttentionSpec, IndexerSpec, LinearSpec, NormSpec

# Attention paths a request can take.
ABSORBED, EXPANDED = "absorbed", "expanded"
MAX_KEYS = 2**31  # of a query that sees all keys: none has more


class Work(NamedTuple):
    """What a computation needs: FLOPs, and bytes that must move at least once."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]  # a sum, not a longer tuple
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def attended_pairs(query_len: int, kv_len: int) -> int:
    """Return the causal query-key pairs: query i of t sees kv_len - t + i + 1 keys."""
    return query_len * (kv_len - query_len) + query_len * (query_len + 1) // 2


def selected_pairs(query_len: int, kv_len: int, topk: int) -> int:
    """Return the query-key pairs of sparse attention: query i of t selects min(topk, kv_len - t + i + 1).

    Equal to `attended_pairs` where no context is longer than topk.
    """
    past = kv_len - query_len
    rising = min(query_len, max(0, topk - past))  # queries that select all they see
    return rising * past + rising * (rising + 1) // 2 + (query_len - rising) * topk


def latent_attention_flops(heads: int, pairs: int, c: int, r: int) -> int:
    """Return the FLOPs of scores over c + r and values of c, for every query-key pair of every head."""
    return 2 * heads * pairs * (2 * c + r)


def expanded_attention_flops(heads: int, pairs: int, qk_head_dim: int, v: int) -> int:
    """Return the FLOPs of scores over n + r and values of v, for every query-key pair of every head."""
    return 2 * heads * pairs * (qk_head_dim + v)


# ------------------------------------------------------------------------------------- one call of an op


def linear_cost(spec: LinearSpec, tokens: int) -> Work:
    """Return the work of `linear`, and of `batched_linear`, which has a weight per head."""
    weights = spec.groups * spec.in_features * spec.out_features
    moved = weights + tokens * spec.groups * (spec.in_features + spec.out_features)
    return Work(2 * tokens * weights, spec.dtype.itemsize * moved)


def rms_norm_cost(spec: NormSpec, tokens: int) -> Work:
    """Return the work of `rms_norm`: square and add, then scale and weigh."""
    return Work(4 * tokens * spec.features, spec.dtype.itemsize * (2 * tokens + 1) * spec.features)


def rotate_query_cost(spec: AttentionSpec, tokens: int) -> Work:
    """Return the work of `rotate_query`: 6 FLOPs per pair of channels, and fp32 angles per token."""
    channels, angles = tokens * spec.num_heads * spec.qk_rope_head_dim, tokens * spec.qk_rope_head_dim
    return Work(3 * channels, 2 * spec.dtype.itemsize * channels + 4 * angles)


def cached_bytes(spec: AttentionSpec) -> int:
    """Return the bytes of a token in the cache."""
    return spec.token_bytes or spec.dtype.itemsize * (spec.kv_lora_rank + spec.qk_rope_head_dim)


def write_latent_cost(spec: AttentionSpec, tokens: int) -> Work:
    """Return the work of `write_latent`: norm c channels, rotate r, with fp32 angles and int64 slots."""
    c, r = spec.kv_lora_rank, spec.qk_rope_head_dim
    moved = spec.dtype.itemsize * (tokens * (c + r) + c) + tokens * (cached_bytes(spec) + 4 * r + 8)
    return Work(tokens * (4 * c + 3 * r), moved)


def latent_attention_cost(
    spec: AttentionSpec, query_lens: Sequence[int], kv_lens: Sequence[int], read: int | None = None
) -> Work:
    """Return the work of `latent_attention`: one key of c + r and one value of c for all heads; fp32 lse.

    Also of `sparse_latent_attention`, over what queries select. `read`: how many different latents are read;
    by default all, or as many as the requests' queries can select.
    """
    c, r, h, tokens = spec.kv_lora_rank, spec.qk_rope_head_dim, spec.num_heads, sum(query_lens)
    topk = spec.topk or MAX_KEYS
    pairs = [selected_pairs(new, keys, topk) for new, keys in zip(query_lens, kv_lens, strict=True)]
    if read is None:
        read = sum(map(min, pairs, kv_lens)) if spec.topk else sum(kv_lens)
    moved = tokens * (spec.dtype.itemsize * h * (2 * c + r) + 4 * (h + spec.topk)) + read * cached_bytes(spec)
    return Work(latent_attention_flops(h, sum(pairs), c, r), moved)


def expanded_attention_cost(spec: AttentionSpec, query_lens: Sequence[int], kv_lens: Sequence[int]) -> Work:
    """Return the work of `expanded_attention`: keys of n + r and values of v per head; fp32 lse."""
    h, v, tokens = spec.num_heads, spec.v_head_dim, sum(query_lens)
    width = spec.qk_nope_head_dim + spec.qk_rope_head_dim
    moved = spec.dtype.itemsize * h * (width + v) * (tokens + sum(kv_lens))
    flops = expanded_attention_flops(h, sum(map(attended_pairs, query_lens, kv_lens)), width, v)
    return Work(flops, moved + 4 * tokens * h)


def write_index_key_cost(spec: IndexerSpec, tokens: int) -> Work:
    """Return the work of `write_index_key`: norm D channels, rotate R, with fp32 angles and int64 slots."""
    d, r, wide = spec.head_dim, spec.rope_head_dim, spec.dtype.itemsize
    return Work(tokens * (8 * d + 3 * r), wide * (tokens + 2) * d + tokens * (index_bytes(spec) + 4 * r + 8))


def index_bytes(spec: IndexerSpec) -> int:
    """Return the bytes of a token in the index cache."""
    return spec.token_bytes or spec.dtype.itemsize * spec.head_dim


def select_latents_cost(spec: IndexerSpec, query_lens: Sequence[int], kv_lens: Sequence[int]) -> Work:
    """Return the work of `select_latents`: D products of every head and pair, and a weighted sum over heads.

    Queries, fp32 weights, every index key of a request once, and int32 positions. Comparisons count nothing.
    """
    h, d, tokens = spec.num_heads, spec.head_dim, sum(query_lens)
    moved = tokens * (h * (spec.dtype.itemsize * d + 4) + 4 * spec.topk) + sum(kv_lens) * index_bytes(spec)
    return Work(2 * h * (d + 1) * sum(map(attended_pairs, query_lens, kv_lens)), moved)


# ------------------------------------------------------------------------------------- weights of a layer


def weights(config: MLAConfig) -> dict[str, int]:
    """Return role -> how many weights it has, without norms and biases, which are negligible; 0 of none.

    Those of q (or q_a) and kv_a are one weight, and kv_b is W_UK and W_UV.
    """
    d, h, c, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
    q_width, heads, width = h * config.qk_head_dim, config.index_n_heads, config.index_head_dim
    return {
        "qkv_a_proj": d * ((rank or q_width) + config.latent_dim),
        "q_b_proj": (rank or 0) * q_width,
        "g_proj": d * config.gate_width,
        "o_proj": h * config.v_head_dim * d,
        "w_uk": h * c * config.qk_nope_head_dim,
        "w_uv": h * c * config.v_head_dim,
        "index_q_proj": (rank or 0) * heads * width,
        "index_k_proj": d * width if heads else 0,
        "index_weights_proj": d * heads,
    }


# Roles of the projections of every new token, of kv_b, and of an indexer: of keys, and of a selection.
PROJECTIONS = ("qkv_a_proj", "q_b_proj", "g_proj", "o_proj")
KV_B, INDEXER = ("w_uk", "w_uv"), ("index_k_proj", "index_q_proj", "index_weights_proj")


def parameters(config: MLAConfig, roles: Sequence[str] = (*PROJECTIONS, *KV_B, *INDEXER)) -> int:
    """Return the number of weights of some roles, by default of the layer."""
    counts = weights(config)
    return sum(counts[role] for role in roles)


# ------------------------------------------------------------------------------------------ a layer step


def by_path(
    config: MLAConfig, query_lens: Sequence[int], kv_lens: Sequence[int], attention: str = "auto"
) -> dict[str, list[int]]:
    """Return path -> the requests that take it; by "auto", each takes the one with fewer FLOPs."""
    members: dict[str, list[int]] = {ABSORBED: [], EXPANDED: []}
    everyone, per_head = list(range(len(query_lens))), config.qk_nope_head_dim + config.v_head_dim
    per_pair, per_token = 2 * config.kv_lora_rank - per_head, config.kv_lora_rank * per_head

    def extra(query_len: int, kv_len: int) -> int:  # (absorbed - expanded) / 2h, as in `role_costs`
        return attended_pairs(query_len, kv_len) * per_pair + (query_len - kv_len) * per_token

    # For a single token, `extra` is positive whatever the number of keys, or falls as that rises.
    decodes = everyone and query_lens.count(1) == len(everyone)
    if attention != "auto" or (decodes and extra(1, min(kv_lens)) <= 0):
        members[ABSORBED if attention == "auto" else attention] += everyone
        return members
    for request, lengths in enumerate(zip(query_lens, kv_lens, strict=True)):
        members[ABSORBED if extra(*lengths) <= 0 else EXPANDED].append(request)
    return members


def role_costs(
    config: MLAConfig,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    element_size: int,
    attention: str = "auto",
    token_bytes: int = 0,
    index_bytes: int = 0,
) -> dict[str, Work]:
    """Return role of `mla.layer.ops` -> its work in one forward; `attention` as in `MLA`.

    `token_bytes` of a token in the cache, `index_bytes` of one in the index cache; by default they hold
    elements.

    Roles that do not run or count nothing are left out. kv_b's weights count once: for W_UK and W_UV if any
    request is absorbed, else for kv_b_proj. With a context beyond `config.index_topk`, all requests are
    absorbed, and each attends at least so many different latents.
    """
    h, c, r = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    sparse, counts, tokens = 0 < config.index_topk < max(kv_lens, default=0), weights(config), sum(query_lens)
    requests = list(zip(query_lens, kv_lens, strict=True))
    members = by_path(config, query_lens, kv_lens, ABSORBED if sparse else attention)
    absorbed, expanded = ([requests[i] for i in members[path]] for path in (ABSORBED, EXPANDED))
    cached = token_bytes or element_size * config.latent_dim
    rows = dict.fromkeys((role for role in PROJECTIONS if counts[role]), tokens)  # of products with weights
    costs = {"write_latent": Work(bytes=tokens * cached)}
    if config.index_n_heads:
        key = index_bytes or element_size * config.index_head_dim
        rows |= dict.fromkeys(INDEXER if sparse else INDEXER[:1], tokens)
        costs["write_index_key"] = Work(bytes=tokens * key)
        scores = 2 * config.index_n_heads * config.index_head_dim
        if sparse:
            pairs = sum(map(attended_pairs, query_lens, kv_lens))
            costs["select_latents"] = Work(scores * pairs, sum(kv_lens) * key)
    if absorbed:  # every head's W_UK and W_UV on new tokens; each attended latent is read once
        topk = config.index_topk if sparse else MAX_KEYS
        rows |= dict.fromkeys(KV_B, sum(new for new, _ in absorbed))
        pairs = sum(selected_pairs(*request, topk) for request in absorbed)
        read = sum(min(keys, topk) for _, keys in absorbed) * cached
        role = "sparse_latent_attention" if sparse else "latent_attention"
        costs[role] = Work(latent_attention_flops(h, pairs, c, r), read)
    if expanded:  # kv_b over the context, whose latents are read once; its keys and values move no byte
        keys, held = sum(keys for _, keys in expanded), parameters(config, KV_B)
        pairs = sum(attended_pairs(*request) for request in expanded)
        read = keys * cached + element_size * held * (not absorbed)
        costs["kv_b_proj"] = Work(2 * keys * held, read)
        dims = config.qk_head_dim, config.v_head_dim
        costs["expanded_attention"] = Work(expanded_attention_flops(h, pairs, *dims))
    for role, count in rows.items():  # weights are read once; the first reads hidden states, the last writes
        wide = 4 if role == "index_weights_proj" else element_size
        moved = tokens * config.hidden_size if role in ("qkv_a_proj", "o_proj") else 0
        costs[role] = Work(2 * count * counts[role], wide * (counts[role] + moved))
    return costs


def step_work(
    config: MLAConfig,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    element_size: int,
    attention: str = "auto",
    token_bytes: int = 0,
    index_bytes: int = 0,
) -> Work:
    """Return the work of one forward: weights once, each attended latent once, hidden states in and out."""
    costs = role_costs(config, query_lens, kv_lens, element_size, attention, token_bytes, index_bytes)
    return sum(costs.values(), Work())
