"""Every served family against its own class in `transformers`: one tiny config.json, one state dict, fp32.

Both sides read the same config.json and the same cached latents. `mla.bench.subjects.transformers_layer` is
judged here too: what it builds from our config must compute the same as what `transformers` builds from
config.json.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache
from transformers_peer import needs_transformers

from mla import MLAConfig
from mla.bench.subjects.transformers_layer import NoEquivalentClass, TransformersModel, transformers_model
from mla.config import QueryScaling, YarnScaling
from mla.config.families import FAMILIES
from mla.config.presets import PRESETS
from mla.weights import random_state_dict, weight_shapes

pytestmark = needs_transformers

# Between two right implementations; 1.3e-6 is the worst seen among them.
BOUND, LATENT_BOUND = 1e-5, 1e-6
# Beyond it, queries see what an indexer selects: with so many heads, zeros hardly tie.
INDEXER = {"index_topk": 10, "index_n_heads": 16, "index_head_dim": 12}
# Every deviation below costs at least this.
VISIBLE = 1e-3

TINY_VALUES: dict[str, Any] = {
    "hidden_size": 60,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 4096,
}
YARN = {"factor": 40, "original_max_position_embeddings": 16, "mscale": 0.707, "mscale_all_dim": 0.707}
LISTS = {"short_factor": [1.0, 1.5, 4.0, 9.0], "long_factor": [1.0, 1.5, 4.0, 9.0]}


@dataclass(frozen=True)
class Case:
    """A family's tiny config.json, changes that it must show, and its class where it is another's."""

    keys: dict[str, Any]
    wrong: tuple[Callable[[MLAConfig], MLAConfig], ...]
    selects: tuple[Callable[[MLAConfig], MLAConfig], ...] = ()  # other keys, and attends them rightly
    reorders: bool = True  # it caches interleaved rotary channels as evens, then odds
    of: tuple[str, str] = ("", "")  # the module and the first part of the name of its class
    attention: str = "Attention"


def without(**fields: Any) -> Callable[[MLAConfig], MLAConfig]:
    return lambda config: replace(config, **fields)


WRONG, PLAIN = (without(rope_interleave=False), without(rope_theta=77.0)), without(rope_scaling=None)
SCALED, TURNED = {"type": "yarn", **YARN}, (without(rope_theta=1e4),)
WIDE = {"qk_nope_head_dim": 24, "v_head_dim": 32}
ONCE = {**SCALED, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
KIMI = {"rms_norm_eps": 1e-5, "mla_use_nope": True}
CASES = {
    "deepseek_v2": Case({"rope_scaling": SCALED}, (*WRONG, PLAIN), reorders=False),
    "deepseek_v3": Case(
        {"rope_theta": 5e4, "rope_scaling": {**SCALED, "beta_fast": 1.0}, "attention_bias": True},
        (*WRONG, PLAIN),
    ),
    "deepseek_v32": Case(
        {"rope_scaling": SCALED, **INDEXER}, WRONG, selects=(without(indexer_rope_interleave=True),)
    ),
    "glm_moe_dsa": Case(
        {**WIDE, "rms_norm_eps": 1e-5, "num_hidden_layers": 2, **INDEXER},
        WRONG,
        selects=(without(indexer_rope_interleave=False),),
    ),
    "glm4_moe_lite": Case({**WIDE, "rope_theta": 1e6, "partial_rotary_factor": 1.0}, WRONG),
    "youtu": Case({"rope_parameters": {"rope_type": "default", "rope_theta": 1.6e6}}, WRONG),
    "axk1": Case(
        {"rope_scaling": {**SCALED, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0}},
        (*WRONG, without(rope_scaling=YarnScaling(4.0, 16, mscale=1.0, mscale_all_dim=1.0))),
    ),
    "sarvam_mla": Case(
        {"q_lora_rank": None, "rope_scaling": {"type": "deepseek_yarn", **YARN}, "head_dim": 40},
        (*WRONG, PLAIN),
        of=("deepseek_v3", "DeepseekV3"),
    ),
    "minicpm3": Case(
        {
            "v_head_dim": None,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"type": "longrope", **LISTS, "original_max_position_embeddings": 4096},
        },
        (without(rope_interleave=True), PLAIN),
        reorders=False,
    ),
    "longcat_flash": Case(
        {"rms_norm_eps": 1e-5, "head_dim": 8},
        (*WRONG, without(q_latent_scale=1.0), without(kv_latent_scale=1.0)),
        attention="MLA",
    ),
    "mistral4": Case(
        {"rope_parameters": ONCE, "partial_rotary_factor": 8 / 24},
        (*WRONG, without(query_scaling=None), without(query_scaling=QueryScaling(0.1, 32))),
    ),
    "kimi_linear": Case({**KIMI, "q_lora_rank": None}, TURNED, reorders=False),
    "kimi_k3": Case(
        {**KIMI, "mla_use_output_gate": True}, TURNED, reorders=False, of=("kimi_linear", "KimiLinear")
    ),
    "bailing_hybrid": Case(
        {"rope_theta": 6e6, "head_dim": 16, "partial_rotary_factor": 0.5, "use_qk_norm": True},
        WRONG,
        of=("bailing_hybrid", "BailingHybrid"),
    ),
}
# Of these `transformers` has a class; Kimi K3's is made here of the one without its gate.
HAVE_CLASS = [kind for kind in FAMILIES if kind != "kimi_k3"]
# Whose classes the runner does not time.
UNTIMED = [kind for kind, family in FAMILIES.items() if family.indexes]


def with_gate(attention: Any) -> type:
    """Return an attention class with Kimi K3's gate, as its own `modeling_kimi_linear.py` applies it."""

    class Gated(attention):  # type: ignore[misc]
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            width = config.num_attention_heads * config.v_head_dim
            self.g_proj = torch.nn.Linear(config.hidden_size, width, bias=False)
            self.o_proj.register_forward_pre_hook(lambda module, inputs: inputs[0] * self.gate)

        def forward(self, hidden_states: torch.Tensor, **rest: Any) -> Any:
            self.gate = self.g_proj(hidden_states).sigmoid()
            return super().forward(hidden_states, **rest)

    return Gated


def config_json(kind: str, **change: Any) -> dict[str, Any]:
    return {**TINY_VALUES, "model_type": kind, **CASES[kind].keys, **change}


def own_class(kind: str, **change: Any) -> TransformersModel:
    """Return what `transformers` itself builds from the family's config.json."""
    case = CASES[kind]
    values = config_json(kind, **change)
    model_type = values.pop("model_type")
    twin = AutoConfig.for_model("kimi_linear" if kind == "kimi_k3" else model_type, **values)
    twin._attn_implementation = "eager"
    module, prefix = (
        case.of if case.of[0] else (kind, FAMILIES[kind].architecture.removesuffix("ForCausalLM"))
    )
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    attention = getattr(modeling, prefix + case.attention)
    return TransformersModel(
        attention_class=with_gate(attention) if kind == "kimi_k3" else attention,
        rotary_class=getattr(modeling, f"{prefix}RotaryEmbedding", None),
        config=twin,
        eps=1e-5 if kind == "kimi_k3" else 1e-6,  # what the classes have anyway, see the test of eps
        reorders=case.reorders,
        takes_position_ids=kind == "mistral4",
    )


class Twin:
    """One attention layer of `transformers`, run request by request."""

    def __init__(self, model: TransformersModel, state: dict[str, torch.Tensor]) -> None:
        self.model = model
        self.attention, self.rotary = model.attention(), model.rotary()
        self.attention.load_state_dict(state)

    @torch.no_grad()
    def run(
        self, hidden: torch.Tensor, kv: torch.Tensor, pe: torch.Tensor, index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return the output [t, d], and what is cached afterwards, in checkpoint order.

        That is kv [s, c] and pe [s, r], and `index` [s, D] where there is an indexer.
        """
        cache, (new, past) = DynamicCache(), (len(hidden), len(kv))
        if index is not None:
            cache = DynamicCache(config=self.model.config)
        if past:
            cache.update(kv[None, None], self.model.to_cache(pe)[None, None], 0)
        if past and index is not None:
            cache.update_indexer(self.index(index, to_cache=True)[None], 0)
        positions = torch.arange(past, past + new)[None]
        future = torch.arange(past + new) > positions[0, :, None]
        mask = torch.zeros(new, past + new).masked_fill(future, torch.finfo(torch.float32).min)
        embedding = None if self.rotary is None else self.rotary(hidden[None], positions)
        more = self.model.arguments(embedding, positions)
        out = self.attention(hidden[None], attention_mask=mask[None, None], cache=cache, **more)[0][0]
        kv, pe = cache.layers[0].keys[0, 0], cache.layers[0].values[0, 0]
        if self.model.reorders:
            pe = torch.stack(pe.chunk(2, dim=-1), dim=-1).flatten(-2)
        if index is None:
            return out, kv, pe
        return out, kv, pe, self.index(cache.layers[0].indexer_keys[0], to_cache=False)

    def index(self, keys: torch.Tensor, to_cache: bool) -> torch.Tensor:
        """Return index keys [s, D] in the cache's order of channels, or from that in the checkpoint's."""
        if "glm" not in self.model.config.model_type:
            return keys
        turned, rest = keys.split((r := TINY_VALUES["qk_rope_head_dim"], keys.shape[1] - r), dim=1)
        if to_cache:
            return torch.cat((turned[:, 0::2], turned[:, 1::2], rest), dim=1)
        return torch.cat((torch.stack(turned.chunk(2, dim=1), dim=-1).flatten(1), rest), dim=1)


def errors(case: Any, twin: Twin) -> tuple[float, float]:
    """Return the worst relative error of a request's output, and of its cached latents."""
    outs = case.run().split(list(case.batch.query_lens))
    inputs = case.hidden.split(list(case.batch.query_lens))
    worst = [0.0, 0.0]
    requests = zip(case.ids, outs, inputs, case.history, case.index, strict=True)
    for sequence, out, hidden, past, keys in requests:
        expected = twin.run(hidden, *past, keys)
        cached = [*case.cache.read(sequence), *filter(torch.is_tensor, [case.cache.read_index(sequence)])]
        for index, ours in enumerate((out, *cached)):
            error = ((ours - expected[index]).norm() / expected[index].norm()).item()
            worst[min(index, 1)] = max(worst[min(index, 1)], error)
    return worst[0], worst[1]


def assert_agrees(case: Any, twin: Twin) -> None:
    output, latents = errors(case, twin)
    assert output <= BOUND
    assert latents <= LATENT_BOUND


# Prefill from empty, decode, and prefill with history; positions on both sides of 16 and 32.
STEP = ([20, 1, 6], [0, 90, 33])


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_agrees_with_its_class(make_case: Any, kind: str, attention: str) -> None:
    config = MLAConfig.from_dict(config_json(kind))
    case = make_case(*STEP, config, attention=attention)
    assert_agrees(case, Twin(own_class(kind), case.state))


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize(("history", "bound"), [(4095, 1e-5), (20000, 2e-5)])
def test_positions_past_the_original_context_agree(
    make_case: Any, history: int, bound: float, attention: str
) -> None:
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale_all_dim": 1.0}
    change = {"rope_scaling": yarn, "max_position_embeddings": 163840}
    config = MLAConfig.from_dict(config_json("deepseek_v3", **change))
    case = make_case([3], [history], config, attention=attention, page_size=64)
    assert errors(case, Twin(own_class("deepseek_v3", **change), case.state))[0] <= bound


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_knob_of_a_family_shows(make_case: Any, kind: str) -> None:
    """The comparison above could fail: each deviation, one at a time, is far outside its bound."""
    config = MLAConfig.from_dict(config_json(kind))
    twin = Twin(own_class(kind), random_state_dict(config, 0, torch.float32))
    assert CASES[kind].wrong
    for deviate in (*CASES[kind].wrong, *CASES[kind].selects):
        case = make_case(*STEP, config, layer_config=deviate(config))
        assert errors(case, twin)[0] > VISIBLE


@pytest.mark.parametrize("kind", HAVE_CLASS)
def test_the_latent_norms_of_every_class_have_eps_1e_6(make_case: Any, kind: str) -> None:
    """With inputs so small that eps decides. The model's own norms may well say 1e-5."""
    plain = {"attention_bias": False}  # biases would drown small inputs
    config = MLAConfig.from_dict(config_json(kind, **plain))
    model = own_class(kind, **plain)
    module = model.attention_class(model.config, 0)
    assert module.kv_a_layernorm.variance_epsilon == 1e-6
    small = {"hidden_scale": 1e-3}
    case = make_case(*STEP, config, **small)
    twin = Twin(model, case.state)
    assert errors(case, twin)[0] <= BOUND
    wrong = make_case(*STEP, config, layer_config=replace(config, rms_norm_eps=1e-5), **small)
    assert errors(wrong, twin)[0] > VISIBLE


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_oracle_knows_every_family(make_case: Any, assert_rows_close: Any, kind: str) -> None:
    """In fp32, and in bf16 within what rounding costs; a deviating layer is far from it."""
    config = MLAConfig.from_dict(config_json(kind))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        case = make_case(*STEP, config, dtype=dtype)
        assert_rows_close(case.run(), case.truth(), bound)
    for deviate in CASES[kind].wrong:
        case = make_case(*STEP, config, layer_config=deviate(config))
        with pytest.raises(AssertionError, match="worst row error"):
            assert_rows_close(case.run(), case.truth(), VISIBLE)


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
def test_sinks_are_those_of_hy_v4(make_case: Any, attention: str) -> None:
    """Whose attention function joins a logit per head, unscaled; its layers have an indexer as well."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.hy_v4 import modeling_hy_v4

    ALL_ATTENTION_FUNCTIONS.register("hy_v4_eager", modeling_hy_v4.eager_attention_forward)
    config = replace(MLAConfig.from_dict(config_json("youtu")), sink_logits=True)
    case, model = make_case(*STEP, config, attention=attention), own_class("youtu")
    model.config._attn_implementation = "hy_v4_eager"
    twin = Twin(model, {name: weight for name, weight in case.state.items() if name != "sinks"})
    twin.attention.sinks = case.state["sinks"]
    assert_agrees(case, twin)
    twin.attention.sinks = case.state["sinks"] - 1
    assert errors(make_case(*STEP, config, attention=attention), twin)[0] > VISIBLE


@pytest.mark.parametrize("history", [15, 16])
def test_queries_are_scaled_from_the_first_position_that_says_so(make_case: Any, history: int) -> None:
    """Position 15 is the last of the first 16; a batch that stays below is not touched at all."""
    config = MLAConfig.from_dict(config_json("mistral4"))
    plain = make_case([1], [history], config, layer_config=replace(config, query_scaling=None))
    case = make_case([1], [history], config)
    assert torch.equal(case.run(), plain.run()) == (history == 15)
    assert errors(case, Twin(own_class("mistral4"), case.state))[0] <= BOUND


def test_layers_with_different_query_scales_share_a_batch(make_case: Any, assert_rows_close: Any) -> None:
    config = MLAConfig.from_dict(config_json("mistral4"))
    case = make_case(*STEP, config)
    case.run()
    other = replace(config, query_scaling=QueryScaling(0.7, 8))
    twin = make_case(*STEP, other)
    twin.batch, twin.cache = case.batch, case.cache
    assert_rows_close(twin.run(), twin.truth(), BOUND)


@pytest.mark.parametrize("kind", [kind for kind in HAVE_CLASS if kind not in UNTIMED])
def test_a_peer_built_from_our_config_is_the_family_s_own(make_case: Any, kind: str) -> None:
    config = MLAConfig.from_dict(config_json(kind))
    peer = transformers_model(config, "eager")
    assert peer.attention_class is own_class(kind).attention_class
    case = make_case(*STEP, config)
    assert_agrees(case, Twin(peer, case.state))


@pytest.mark.parametrize(
    "kind", [*("deepseek_v3", "minicpm3", "longcat_flash"), *("mistral4", "kimi_linear", "bailing_hybrid")]
)
def test_a_peer_is_found_for_numbers_without_a_name(make_case: Any, kind: str) -> None:
    config = replace(MLAConfig.from_dict(config_json(kind)), model_type=None, rms_norm_eps=1e-4)
    case = make_case(*STEP, config, hidden_scale=1e-2)
    assert errors(case, Twin(transformers_model(config, "eager"), case.state))[0] <= BOUND


def test_numbers_that_no_class_computes_have_no_peer(tiny: Any) -> None:
    for config in (
        tiny(q_lora_rank=24, q_latent_scale=3.0),
        tiny(kv_latent_scale=2.0),
        tiny(rope_theta=None, query_scaling=QueryScaling(0.1, 16)),
        tiny(rope_scaling=YarnScaling(40, 64), query_scaling=QueryScaling(0.1, 16)),
        tiny(model_type="deepseek_v2", rope_interleave=False),
        tiny(model_type="deepseek_v3", output_gate="head"),
        tiny(output_gate="element"),
        tiny(output_gate="head", rope_interleave=False),
        tiny(qk_rope_head_dim=0),
        tiny(sink_logits=True),
        tiny(q_lora_rank=24, index_topk=8, index_n_heads=2),
    ):
        with pytest.raises(NoEquivalentClass, match="no attention that computes config 'tiny'"):
            transformers_model(config)


TIMED = [name for name, preset in PRESETS.items() if preset.values["model_type"] not in UNTIMED]


@pytest.mark.parametrize("name", [name for name in TIMED if name != "kimi-k3"])
def test_a_preset_s_peer_has_its_weights_and_its_scale(name: str) -> None:
    config = MLAConfig.preset(name)
    peer = transformers_model(config)
    with torch.device("meta"):
        module = peer.attention()
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == weight_shapes(config)
    assert module.scaling == pytest.approx(config.softmax_scale, rel=1e-12)
    assert peer.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["kimi_k3", "bailing_hybrid"])
def test_a_gate_is_rounded_as_in_the_model_s_own_code(make_case: Any, kind: str) -> None:
    """Bit for bit in bfloat16, where sigmoid and product are rounded, with attention's own output."""
    config = MLAConfig.from_dict(config_json(kind))
    case = make_case(*STEP, config, dtype=torch.bfloat16)
    seen: dict[str, torch.Tensor] = {}
    gate = case.layer.step.gate

    def watched(heads: torch.Tensor, gates: torch.Tensor) -> None:
        seen.update(heads=heads.clone(), gates=gates.clone())
        gate(heads, gates)
        seen["gated"] = heads.clone()

    case.layer.step = replace(case.layer.step, gate=watched)
    case.run()
    gates = case.hidden @ case.state["g_proj.weight"].T
    assert torch.equal(seen["gates"], gates)
    if kind == "kimi_k3":
        expected = seen["heads"].flatten(1) * gates.sigmoid()
    else:
        expected = seen["heads"] * torch.sigmoid(gates.float()).to(torch.bfloat16).unsqueeze(-1)
    assert torch.equal(seen["gated"].flatten(1), expected.flatten(1))
