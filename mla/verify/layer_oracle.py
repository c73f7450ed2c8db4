"""The float64 oracle: one MLA layer as the paper writes it, on the host, one request at a time.

Independent of the layer on purpose: heads are expanded, nothing is paged, absorbed or fused, and no
code of `attention.py`, `reference/` or `cache.py` is used. Shared are the config's softmax scale
and YaRN magnitude and `rope.inverse_frequencies`, which tests compare with `transformers`. Angles
stay fp32(position) * fp32(inv_freq), because that is what a checkpoint was trained with.

Rows of a layer that selects are few among many keys: they are attended over latents as they are cached, for
q . (W k) is (q W) . k, exactly the same in float64 but for its last digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from mla.config import MLAConfig
from mla.layer.rope import inverse_frequencies
from mla.verify.op_oracle import true_layer_norm, true_norm, true_rotation

State = Mapping[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
Held = Callable[[torch.Tensor], torch.Tensor]  # which of some positions [n] are attended, bool [n]


# Logits of so many bytes are made at once, or of one choice.
LOGITS_BYTES = 256 << 20
FEW_BYTES = 1 << 21  # of all that heads are given which are attended together


def oracle(
    config: MLAConfig,
    state: State,
    hidden: torch.Tensor,  # [T, d], requests back to back; or [n, T, d]: choices of them
    query_lens: Sequence[int],
    history: Sequence[Pair],  # per request kv [s, c] normed, pe [s, r] rotated
    held: Held | None = None,
    selection: torch.Tensor | None = None,  # [T, topk], or [n, T, topk]
) -> torch.Tensor:
    """Return the layer's outputs like `hidden` in float64; weights and inputs are taken as they are stored.

    Only tokens at positions that are `held` are attended, by default all; without any, attention is 0.
    Given a `selection`, a token attends the positions within its request that it names (-1 is none).
    The history is expanded once for all choices.
    """
    layer, lengths, rows = TrueLayer(config, state), list(query_lens), hidden.cpu().double()
    choices, picks = rows if rows.dim() == 3 else rows[None], [None] * len(lengths)
    if selection is not None:
        picks = selection.cpu().long().view(*choices.shape[:2], selection.shape[-1]).split(lengths, dim=1)
    requests = zip(choices.split(lengths, dim=1), picks, history, strict=True)
    outputs = [layer.request(new, past, held, pick) for new, pick, past in requests if new.shape[1]]
    return torch.cat(outputs or [choices], dim=1).view(rows.shape)


def oracle_of_steps(
    config: MLAConfig,
    state: State,
    hidden: torch.Tensor,  # [n, steps, T, d]: choices of all steps' tokens, requests back to back in each
    query_lens: Sequence[int],  # of one step
    history: Sequence[Pair],
    held: Held | None = None,
) -> torch.Tensor:
    """Return the outputs [n, steps, T, d] in float64: all steps come from one prefill per request."""
    steps, lens = hidden.shape[1], list(query_lens)
    every = [new * steps for new in lens]
    rows = torch.cat([request.flatten(1, 2) for request in hidden.split(lens, dim=2)], dim=1)
    requests = zip(oracle(config, state, rows, every, history, held).split(every, dim=1), lens, strict=True)
    return torch.cat([request.unflatten(1, (steps, new)) for request, new in requests], dim=2)


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
    layer, rows = TrueLayer(config, state), []
    for new, of, past in zip(hidden.split(list(query_lens)), last.unbind(1), history, strict=True):
        before = layer.latents(new[:-1], torch.arange(len(past[0]), len(past[0]) + len(new) - 1))
        whole = [torch.cat((old.cpu().double(), more)) for old, more in zip(past, before, strict=True)]
        rows.append(layer.request(of.cpu().double()[:, None], whole, held)[:, 0])
    return torch.stack(rows, dim=1)


class TrueLayer:
    """One layer in float64, on the host; its weights are taken as they are stored.

    `state` has the names of a checkpoint; of an indexer `indexer.wq_b`, `wk`, `k_norm` and `weights_proj`.
    Tokens come in any floating dtype, from any device, with their positions int64; results are float64.
    """

    def __init__(self, config: MLAConfig, state: State) -> None:
        self.config = config
        self._state = {name: weight.cpu().double() for name, weight in state.items()}

    def latents(self, hidden: torch.Tensor, positions: torch.Tensor) -> Pair:
        """Return what tokens [t, d] at positions [t] are cached as: kv [t, c] normed, pe [t, r] rotated."""
        config = self.config
        latent = self._project("kv_a_proj_with_mqa", hidden.cpu().double())
        kv = self._normed("kv_a_layernorm", latent[:, : config.kv_lora_rank]) * config.kv_latent_scale
        return kv, self._rotated(latent[:, None, config.kv_lora_rank :], positions)[:, 0]

    def queries(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the queries [t, h, n + r] of tokens [t, d] at positions [t], the last r channels rotated.

        They are times 1 + beta ln(1 + floor(position / period)) in a layer that scales them.
        """
        config, nope = self.config, self.config.qk_nope_head_dim
        name, x = "q_proj", hidden
        if config.q_lora_rank is not None:
            name, x = "q_b_proj", self._normed("q_a_layernorm", self._project("q_a_proj", hidden))
        q = (
            self._project(name, x).unflatten(1, (config.num_attention_heads, config.qk_head_dim))
            * config.q_latent_scale
        )
        if config.query_scaling is not None:
            beta, period = config.query_scaling.beta, config.query_scaling.period
            factors = [1.0 + beta * math.log(1 + position // period) for position in positions.tolist()]
            q = q * torch.tensor(factors, dtype=torch.float64)[:, None, None]
        return torch.cat((q[..., :nope], self._rotated(q[..., nope:], positions)), dim=-1)

    def index_keys(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the index keys [t, D] of tokens [t, d] at positions [t] (DeepSeek-V3.2's report, 2.1).

        LayerNorm with bias of wk(hidden), eps 1e-6, then the rotation of the first r channels.
        """
        weight, bias = (self._state[f"indexer.k_norm.{name}"] for name in ("weight", "bias"))
        k = true_layer_norm(self._project("indexer.wk", hidden.cpu().double()), weight, bias, 1e-6)
        return self._turned(k[:, None], positions)[:, 0]

    def index_queries(self, hidden: torch.Tensor, positions: torch.Tensor) -> Pair:
        """Return what `select_latents` is to be given for tokens [t, d]: q [t, H, D] and weights [t, H].

        Queries are wq_b of the normed query latent, their first r channels rotated. Weights are weights_proj
        of the tokens times (H D)^-0.5, the factor that DeepSeek-V3.2 puts on scores.
        """
        config, rows = self.config, hidden.cpu().double()
        q_a = self._normed("q_a_layernorm", self._project("q_a_proj", rows)) * config.q_latent_scale
        q = self._project("indexer.wq_b", q_a).unflatten(1, (config.index_n_heads, -1))
        return self._turned(q, positions), self._project("indexer.weights_proj", rows) * config.index_scale

    def request(
        self,
        hidden: torch.Tensor,  # [n, t, d]: choices of new tokens
        past: Sequence[torch.Tensor],  # kv [s, c], pe [s, r]
        held: Held | None = None,
        selection: torch.Tensor | None = None,  # [n, t, topk]
    ) -> torch.Tensor:
        """Return one request's outputs [n, t, d]: see `oracle`. Only one of the last two may be given."""
        (choices, t), (kv, pe) = hidden.shape[:2], (part.cpu().double() for part in past)
        rows, s = hidden.flatten(0, 1), len(kv)
        positions = torch.arange(s, s + t).repeat(choices)
        q = self.queries(rows, positions).unflatten(0, (choices, t))
        new = [part.unflatten(0, (choices, t)) for part in self.latents(rows, positions)]
        hides = None  # which keys [n, t, s + t] a query leaves out
        if held is not None:
            kept = held(torch.arange(s))
            kv, pe = kv[kept], pe[kept]
            unseen = torch.cat((torch.zeros(len(kv), dtype=torch.bool), ~held(positions[:t])))
            hides = unseen.expand(choices, t, -1)
        elif selection is not None:  # column 0 stands for -1
            named = torch.zeros(choices, t, s + t + 1, dtype=torch.bool)
            hides = ~named.scatter_(2, selection + 1, True)[..., 1:]
        return self._output(self._attend(q, (kv, pe), new, hides), hidden)

    def _attend(
        self,
        q: torch.Tensor,  # [n, t, h, nope + r]
        past: Pair,  # kv [p, c], pe [p, r]: seen by all choices
        new: Sequence[torch.Tensor],  # kv [n, t, c], pe [n, t, r]
        hides: torch.Tensor | None,  # [n, t, p + t] bool
    ) -> torch.Tensor:
        """Return attention [n, t, h, v] over expanded keys and values; few heads and choices at once."""
        config, (n, t), p = self.config, q.shape[:2], len(past[0])
        kv_b = self._state["kv_b_proj.weight"].unflatten(0, (config.num_attention_heads, -1))
        at_once = max(1, LOGITS_BYTES // max(1, 8 * t * (p + t)))
        width = q.shape[3] + config.v_head_dim
        few = max(1, FEW_BYTES // max(1, 8 * (n * t * (p + t) + (n * t + p) * width)))  # heads
        kv, pe = (torch.cat((old, now.flatten(0, 1))) for old, now in zip(past, new, strict=True))
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        out = torch.empty((len(kv_b), n, t, config.v_head_dim), dtype=torch.float64)
        for first in range(0, len(kv_b), few):
            heads = slice(first, first + few)
            expanded = (kv @ kv_b[heads].flatten(0, 1).T).unflatten(-1, kv_b[heads].shape[:2]).movedim(-2, 0)
            keys, values = expanded.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
            keys = torch.cat((keys, pe.expand(len(keys), *pe.shape)), dim=-1)
            own_keys, own_values = (x[:, p:].unflatten(1, (n, t)) for x in (keys, values))
            for choice in range(0, n, at_once):
                some = slice(choice, choice + at_once)
                queries = q[some, :, heads].movedim(2, 0)  # [h, n, t, nope + r]
                own = (queries @ own_keys[:, some].mT).masked_fill_(later, -torch.inf)
                logits = torch.cat((queries.flatten(1, 2) @ keys[:, :p].mT, own.flatten(1, 2)), dim=2)
                if hides is not None:
                    logits.masked_fill_(hides[some].flatten(0, 1), -torch.inf)
                weights = logits.mul_(config.softmax_scale).softmax(-1)
                if hides is not None:  # a token may attend nothing
                    weights.masked_fill_(logits.isneginf().all(-1, keepdim=True), 0.0)
                if config.sink_logits:  # they take their share of what all keys had
                    sink = self._state["sinks"][heads, None, None]
                    weights /= 1 + (sink - logits.logsumexp(-1, keepdim=True)).exp()
                from_past, from_own = weights.unflatten(1, (-1, t)).split((p, t), dim=-1)
                of_past = (from_past.flatten(1, 2) @ values[:, :p]).unflatten(1, (-1, t))
                out[heads, some] = of_past + from_own @ own_values[:, some]
                del own, logits, weights, from_past, from_own  # before the next are made
        return out.movedim(0, 2)

    def attended(
        self,
        hidden: torch.Tensor,  # [n, d]
        positions: torch.Tensor,  # [n]
        cached: Callable[[torch.Tensor], Pair],  # of positions [n]: kv [n, c] and pe [n, r], float64
        selection: torch.Tensor | None = None,  # [n, topk], -1 behind the last; None: all that is seen
        held: Held | None = None,
    ) -> torch.Tensor:
        """Return the layer's output [n, d] for tokens of one request, which read the keys that they select.

        The softmax is over the selected keys alone, with the scale of dense attention, and over those at
        positions that are `held`, if not all are; without any, attention is 0.
        """
        config, rows = self.config, hidden.cpu().double()
        h, nope = config.num_attention_heads, config.qk_nope_head_dim
        w_uk, w_uv = self._state["kv_b_proj.weight"].unflatten(0, (h, -1)).split((nope, config.v_head_dim), 1)
        q = self.queries(rows, positions)
        latent_q = torch.einsum("nhd,hdc->nhc", q[..., :nope], w_uk)
        latent_out = torch.zeros_like(latent_q)
        sinks = self._state["sinks"][:, None] if config.sink_logits else latent_q.new_zeros(h, 0)
        for row, position in enumerate(positions.tolist()):
            chosen = torch.arange(position + 1) if selection is None else selection[row].cpu().long()
            kv, pe = cached(chosen := chosen[(chosen >= 0) if held is None else held(chosen)])
            logits = (latent_q[row] @ kv.T + q[row, :, nope:] @ pe.T) * config.softmax_scale
            weights = torch.cat((logits, sinks), dim=1).softmax(-1)[:, : len(chosen)]
            latent_out[row] = weights @ kv
        return self._output(torch.einsum("nhc,hvc->nhv", latent_out, w_uv), rows)

    def _output(self, heads: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return o_proj [.., d] of heads [.., h, v], which hidden [.., d] may gate: one gate each, or v."""
        if self.config.output_gate is not None:
            gates = self._project("g_proj", hidden).unflatten(-1, (self.config.num_attention_heads, -1))
            heads = heads / (1 + (-gates).exp())
        return self._project("o_proj", heads.flatten(-2))

    def _project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._state[f"{name}.weight"], self._state.get(f"{name}.bias"))

    def _normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return true_norm(x, self._state[f"{name}.weight"], self.config.rms_norm_eps)

    def _rotated(
        self, x: torch.Tensor, positions: torch.Tensor, interleaved: bool | None = None
    ) -> torch.Tensor:
        """Return x [t, h, r] rotated by the angles of positions [t], in the layer's layout by default."""
        config = self.config
        if config.rope_theta is None:
            return x
        angles = torch.outer(positions.float(), inverse_frequencies(config)).double()
        magnitude = config.rope_scaling.magnitude() if config.rope_scaling else 1.0
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1) * magnitude
        return true_rotation(x, cos_sin, config.rope_interleave if interleaved is None else interleaved)

    def _turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return x [t, H, D] with its first r channels rotated, in the indexer's layout."""
        r, interleaved = self.config.qk_rope_head_dim, self.config.indexer_rope_interleave
        return torch.cat((self._rotated(x[..., :r], positions, interleaved), x[..., r:]), dim=-1)


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
    logits = FLOAT64_BYTES * run.rows * (run.past + run.new)  # masked ones too
    at_once = min(logits, max(logits // run.choices, LOGITS_BYTES))
    uncached = run.uncached * (config.hidden_size + 2 * config.latent_dim)
    return FLOAT64_BYTES * (run.rows * per_row + run.past * per_key + uncached) + 3 * at_once
