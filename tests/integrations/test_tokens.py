"""Models generate the same tokens with our ops as without them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CACHE, PLAIN, fill, make_model
from torch import nn
from transformers import CompileConfig
from transformers.cache_utils import Cache, QuantizedLayer

from mla.integrations.transformers import PagedCache, UnsupportedModel, restore, use_mla
from mla.integrations.transformers.attention import PAGE_SIZE, Step

Prompts = dict[str, torch.Tensor]


def generate(model: Any, prompts: Prompts, **words: Any) -> Any:
    """Generate with a fixed seed; greedily unless `words` say otherwise."""
    torch.manual_seed(3)
    words = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, **words}
    return model.generate(**prompts, **words)


def both(model: Any, prompts: Prompts, **words: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens without our ops, and with them."""
    theirs = generate(model, prompts, **words)
    return theirs, generate(use_mla(model), prompts, **words)


def test_a_cache_made_without_our_ops_goes_on_with_them_and_back(model: Any, prompts: Prompts) -> None:
    words = {"return_dict_in_generate": True, "max_new_tokens": 20}
    first = generate(model, prompts, **words)
    whole = generate(model, prompts, max_new_tokens=60)

    def go_on(generated: Any) -> Any:
        ids = generated.sequences
        mask = torch.cat((prompts["attention_mask"], ids.new_ones(3, ids.shape[1] - 11)), dim=1)
        held = {CACHE: getattr(generated, CACHE)}
        return generate(model, {"input_ids": ids, "attention_mask": mask}, **held, **words)

    use_mla(model)
    second = go_on(first)
    restore(model)
    third = go_on(second)
    assert torch.equal(third.sequences, whole)


@given(
    st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3),
    st.integers(0, 8),
    st.sampled_from(["deepseek_v3", "deepseek_v32", "glm_moe_dsa"]),
)
@settings(max_examples=25, deadline=None)
def test_any_tokens_may_be_hidden(flags: list[list[bool]], past: int, family: str) -> None:
    """On the right, in the middle, among new tokens and old ones: what sees a key has the same logits."""
    ids, mask = torch.arange(3, 3 + 9 * len(flags)).view(-1, 9), torch.tensor(flags).long()
    sees = mask.cumsum(dim=1) > 0
    logits = []
    for ours in (False, True):
        model, cache = make_model(family, **({} if family == "deepseek_v3" else {"index_topk": 4})), {}
        if ours:
            use_mla(model)
        with torch.no_grad():
            if past:
                first = model(input_ids=ids[:, :past], attention_mask=mask[:, :past], use_cache=True)
                cache = {CACHE: getattr(first, CACHE)}
            logits.append(model(input_ids=ids[:, past:], attention_mask=mask, **cache).logits)
    theirs, shown = (kept_logits[sees[:, past:]] for kept_logits in logits)
    assert torch.allclose(theirs, shown, rtol=1e-3, atol=1e-3)


def test_an_assistant_may_run_our_ops_too(model: Any) -> None:
    prompt = {"input_ids": torch.arange(3, 14)[None], "attention_mask": torch.ones(1, 11, dtype=torch.int64)}
    words = {"assistant_model": make_model("deepseek_v2")}
    alone = generate(model, prompt)
    use_mla(model)
    use_mla(words["assistant_model"])
    assert torch.equal(generate(model, prompt, **words), alone)


ROLES = ("kv_b_proj", "w_uk", "w_uv", "latent_attention", "expanded_attention")
ON = {
    "dynamic": lambda model: {},
    "static": lambda model: {"cache_implementation": "static"},
    "paged": lambda model: PagedCache(model, max_tokens=1024).argument,
}


def forced_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, **cache: Any) -> torch.Tensor:
    """Return the logits [B, t, vocabulary] of every step of a generation whose tokens are given."""
    width = mask.shape[1]
    words = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": ids.shape[1] - width}
    words["prefix_allowed_tokens_fn"] = lambda request, sent: [int(ids[request, len(sent)])]
    generated = generate(model, {"input_ids": ids[:, :width], "attention_mask": mask}, **words, **cache)
    assert torch.equal(generated.sequences, ids)
    return torch.stack(generated.logits, dim=1).double()


def test_kernels_for_bf16_are_as_close_to_fp32_as_theirs_at_every_step(native: str) -> None:
    """On every cache, over the ends of three pages; without experts, between which rounding chooses."""
    plain = {"v_head_dim": 32, "first_k_dense_replace": 2}  # what kernels for expanded attention take
    model = make_model("deepseek_v3", torch.bfloat16, **plain)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_b_proj.weight /= 4  # so that every key counts, and a missing one shows
    ids = torch.randint(3, 97, (3, 61 + 140), generator=torch.Generator().manual_seed(2))
    asked = ids, (torch.arange(61) >= torch.tensor([[4], [50], [0]])).long()
    exact_model = copy.deepcopy(model).float()
    exact_model.set_attn_implementation("eager")
    exact = forced_logits(exact_model, *asked)

    def errors(logits: torch.Tensor) -> torch.Tensor:  # [B, t]
        return (logits - exact).norm(dim=-1) / exact.norm(dim=-1)

    theirs = errors(forced_logits(model, *asked))
    use_mla(model, options={"native": native})
    for layer in model.model.layers:
        assert "reference" not in {layer.self_attn.mla_attention.core.ops[role].name for role in ROLES}
    for name, cache in ON.items():
        ours = errors(forced_logits(model, *asked, **cache(model)))
        assert ours.mean() < 1.1 * theirs.mean(), name
        assert (ours / theirs).max() < 4, name  # of single steps, by chance 2.4 either way


def test_what_lies_past_a_request_is_zero_for_an_op_that_reads_it(prompts: Prompts) -> None:
    """Memory of stock caches' pages is not zeroed when it is made, and an op may multiply it by 0."""
    model = make_model("deepseek_v3")
    theirs = generate(model, prompts)
    use_mla(model)
    steps = model.model.layers[0].self_attn.mla_attention._steps
    assert not steps.zeroes, "an op that does not read it needs no zeroes"
    steps.zeroes = True
    take, seen = steps.scratch.take, list[torch.Tensor]()

    def poisoned(name: str, *shape: int, **words: Any) -> torch.Tensor:
        memory = take(name, *shape, **words)
        if name == "pages":
            memory.fill_(torch.nan)
            seen.append(memory)
        return memory

    steps.scratch.take = poisoned
    assert torch.equal(generate(model, prompts), theirs)
    assert seen
    assert seen[-1].isfinite().all()


@given(tokens=st.integers(1, 200_000))
def test_pages_hold_all_tokens_and_little_more(tokens: int) -> None:
    step = Step.of(torch.ones(1, 1, 1, tokens, dtype=torch.int32), 1, torch.device("cpu"))
    room = step.batch.block_table.shape[1] * PAGE_SIZE
    assert tokens <= room < 1.125 * (tokens + PAGE_SIZE)


# ------------------------------------------------------------------------------------------ compiled
# A model that `torch.compile` traces calls our ops as they are, and generates the same tokens.
WORDS = {"max_new_tokens": 5}


@pytest.fixture
def traced_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs() -> int:
    """Return how many graphs have been traced."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("traced_anew")
def test_what_generate_compiles_for_a_static_cache(model: Any, prompts: Prompts) -> None:
    """By itself on a GPU; here when it is told to."""
    theirs, before = generate(model, prompts, **WORDS), graphs()
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(generate(use_mla(model), prompts, **WORDS, **static), theirs)
    assert graphs() > before


@pytest.mark.usefixtures("traced_anew")
def test_a_compiled_forward_on_a_paged_cache(model: Any, prompts: Prompts) -> None:
    theirs, before = generate(model, prompts, **WORDS), graphs()
    use_mla(model).forward = torch.compile(model.forward, backend="eager")
    cache = {CACHE: PagedCache(model, max_tokens=4096)}
    assert torch.equal(generate(model, prompts, **WORDS, **cache), theirs)
    assert graphs() > before


# --------------------------------------------------------------------------------------- other parts
# Parts that others add to a model: caches that quantize, and adapters.
class HalfLayer(QuantizedLayer):
    """Keeps all but the last tokens in float16; what packages of quantizers fill in is this much."""

    def __init__(self) -> None:
        super().__init__(residual_length=5)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.half()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor.float()


@pytest.mark.parametrize("words", [{}, {"num_beams": 2}], ids=str)
def test_a_quantized_cache(model: Any, prompts: Prompts, words: dict[str, Any]) -> None:
    outputs = []
    for prepare in (lambda model: model, use_mla):
        cache = Cache(layers=[HalfLayer() for _ in range(2)])
        outputs.append(generate(prepare(model), prompts, **{CACHE: cache}, **words))
        assert cache.layers[1]._quantized_keys.shape[2] > 60
    assert torch.equal(*outputs)


class Adapter(nn.Module):
    """A projection with a low-rank one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.base(x) + self.up(self.down(x))
        return added


def test_adapters_of_other_projections_are_served(model: Any, prompts: Prompts) -> None:
    plain = generate(model, prompts)
    model.model.layers[0].mlp.down_proj = Adapter(model.model.layers[0].mlp.down_proj)
    theirs, ours = both(model, prompts)
    assert torch.equal(theirs, ours)
    assert not torch.equal(plain, ours), "the adapter changes nothing"


@pytest.mark.parametrize("name", ["q_a_proj", "kv_b_proj", "o_proj"])
def test_adapters_of_attention_are_refused(model: Any, name: str) -> None:
    layer = model.model.layers[1].self_attn
    setattr(layer, name, Adapter(getattr(layer, name)))
    with pytest.raises(UnsupportedModel, match=f"{name} of this model is .*Adapter: .* without adapters"):
        use_mla(model)


# -------------------------------------------------------------------------------------- test images
# A model that sees attends images as it did, and what it says through our ops.

IMAGE = 95  # the token that stands for a patch


def make_seeing_model() -> Any:
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    vision = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    rest = {"projection_hidden_size": 32, "image_token_id": IMAGE, "tie_word_embeddings": False}
    text = {**PLAIN, "model_type": "deepseek_v3"}
    torch.manual_seed(0)
    return fill(
        Kimi_K25ForConditionalGeneration(Kimi_K25Config(text_config=text, vision_config=vision, **rest))
    )


def test_a_model_that_sees_says_the_same() -> None:
    model = make_seeing_model()
    ids = torch.tensor([[3, 4, *[IMAGE] * 4, 5, 6, 7]])
    pixels = torch.randn(16, 3, 14, 14, generator=torch.Generator().manual_seed(2))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    prompt["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    theirs = generate(model, prompt, max_new_tokens=20)
    assert not torch.equal(generate(model, {**prompt, "pixel_values": -pixels}, max_new_tokens=20), theirs)
    use_mla(model)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert torch.equal(generate(model, prompt, max_new_tokens=20), theirs)
    cache = {CACHE: PagedCache(model, max_tokens=256)}
    assert torch.equal(generate(model, prompt, max_new_tokens=20, **cache), theirs)
    restore(model)
    assert model.config.text_config._attn_implementation == "sdpa"
