"""Pick, per op, the backend's fused implementation or the reference, and say why.

An op is asked once per process whether its kernel really runs here, before it is chosen: one that is
compiled or loaded at its first use may fail there for reasons that no look at its package shows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from mla.cache.formats import codec_of, index_codec, stored_format, stored_index_format
from mla.config import MLAConfig
from mla.errors import UnknownOp, UnsupportedBatch, UnsupportedOps, unknown
from mla.reference import REFERENCE
from mla_backends import BackendError
from mla_backends.api import (
    OPS,
    AttentionSpec,
    BatchView,
    FusedOp,
    IndexerSpec,
    LinearSpec,
    NormSpec,
    current,
    format_refusals,
)
from mla_backends.errors import describe, one_line, out_of_memory, plugin_code

Say = Callable[[str], object]  # is told in one line what is about to take a while


def preflight_reasons(name: str, op: FusedOp, spec: Any, say: Say | None = None) -> list[str]:
    """Return why `op`, offered as `name`, does not run here although it supports `spec`.

    Asked once per op and spec in a process, but again where memory was short. Whatever `op.preflight` raises
    is a reason.
    """
    if type(op).preflight is FusedOp.preflight:
        return []
    answers: dict[Hashable, list[str]] = vars(op).setdefault("_preflight_answers", {})
    if spec in answers:
        return answers[spec]
    if say is not None and op.compiles:
        say(f"preparing {name}: {op.compiles}")
    try:
        with plugin_code():
            reasons = [one_line(reason) for reason in op.preflight(spec)]
    except Exception as error:  # noqa: BLE001  # compilers and loaders raise anything
        reasons = [f"its preflight raised {one_line(describe(error))}"]
    if not any(map(out_of_memory, reasons)):
        answers[spec] = reasons
    return reasons


def _check_overrides(
    overrides: Mapping[str, str], roles: Mapping[str, tuple[str, Any]], offered: Mapping[str, FusedOp]
) -> None:
    """Raise `UnknownOp` for a role that the layer lacks, or an op that its role cannot run."""
    for role, name in overrides.items():
        if role not in roles:
            raise UnknownOp(f"this layer has an {unknown('role', role, list(roles), 'Its roles')}")
        fitting = ["reference", *_of_kind(roles[role][0], offered)]
        if name not in fitting:
            raise UnknownOp(unknown(f"op of role {role}", name, fitting, "It takes"))


def _of_kind(kind: str, offered: Mapping[str, FusedOp]) -> dict[str, FusedOp]:
    """Return the ops of this kind, of whatever version, by name."""
    return {name: op for name, op in offered.items() if op.contract.partition("/")[0] == kind}


# ---------------------------------------------------------------------------------------------- ops
@dataclass(frozen=True)
class Choice:
    """The implementation of one op, and every reason why a better one was not chosen."""

    name: str  # "reference", or the name the backend gave the op
    op: FusedOp
    spec: Any
    reasons: tuple[str, ...] = ()
    override: str = ""  # what chose the op for this role alone, such as "latent_attention=mine"

    def key(self) -> tuple[str, str, Any]:
        """Identify what this choice computes: layers with equal keys share a plan."""
        return (self.op.contract, self.name, self.spec)

    def check_batch(
        self, query_lens: Sequence[int], kv_lens: Sequence[int], page_size: int | None = None
    ) -> None:
        """Raise `UnsupportedBatch` with every reason why these lengths or pages cannot be served."""
        answer = self.op.unsupported_batch(self.spec, query_lens, kv_lens, page_size)
        reasons = sentences(self.name, "unsupported_batch()", answer)
        if reasons:
            cure = f"Leave `{self.override}` out."
            raise UnsupportedBatch(
                f"fused op '{self.name}' ({self.op.contract}) refuses this batch: {'; '.join(reasons)}. "
                f"{cure if self.override else 'Use the reference ops for it (`--ops reference`).'}"
            )

    def prepare(self, batch: BatchView) -> Any:
        """Return what the op prepares for a batch. Raises `UnsupportedBatch` where it refuses it."""
        self.check_batch(batch.query_lens, batch.kv_lens, batch.page_size)
        return self.op.prepare(self.spec, batch)


_NO_LSE = "it writes no log-sum-exp, which sinks need for their share (sink_logits)"
# Kinds of ops whose operands have a rotary part.
_ROTARY = ("rotate_query", "write_latent", "latent_attention", "sparse_latent_attention")
# What `ops` accepts besides a list of names.
POLICIES = ("auto", "reference", "fused")


def choose(
    kind: str,
    spec: Any,
    offered: Mapping[str, FusedOp],
    policy: str,
    override: str = "",
    say: Say | None = None,
    reads_lse: bool = False,
) -> Choice:
    """Return the first offered op of `kind` that serves `spec`, else the reference.

    `policy`: "auto"; "reference" takes no fused op; "fused" requires one wherever the backend offers any;
    names, separated by commas, require those for their kinds. With an `override`, such as
    "latent_attention=mine", it is the one op of a role. Raises `UnsupportedOps` when one cannot serve.
    `say` is told what an op compiles before it does (`mla.layer.ops`). With `reads_lse`, the layer reads the
    log-sum-exp whatever the batch, and so takes no op that writes none.
    """
    if policy == "reference":
        return Choice("reference", REFERENCE[kind], spec)
    candidates = _of_kind(kind, offered)
    required = (policy,) if override else _names(policy)
    named = {name: op for name, op in candidates.items() if name in required}
    reasons: list[str] = []
    for name, op in (named or candidates).items():
        muted = reads_lse and not op.writes_lse
        why = [_NO_LSE] if muted else refusals(name, op, kind, spec, say)
        if not why:
            return Choice(name, op, spec, tuple(reasons), override)
        reasons += [f"fused op '{name}' not used because {reason}" for reason in why]
    if named or (candidates and policy == "fused"):
        raise UnsupportedOps(
            f"no fused {kind} serves this layer, but {override or f'--ops {policy}'} requires one: "
            f"{'; '.join(reasons)}."
        )
    return Choice("reference", REFERENCE[kind], spec, tuple(reasons))


def _names(policy: str) -> tuple[str, ...]:
    """Return the implementations a policy names; none for those of `POLICIES`."""
    return () if policy in POLICIES else tuple(name.strip() for name in policy.split(","))


def _check_names(offered: Mapping[str, FusedOp], policy: str) -> None:
    """Raise `UnknownOp` when a policy names an op that the backend does not offer."""
    for name in _names(policy):
        if name not in offered:
            known = [*(() if "," in policy else POLICIES), *offered]
            raise UnknownOp(unknown("op", name, known, "--ops takes one, or several names of ops"))


def refusals(name: str, op: FusedOp, kind: str, spec: Any, say: Say | None = None) -> list[str]:
    """Return why `op`, offered as `name`, does not serve `spec` here (empty if it does)."""
    if not current(op.contract, kind):
        return [f"it implements {op.contract} and this core calls {OPS[kind]}"]
    if kind in _ROTARY and not spec.qk_rope_head_dim:
        return [f"{kind} promises ops rotary channels, and this layer has none (qk_rope_head_dim 0)"]
    if reasons := format_refusals(op, spec):
        return reasons
    reasons = sentences(name, "unsupported_reasons()", op.unsupported_reasons(spec))
    return reasons or preflight_reasons(name, op, spec, say)


def sentences(name: str, asked: str, answer: Any, none: str = "if it can") -> list[str]:
    """Return what an op answered. Raises `BackendError` unless it is a list of sentences ([] `none`)."""
    if isinstance(answer, (list, tuple)) and all(
        isinstance(reason, str) and reason.strip() for reason in answer
    ):
        return list(answer)
    raise BackendError(
        f"the backend's op '{name}': {asked} returned {answer!r}, not a list of sentences ([] {none})."
    )


class Ops:
    """The implementations one layer uses, by role. A `linear` role is a weight of the layer.

    `overrides` (role -> name of an op, or "reference") come before `policy`. Raises `UnknownOp` for a name
    that the backend or the layer lacks, and `UnsupportedOps` for a required op that cannot serve.
    With `role`, that role alone is chosen, and no op of another is asked, prepared or required.
    `attended_by` ranks bring their heads' queries together to attend the latents, of `cache_format`; index
    keys are of `index_format`.
    """

    def __init__(
        self,
        config: MLAConfig,
        offered: Mapping[str, FusedOp],
        dtype: torch.dtype,
        device: torch.device,
        policy: str = "auto",
        overrides: Mapping[str, str] = MappingProxyType({}),
        say: Say | None = None,
        role: str | None = None,
        attended_by: int = 1,
        cache_format: str | None = None,
        index_format: str | None = None,
    ) -> None:
        _validate(offered)
        _check_names(offered, policy)
        roles = layer_roles(config, dtype, device, attended_by, cache_format, index_format)
        _check_overrides(overrides, roles, offered)
        self._choices: dict[str, Choice] = {}
        sinks = config.sink_logits
        for chosen in roles if role is None else (role,):
            name = overrides.get(chosen, "reference")
            override = "" if name == "reference" else f"{chosen}={name}"
            named = overrides.get(chosen, policy)
            self._choices[chosen] = choose(*roles[chosen], offered, named, override, say, sinks)

    def __getitem__(self, role: str) -> Choice:
        return self._choices[role]

    def __contains__(self, role: str) -> bool:
        return role in self._choices

    def replaced(self, replace: Callable[[str, FusedOp], Any]) -> Ops:
        """Return the same choices with `replace(role, op)` in place of every op."""
        ops = copy.copy(self)
        ops._choices = {
            role: dataclasses.replace(choice, op=replace(role, choice.op))
            for role, choice in self._choices.items()
        }
        return ops

    def names(self) -> dict[str, str]:
        """Return role -> implementation name, as results record it."""
        return {role: choice.name for role, choice in self._choices.items()}

    def explain(self) -> list[str]:
        """Return one line per role: what runs, what it says of that, and why a fused op does not."""
        lines, remarks = [], self.remarks()
        for role, choice in self._choices.items():
            below = [*remarks.pop(choice.name, ()), *choice.reasons]
            lines += [f"{role}: {choice.name}", *(f"  {line}" for line in below)]
        return lines

    def remarks(self) -> dict[str, list[str]]:
        """Return implementation name -> what it says of how it runs here, of those that say anything.

        Raises `BackendError` for what is no list of sentences.
        """
        remarks = {}
        for choice in self._choices.values():
            answer = getattr(choice.op, "remarks", ())  # a replacement may not be a `FusedOp`
            lines = sentences(choice.name, "remarks", answer, "for none")
            if lines:
                remarks[choice.name] = [*map(one_line, lines)]
        return remarks


def _validate(offered: Mapping[str, FusedOp]) -> None:
    """Raise `BackendError` for what is no op, or an op that would silently never run."""
    if not isinstance(offered, Mapping):
        raise BackendError(f"the backend's ops() returned a {type(offered).__name__}, not a mapping of ops.")
    for name, op in offered.items():
        if not isinstance(name, str) or not name.strip() or name == "reference":
            raise BackendError(f"a backend's op needs a name other than 'reference', and {op!r} is {name!r}.")
        if not isinstance(op, FusedOp):
            what = f"the class {op.__name__} itself" if isinstance(op, type) else f"a {type(op).__name__}"
            raise BackendError(f"the backend's op '{name}' is {what}, not an instance of a FusedOp.")
        contract = str(getattr(op, "contract", None))
        if contract.partition("/")[0] not in OPS:
            raise BackendError(
                f"the backend's op '{name}' has an {unknown('contract', contract, [*OPS.values()])}"
            )


def attention_spec(
    config: MLAConfig, dtype: torch.dtype, device: torch.device, cache_format: str | None = None
) -> AttentionSpec:
    """Return the spec that attention ops are chosen and prepared with. Raises `CacheFormatError`.

    Of ops that neither read nor write the latent cache, it has no format.
    """
    stored = stored_format(cache_format, dtype)
    codec = codec_of(stored, config.kv_lora_rank, config.qk_rope_head_dim)
    return AttentionSpec(
        num_heads=config.num_attention_heads,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        softmax_scale=config.softmax_scale,
        dtype=dtype,
        device=device,
        cache_format=stored,
        token_bytes=codec.token_bytes if codec else 0,
    )


def layer_roles(
    config: MLAConfig,
    dtype: torch.dtype,
    device: torch.device,
    attended_by: int = 1,
    cache_format: str | None = None,
    index_format: str | None = None,
) -> dict[str, tuple[str, Any]]:
    """Return role -> (op kind, spec). The first projections of queries and latents are one weight.

    The latents are attended by the heads of `attended_by` layers like this one. Raises `CacheFormatError`.
    """
    h, n, v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    c, q_width = config.kv_lora_rank, h * config.qk_head_dim
    first = config.q_lora_rank or q_width

    def weight(inputs: int, outputs: int, groups: int = 1) -> LinearSpec:
        return LinearSpec(inputs, outputs, groups, dtype, device)

    attention = attention_spec(config, dtype, device)
    cached = attention_spec(config, dtype, device, cache_format)
    attended = dataclasses.replace(cached, num_heads=attended_by * h)
    roles: dict[str, tuple[str, Any]] = {
        "qkv_a_proj": ("linear", weight(config.hidden_size, first + config.latent_dim)),
        "kv_b_proj": ("linear", weight(c, h * (n + v))),
        "w_uk": ("batched_linear", weight(n, c, h)),
        "w_uv": ("batched_linear", weight(c, v, h)),
        "o_proj": ("linear", weight(h * v, config.hidden_size)),
        "rotate_query": ("rotate_query", attention),
        "write_latent": ("write_latent", cached),
        "latent_attention": ("latent_attention", attended),
        "expanded_attention": ("expanded_attention", attention),
    }
    if config.q_lora_rank:
        roles["q_a_layernorm"] = ("rms_norm", NormSpec(config.q_lora_rank, dtype, device))
        roles["q_b_proj"] = ("linear", weight(config.q_lora_rank, q_width))
    if config.gate_width:
        roles["g_proj"] = ("linear", weight(config.hidden_size, config.gate_width))
    if config.index_topk:
        sparse = dataclasses.replace(attended, topk=config.index_topk)
        roles["sparse_latent_attention"] = ("sparse_latent_attention", sparse)
    return roles | _indexer_roles(config, attention, index_format)


def _indexer_roles(
    config: MLAConfig, attention: AttentionSpec, index_format: str | None
) -> dict[str, tuple[str, Any]]:
    """Return role -> (op kind, spec) of a layer's own indexer; none without. Raises `CacheFormatError`.

    Queries come from the query latent, keys and the weights of heads from hidden states. These weights are a
    product in float32, as in `transformers`, which keeps `weights_proj` of GLM-5 in float32.
    """
    heads, width, latent = config.index_n_heads, config.index_head_dim, config.q_lora_rank
    if not heads or latent is None:
        return {}
    dtype, device, stored = attention.dtype, attention.device, stored_index_format(index_format)
    codec = index_codec(stored, width)
    indexer = IndexerSpec(
        num_heads=heads,
        head_dim=width,
        rope_head_dim=config.qk_rope_head_dim,
        topk=config.index_topk,
        dtype=dtype,
        device=device,
        index_format=stored,
        token_bytes=codec.token_bytes if codec else 0,
    )
    return {
        "index_q_proj": ("linear", LinearSpec(latent, heads * width, 1, dtype, device)),
        "index_k_proj": ("linear", LinearSpec(config.hidden_size, width, 1, dtype, device)),
        "index_weights_proj": ("linear", LinearSpec(config.hidden_size, heads, 1, torch.float32, device)),
        "rotate_index_query": ("rotate_query", dataclasses.replace(attention, num_heads=heads)),
        "write_index_key": ("write_index_key", indexer),
        "select_latents": ("select_latents", indexer),
    }
