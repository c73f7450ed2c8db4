"""Whether a selection is right: causal, distinct, complete, and of keys whose true scores are high enough.

Which indices are selected is never compared: scores tie, and those closer than rounding may fall any way. An
op computes each score within a bound of its own, and takes the k largest of what it computes. So no key that
is left out is certain to score higher than one that is taken: its true score less its bound is at most the
other's true score and bound. The sum of what is taken is then within the bounds of the best possible.
"""

from __future__ import annotations

import math

import torch

from mla.verify.op_oracle import Spans, alike
from mla.verify.places import Places, describe

# Of a score in fp32, relative to the sizes of what is multiplied and added up, in any order.
NOISE = 2.0**-20
BF16_BITS = 8  # of the significand
PRODUCTS = 1 << 21  # of queries and keys, of as many heads at once

Tensors = dict[str, torch.Tensor]


def true_selection(
    q: torch.Tensor,  # [T, H, D]
    weights: torch.Tensor,  # [T, H]
    keys: torch.Tensor,  # [K, D]
    spans: Spans,
    topk: int,
    longest: int,
) -> Tensors:
    """Return what judges selections, in float64.

    `reach` [T, longest]: of every key that a query sees, the most that its score may be computed as; -inf
    behind. `rival` and `floor` [T, k + 1]: the keys whose scores are computed highest at least, one of which
    is left out, or -1; and these least scores, or -inf.
    """
    reach = torch.full((len(q), longest), -torch.inf, dtype=torch.float64)
    rival, floor = (torch.full((len(q), topk + 1), none, dtype=torch.float64) for none in (-1.0, -torch.inf))
    for rows, of, hidden in alike(spans):
        scores, bounds = true_scores(q[rows], weights[rows], keys[of])
        scores.masked_fill_(hidden, -torch.inf)
        count = of.shape[1]
        reach[rows, :count] = scores + bounds
        surest = (scores - bounds).topk(min(topk + 1, count))
        seen_too, width = surest.values > -torch.inf, surest.values.shape[-1]
        rival[rows, :width] = torch.where(seen_too, surest.indices.double(), -1.0)
        floor[rows, :width] = surest.values
    return {"reach": reach, "rival": rival, "floor": floor}


def true_scores(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores [.., t, s] of keys [.., s, D] for queries [.., t, H, D] of weights [.., t, H].

    With them, by how much fp32 may err in each; both in float64. A score is sum over h of weights[t, h] *
    max(0, q[t, h] . keys[s]). It may err by NOISE times the sum of |weights[t, h]| |q[t, h]| |keys[s]|, and
    by what a device that takes denormals for 0 leaves out.
    """
    wide, keys, scales = q.double(), keys.double(), weights.double()
    scores = wide.new_zeros(*q.shape[:-2], keys.shape[-2])
    heads = max(1, PRODUCTS // max(1, scores.numel()))
    for some, of in zip(wide.split(heads, -2), scales.split(heads, -1), strict=True):
        products = (some.flatten(-3, -2) @ keys.mT).clamp_min_(0).unflatten(-2, some.shape[-3:-1])
        scores += (of[..., None, :] @ products).squeeze(-2)
    norms, sizes, tiny = wide.norm(dim=-1), scales.abs(), torch.finfo(q.dtype).tiny
    flushed = tiny * math.sqrt(q.shape[-1])  # what denormals that are taken for 0 may add up to
    per_key = NOISE * (sizes * norms).sum(-1) + flushed * sizes.sum(-1)
    per_key += torch.finfo(torch.float32).tiny * norms.sum(-1)
    alone = flushed * (sizes * norms).sum(-1)
    return scores, per_key[..., None] * keys.norm(dim=-1)[..., None, :] + alone[..., None] + 1e-36


def judge_selection(
    result: torch.Tensor, truth: Tensors, places: Places | None = None, in_bf16: bool = False
) -> tuple[float, str]:
    """Return the worst error over its bound of a selection [T, k] int32, and the reason if that is above 1.

    `truth` is that of `true_selection`. `in_bf16`: scores may be rounded to bfloat16, so that keys within one
    unit in its last place are as good. Whatever is not a matter of scores is infinite.
    """
    reach = truth["reach"]
    if result.dtype != torch.int32 or result.dim() != 2 or len(result) != len(reach):
        return math.inf, f"{result.dtype} {list(result.shape)} instead of torch.int32 [{len(reach)}, k]"
    if not result.numel():
        return 0.0, ""
    chosen, seen = result.long(), (reach > -torch.inf).sum(1, keepdim=True)
    named = torch.arange(result.shape[1]) < seen  # which entries name a key
    inside, ordered = (chosen >= 0) & (chosen < seen), chosen.masked_fill(~named, -1).sort(dim=1).values
    for bad, what in (
        ((~named & (chosen != -1)).any(1), "name a token, or something other than -1, behind the last"),
        ((named & (chosen == -1)).any(1), "are not complete"),
        ((named & ~inside).any(1), "name a token that the query does not see"),
        (((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1), "name a token twice"),
    ):
        if bool(bad.any()):
            return math.inf, f"{int(bad.sum())} of {len(bad)} selections {what}: {describe(bad, places)}"
    return _by_scores(chosen, named, truth, places, in_bf16)


def _by_scores(
    chosen: torch.Tensor, named: torch.Tensor, truth: Tensors, places: Places | None, in_bf16: bool
) -> tuple[float, str]:
    """Judge a selection [T, k] int64 that is complete and distinct: entries that are `named` are seen.

    Of each query, the key left out that is surest to score high, at least `highest`, meets the key taken that
    can score least, at most `lowest`. The ratio is 1 + (highest - lowest) / bound, with the bound of the
    former.
    """
    reach, rival = truth["reach"], truth["rival"].long()
    taken = torch.zeros((len(reach), reach.shape[1] + 1), dtype=torch.bool)
    taken.scatter_(1, torch.where(named, chosen, reach.shape[1]), torch.ones_like(named))
    left_out = (rival >= 0) & ~taken.gather(1, rival.clamp_min(0))
    highest, which = truth["floor"].masked_fill(~left_out, -torch.inf).max(1)  # that is left out
    missed = rival.gather(1, which[:, None]).clamp_min(0)
    lowest = reach.gather(1, chosen.clamp_min(0)).masked_fill(~named, torch.inf).amin(1)  # that is taken
    bound = reach.gather(1, missed)[:, 0] - highest
    if in_bf16:
        unit = (_bf16_unit(highest) + _bf16_unit(lowest)) / 2
        bound, highest = bound + unit, highest - unit
    ratios = torch.where(highest > -torch.inf, 1 + (highest - lowest) / bound, 0.0).clamp_min(0)
    index = int(ratios.argmax())
    worst = ratios[index].item()
    if worst <= 1:
        return worst, ""
    bad = ratios > 1
    return worst, (
        f"{int(bad.sum())} of {len(bad)} selections leave out a token that scores higher: "
        f"{describe(bad, places, index)} leaves out position {int(missed[index])}, which scores at least "
        f"{highest[index].item():.5g}, and takes one of at most {lowest[index].item():.5g}"
    )


def _bf16_unit(scores: torch.Tensor) -> torch.Tensor:
    """Return the distance of neighbours in bfloat16 at these scores; 0 at 0 and infinity.

    A score in [2^(e - 1), 2^e) has neighbours 2^(e - 8) away.
    """
    finite = torch.where(scores.isfinite(), scores, 0.0)
    unit = torch.ldexp(torch.ones_like(finite), torch.frexp(finite).exponent - BF16_BITS)
    return torch.where(finite == 0, 0.0, unit)
