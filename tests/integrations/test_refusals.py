"""What cannot be served is said in one sentence, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import CACHE, PLAIN, make_model
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

from mla.integrations.transformers import PagedCache, UnsupportedModel, restore, use_mla
from mla.integrations.transformers.model import PackedLinear
from mla.layer.forward import AttentionCore
from mla_backends import BackendError


def without_mla() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))


class Linear8bit(nn.Linear):
    """As libraries of quantized weights make theirs."""


def changed(change: Callable[[Any, Any, Any], object], family: str = "deepseek_v3") -> Callable[[], Any]:
    """Return a maker of a model that `change` is given, with the attention of its last two layers."""

    def make() -> Any:
        model = make_model(family)
        change(model, *(layer.self_attn for layer in model.model.layers[-2:]))
        return model

    return make


def in_fp8(model: Any, first: Any, second: Any) -> None:
    """As a checkpoint with `weight_scale_inv` is loaded on a GPU; on a CPU it comes in bfloat16."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    second.o_proj = FP8Linear(64, 64, block_size=(128, 128))


def with_attention_weights(model: Any, first: Any, second: Any) -> None:
    model.set_attn_implementation("eager")
    model.config.output_attentions = True


def tied_to_another_part(model: Any, first: Any, second: Any) -> None:
    model.spare = nn.Linear(64, 64, bias=False)
    model.spare.weight = first.o_proj.weight


MAP = {"model.layers.0": "cpu", "model.layers.1": "disk"}  # as `device_map` leaves a model, but for the hooks
CHANGED: list[tuple[Callable[[Any, Any, Any], object], str]] = [
    (
        lambda m, a, b: setattr(b.kv_b_proj, "__class__", Linear8bit),
        r"kv_b_proj of .*\.Linear8bit: load it unq",
    ),
    (lambda m, a, b: setattr(m, "hf_device_map", MAP), r"split over devices or offloaded \(cpu, disk\)"),
    (in_fp8, r"o_proj of this model is transformers\..*\.FP8Linear: load it unquantized"),
    (with_attention_weights, "computes no attention weights"),
    (lambda m, a, b: setattr(m, "draft", make_model("deepseek_v2")), "holds several language models"),
    (lambda m, a, b: b.to("meta"), "split over devices"),
    (
        lambda m, a, b: setattr(b.kv_b_proj, "bias", nn.Parameter(torch.ones(128))),
        "is an nn.Linear with a bias",
    ),
    (lambda m, a, b: setattr(b.o_proj, "weight", a.o_proj.weight), "o_proj of layer 0 shares its weight"),
    (tied_to_another_part, "o_proj of layer 0 shares its weight"),
    (lambda m, a, b: setattr(b, "kv_b_proj", a.kv_b_proj), "kv_b_proj of layer 0 shares its weight"),
    (
        lambda m, a, b: setattr(b, "scaling", 2 * b.scaling),
        "as the scale of logits, and its config announces",
    ),
    (lambda m, a, b: b.to(torch.bfloat16), "differ in dtype"),
    (lambda m, a, b: b.o_proj.to(torch.bfloat16), r"differ in dtype \(torch.bfloat16, torch.float32\)"),
    (lambda m, a, b: use_mla(m), "runs our ops already"),
]


def with_another_indexer() -> Any:
    from transformers import AXK2Config, AXK2ForCausalLM

    return AXK2ForCausalLM(AXK2Config(**PLAIN))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((changed(change), message) for change, message in CHANGED),
        (without_mla, "LlamaForCausalLM has no multi-head latent attention"),
        (lambda: nn.Linear(2, 2), "Linear is not a model of `transformers`"),
        (
            changed(lambda m, a, b: setattr(a, "indexer", None), "glm_moe_dsa"),
            "has 0 index heads, .* announces 16",
        ),
        (
            lambda: make_model("deepseek_v32", index_topk_freq=2, index_skip_topk_offset=1),
            "layer 1, .* has 16 index heads, and its config announces 0",
        ),
        (with_another_indexer, "AXK2ForCausalLM cannot be served: .* its output gate reads the query latent"),
        (lambda: make_model("kimi_linear", mla_use_output_gate=True), "Attention, has 0 output gates"),
        (
            lambda: make_model("bailing_hybrid", gated_attention_proj_granularity_type="element_wise"),
            "has 4 output gates per token, and its config announces 64",
        ),
    ],
)
def test_models_that_cannot_be_served(make: Callable[[], Any], message: str) -> None:
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UnsupportedModel, match=message) as refused:
        use_mla(model)
    assert "\n" not in str(refused.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_a_backend_that_is_not_there_changes_nothing(model: Any) -> None:
    before = [type(module) for module in model.modules()]
    with pytest.raises(BackendError):
        use_mla(model, backend="none.such:backend")
    assert [type(module) for module in model.modules()] == before


def assert_same(model: Any, weights: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(weights)
    assert all(
        weight.dtype == weights[name].dtype and torch.equal(weight, weights[name])
        for name, weight in state.items()
    )


@pytest.mark.parametrize(("kind", "calls"), [(AttentionCore, 2), (PackedLinear, 1), (PackedLinear, 7)])
def test_an_op_that_fails_halfway_leaves_the_model_as_it_was(
    model: Any, monkeypatch: pytest.MonkeyPatch, kind: type, calls: int
) -> None:
    """The second layer's kv_b_proj, or a projection of the first layer or the second."""
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    make, made = kind.__init__, list[object]()

    def fail_in_the_end(new: Any, *arguments: Any, **words: Any) -> None:
        made.append(new)
        if len(made) == calls:
            raise torch.OutOfMemoryError("no memory is left.")
        make(new, *arguments, **words)

    monkeypatch.setattr(kind, "__init__", fail_in_the_end)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        use_mla(model)
    assert_same(model, weights)
    assert not any(hasattr(module, "mla_attention") for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_a_model_elsewhere_than_the_backend(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(device=torch.device("cuda"), ops=dict)
    monkeypatch.setattr("mla.load_backend", lambda *_, **__: other)
    with pytest.raises(UnsupportedModel, match="this model is on cpu, and backend 'far' computes on cuda"):
        use_mla(model, "far")


PROJECTIONS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projection_that_is_more_than_its_weight(model: Any, name: str) -> None:
    """Its scales, its adapter or its hook would be lost."""
    attention = model.model.layers[1].self_attn

    def refused(message: str) -> None:
        with pytest.raises(UnsupportedModel, match=f"{name} of this model is {message}"):
            use_mla(model)

    linear = getattr(attention, name)
    for register in (
        linear.register_forward_hook,
        linear.register_forward_pre_hook,
        linear.register_full_backward_hook,
        linear.register_full_backward_pre_hook,
        linear.weight.register_hook,
    ):
        hook = register(lambda *_: None)
        refused("an nn.Linear with hooks")
        hook.remove()
    linear.forward = lambda x: -type(linear).forward(linear, x)
    refused("an nn.Linear with a forward of its own")
    del linear.forward
    getattr(attention, name).to(torch.float8_e4m3fn)
    refused("an nn.Linear of torch.float8_e4m3fn")
    setattr(attention, name, nn.Sequential(getattr(attention, name)))
    refused("torch.nn.modules.container.Sequential")


def test_a_name_is_no_model() -> None:
    with pytest.raises(UnsupportedModel, match="str is not a model of"):
        use_mla("path/to/model")


def test_inputs_of_another_dtype_are_refused(model: Any) -> None:
    use_mla(model)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UnsupportedModel, match="autocast"),
    ):
        model.model.layers[0].self_attn.o_proj(torch.zeros(1, 64, dtype=torch.bfloat16))


def packed(model: Any) -> None:
    model(input_ids=torch.tensor([[3, 4, 5, 6]]), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)


class Forgetful(DynamicCache):
    """Keeps the last four tokens, and says that it has all."""

    def update(self, *arguments: Any, **words: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*arguments, **words)
        return keys[:, :, -4:], values[:, :, -4:]


def dropped_tokens(model: Any) -> None:
    model(input_ids=torch.arange(3, 9)[None], **{CACHE: Forgetful(config=model.config)})


def windows() -> dict[str, Any]:
    return {CACHE: Cache(layers=[DynamicSlidingWindowLayer(sliding_window=8) for _ in range(2)])}


def window(model: Any) -> None:
    cache = windows()
    for _ in range(3):
        model(input_ids=torch.arange(3, 8)[None], **cache)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (dropped_tokens, "this cache returned 4 of 6 tokens"),
        (window, "keeps a window of tokens and has dropped some"),
        (packed, "serves plain causal attention only"),
    ],
)
def test_steps_that_cannot_be_served(model: Any, run: Callable[[Any], None], message: str) -> None:
    use_mla(model)
    with torch.no_grad(), pytest.raises(UnsupportedModel, match=message):
        run(model)


def in_bfloat16(model: Any, **words: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, **words)


def generate(model: Any, **words: Any) -> None:
    model.generate(torch.arange(3, 9)[None], max_new_tokens=6, eos_token_id=None, **words)


def paged(model: Any, **words: Any) -> None:
    generate(model, **words, **{CACHE: PagedCache(model, max_tokens=512)})


WEIGHTS = {"output_attentions": True, "return_dict_in_generate": True}
GENERATIONS: list[tuple[Callable[[Any], None], str]] = [
    (lambda model: paged(model, num_beams=2), "use a stock cache for beams, or leave num_beams out"),
    (lambda model: generate(model, **WEIGHTS), "leave output_attentions out"),
    (lambda model: generate(model, **windows()), "window of 8 tokens, fewer .* needs all of them, as `Dyn"),
    (lambda model: generate(model, use_mtp=True), "leave use_mtp out"),
    (lambda model: model.generate_batch([[3, 4]]), r"`restore\(model\)` first, or batch with a PagedCache"),
    (lambda model: generate(model, cache_implementation="paged"), "or batch with a PagedCache"),
    (in_bfloat16, "leave autocast out"),
    (lambda model: generate(model.train()), r"call `model.eval\(\)`"),
    (lambda model: generate(model.set_attn_implementation("sdpa") or model), r"call `restore\(model\)`"),
]
IN_FP8: list[tuple[Callable[[Any], None], str]] = [
    (lambda model: generate(model), "only a PagedCache holds fp8: make one of this model"),
    (lambda model: generate(model, use_cache=False), "only a PagedCache holds fp8: make one of this model"),
]


@pytest.mark.parametrize(
    ("words", "run", "message"),
    [
        *(({}, *case) for case in GENERATIONS),
        *(({"cache_format": "fp8"}, *case) for case in IN_FP8),
    ],
)
def test_generations_refused_before_the_first_forward(
    model: Any, words: dict[str, Any], run: Callable[[Any], None], message: str
) -> None:
    """Each with its way out; and a restored model has nothing to refuse them."""
    before, forwards = dict(vars(model)), []
    use_mla(model, **words)
    hook = model.register_forward_pre_hook(lambda *arguments: forwards.append(1))
    with pytest.raises(UnsupportedModel, match=message):
        run(model)
    hook.remove()
    assert forwards == []
    assert vars(restore(model.eval())).keys() == before.keys()
