"""Attention over shares of a context, as on several ranks: what is merged by the log-sum-exp is the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mla.conformance.checks.attention.common import decode, latent, latent_check, require_lse
from mla.conformance.problems.attention import AttentionProblem, data
from mla.conformance.problems.attention_call import AttentionCall, fitted, judge_out, serve
from mla.conformance.trial import Trial
from mla.parallel.exchange import merge
from mla.parallel.share import Share

KIND = "numbers"
CATCHES = "a log-sum-exp that does not weigh parts of a context: in another base, or wrong without keys"


@latent_check("shares", CATCHES, KIND)
def shares(trial: Trial) -> None:
    """Every 2nd, or 3rd, token attended apart and merged gives what all do; some shares have no keys."""
    require_lse(trial)
    for world in (2, 3):
        check_shares(trial, decode(70, 2, 1, 129), world)
        check_shares(trial, latent((3, 1, 5), (5, 66, 5)), world)


def check_shares(trial: Trial, asked: AttentionProblem, world: int) -> None:
    """Compare the merged outputs of `world` shares with the truth of the whole."""
    problem = fitted(trial, asked)
    with trial.case(f"{problem.label} in {world} shares"):
        parts, sums = zip(
            *(_attend(trial, problem, Share(rank, world)) for rank in range(world)), strict=True
        )
        out = torch.empty_like(parts[0])
        merge(torch.stack(parts), torch.stack(sums), out)
        judge_out(trial, problem, out)


def _attend(trial: Trial, problem: AttentionProblem, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [T, h, c] and lse [T, h] of one share, where each new token is a request of its own."""
    host, keys = data(problem, trial.dtype), []
    for latents, new, length in zip(host.keys, problem.query_lens, problem.kv_lens, strict=True):
        own = latents[share.rank :: share.world].flatten(1)
        seen = share.count(torch.arange(length - new, length) + 1)
        keys += [own[:count] for count in seen.tolist()]
    lengths = tuple(map(len, keys))
    op, call = serve(trial, replace(problem, query_lens=(1,) * len(lengths), kv_lens=lengths))
    call.inputs["q"].copy_(host.q)
    _put(call, keys)
    return call.run(op)


def _put(call: AttentionCall, keys: Sequence[torch.Tensor]) -> None:
    """Write latents [n, c + r] of each request where the call has those of its own."""
    cache, table = call.inputs["cache"], call.inputs["block_table"]
    for row, latents in enumerate(keys):
        index = torch.arange(len(latents), device=cache.device)
        pages = table[row].long()[index // cache.shape[1]]
        cache[pages, index % cache.shape[1]] = latents.to(cache.device)
