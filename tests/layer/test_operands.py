"""Whatever a layer is given gives the right output or a sentence; and threads may share layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier
from typing import Any

import pytest
import torch
from float64_attention import attend_segments
from torch._subclasses.fake_tensor import FakeTensorMode

from mla import MLA, LatentCache, MLAConfig, RaggedBatch, load_backend
from mla.layer.forward import AttentionCore
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict
from mla_backends import Backend
from mla_backends.errors import BackendError

BF16 = torch.bfloat16
CONFIG = MLAConfig(
    hidden_size=64,
    num_attention_heads=3,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
)


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Backend | None:
    return load_backend("cpu", options={"native": "portable"}) if request.param == "native" else None


def normal(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float32).to(BF16)


class Scene:
    """A layer, a cache with a history of two requests, and what a decode of both must give."""

    def __init__(
        self, backend: Backend | None, seed: int = 0, layer: MLA | None = None, attention: str = "absorbed"
    ) -> None:
        self.layer = layer or MLA(CONFIG, backend=backend, attention=attention)
        self.state = random_state_dict(CONFIG)
        if layer is None:
            self.layer.load_state_dict(self.state)
        draw = torch.Generator().manual_seed(seed)
        self.cache = LatentCache(CONFIG, max_tokens=1024, page_size=16, num_layers=2, shuffle=seed)
        self.ids = self.cache.new_sequences(2)
        self.history = [(normal(draw, n, 64), normal(draw, n, 32)) for n in (20 + seed, 33)]
        for sequence, past in zip(self.ids, self.history, strict=True):
            self.cache.load(sequence, *past)
        self.hidden = normal(draw, 5, 64)
        self.batch = self.cache.extend(self.ids, [4, 1])
        self.truth = oracle(CONFIG, self.state, self.hidden, (4, 1), self.history)

    @property
    def pages(self) -> torch.Tensor:
        return self.cache.pages[0]

    def run(self, **given: Any) -> torch.Tensor:
        return self.layer(
            given.get("hidden", self.hidden),
            given.get("batch", self.batch),
            given.get("pages", self.pages),
            out=given.get("out"),
        )

    def check(self, out: torch.Tensor) -> None:
        error = (out.double() - self.truth).norm(dim=1) / self.truth.norm(dim=1)
        assert error.max() < 2e-2


def emptied(x: torch.Tensor) -> torch.Tensor:
    held = x.clone()
    held.untyped_storage().resize_(0)
    return held


HOSTILE: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "meta": lambda x: x.to("meta"),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "negated": torch._neg_view,
    "sparse": lambda x: x.to_sparse(),
    "another dtype": lambda x: x.half(),
    "wide": lambda x: x.double(),
    "a row less": lambda x: x[:-1],
    "a dimension more": lambda x: x[None],
    "a list": lambda x: x.tolist(),
}


def test_what_is_no_plain_tensor_of_the_layer_is_refused_by_name(backend: Backend | None) -> None:
    scene = Scene(backend)
    out = torch.empty_like(scene.hidden)
    for _ in range(3):
        scene.check(scene.run(out=out))  # the third one is repeated
        for name, right in (("hidden", scene.hidden), ("pages", scene.pages), ("out", out)):
            for fault, make in HOSTILE.items():
                before = scene.cache.pages.clone()
                with pytest.raises(ValueError, match=f"^{name} ") as error:
                    scene.run(**{"out": out, name: make(right)})
                assert str(error.value).count(".\n") == 0, fault
                assert torch.equal(scene.cache.pages, before)
        with pytest.raises(ValueError, match="no rows share memory"):
            scene.run(out=out[:1].expand_as(out))
        for inside in (scene.cache.pages[0, -1, :5, :64], scene.cache.pages[1].view(-1)[:320].view(5, 64)):
            with pytest.raises(ValueError, match="out shares memory with pages"):
                scene.run(out=inside)


def test_memory_that_is_gone_is_refused_by_native_ops() -> None:
    scene = Scene(load_backend("cpu", options={"native": "portable"}))
    for _ in range(3):
        out = torch.empty_like(scene.hidden)
        for name, right in (("hidden", scene.hidden), ("pages", scene.pages), ("out", out)):
            with pytest.raises(ValueError, match="has lost its memory"):
                scene.run(**{"out": out, name: emptied(right)})
        scene.check(scene.run(out=out))


def test_what_a_user_mixes_up_is_named(backend: Backend | None) -> None:
    scene = Scene(backend)
    with pytest.raises(ValueError, match=r"pages is a LatentCache: pass `cache\.pages\[i\]`"):
        scene.run(pages=scene.cache)
    with pytest.raises(ValueError, match=r"batch must be a RaggedBatch, .* got a Tensor"):
        scene.run(batch=scene.pages, pages=scene.batch)
    elsewhere = RaggedBatch(
        [4, 1], list(scene.batch.kv_lens), scene.batch.block_table_host, 16, torch.device("meta")
    )
    with pytest.raises(ValueError, match="the batch's tables must be on cpu, and are on meta"):
        scene.run(batch=elsewhere)
    meta = LatentCache(CONFIG, max_tokens=1024, page_size=16, device="meta")
    with pytest.raises(ValueError, match="on meta"):
        scene.run(batch=meta.extend(meta.new_sequences(2), [4, 1]), pages=meta.pages[0])
    scene.check(scene.run())


def test_odd_tensors_that_hold_their_values_are_taken(backend: Backend | None) -> None:
    scene = Scene(backend)
    wide = torch.zeros(5, 192, dtype=BF16)
    wide[:, 64:128] = scene.hidden
    with torch.inference_mode():
        inferred = scene.hidden.clone()
    in_place = scene.hidden.clone()
    for _ in range(3):
        scene.check(scene.run(out=torch.empty_like(scene.hidden).requires_grad_()))
        scene.check(scene.run(hidden=scene.hidden.clone().requires_grad_()))
        scene.check(scene.run(hidden=torch.nn.Parameter(scene.hidden)))
        scene.check(scene.run(hidden=wide[:, 64:128]))
        scene.check(scene.run(hidden=scene.hidden.T.contiguous().T))
        scene.check(scene.run(hidden=inferred))
        scene.check(scene.run(hidden=in_place.copy_(scene.hidden), out=in_place))
        wide[:, 64:128] = scene.hidden
        scene.check(scene.run(hidden=wide[:, 64:128], out=wide[:, 32:96]))
        wide[:, 64:128] = scene.hidden


def test_autocast_changes_nothing(backend: Backend | None) -> None:
    layer = MLA(CONFIG, dtype=torch.float32, backend=backend)
    layer.load_state_dict(random_state_dict(CONFIG, dtype=torch.float32))
    cache = LatentCache(CONFIG, max_tokens=64, dtype=torch.float32)
    batch, hidden = cache.extend(cache.new_sequences(1), [9]), torch.randn(9, 64)
    plain = layer(hidden, batch, cache.pages[0])
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(layer(hidden, batch, cache.pages[0]), plain)


def test_a_copy_has_weights_of_its_own_and_pickle_works_or_says_why_not(backend: Backend | None) -> None:
    scene = Scene(backend)
    scene.run()
    copied = copy.deepcopy(scene.layer)
    scene.layer.load_state_dict(random_state_dict(CONFIG, 1))
    again = [copied]
    if backend is None:
        again.append(pickle.loads(pickle.dumps(copied)))
    else:
        with pytest.raises(BackendError, match=r"cannot be pickled: save the layer's state_dict\(\)"):
            pickle.dumps(copied)
    for scene.layer in again:
        scene.check(scene.run())


# ---------------------------------------------------------------------------------------------- threads


def together(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in so many threads that begin at the same time."""
    barrier = Barrier(count)

    def begin(number: int) -> None:
        barrier.wait()
        work(number)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(begin, range(count)))


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
def test_threads_share_a_layer_each_with_its_cache(backend: Backend | None, attention: str) -> None:
    first = Scene(backend, attention=attention)
    scenes = [first, *(Scene(backend, seed, first.layer) for seed in (1, 2))]

    def work(number: int) -> None:
        for _ in range(30):
            scenes[number].check(scenes[number].run())

    together(3, work)
    for scene in scenes:
        scene.check(scene.run())


def test_layers_of_a_backend_take_turns_as_its_ops_may_keep_scratch_memory() -> None:
    backend = load_backend("cpu", options={"native": "portable"})
    first, second = (Scene(backend, seed) for seed in range(2))
    second.run()
    with ThreadPoolExecutor(1) as pool:
        with first.layer._scratch.turn:
            running = pool.submit(second.run)
            assert not wait([running], 0.2).done
        second.check(running.result())


class Cores:
    """`AttentionCore`s that share scratch memory, and problems with their truth in float64."""

    def __init__(self, backend: Backend | None, config: MLAConfig = CONFIG) -> None:
        weight = random_state_dict(config)["kv_b_proj.weight"]
        self.core = AttentionCore(config, backend=backend)
        self.other = AttentionCore(config, backend=backend, scratch=self.core.scratch)
        for core in (self.core, self.other):
            core.load(weight)
        self.per_head = weight.double().unflatten(0, (3, -1))

    def problem(self, seed: int) -> tuple[torch.Tensor, RaggedBatch, torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        pages = normal(draw, 2, 16, 96)
        q = normal(draw, 2, 3, 64)
        table = torch.tensor([[0], [1]], dtype=torch.int32)
        batch = RaggedBatch([1, 1], [9 + seed, 16], table, 16, torch.device("cpu"))
        pieces = []
        for row in range(2):
            latents = pages[row, : batch.kv_lens[row]].double()
            both = torch.einsum("sc,hoc->sho", latents[:, :64], self.per_head)
            key = torch.cat((both[..., :32], latents[:, None, 64:].expand(-1, 3, -1)), dim=2)
            pieces.append((q[row : row + 1], key, both[..., 32:]))
        return q, batch, pages, attend_segments(iter(pieces), CONFIG.softmax_scale)[0]


def attended(core: AttentionCore, q: torch.Tensor, batch: RaggedBatch, pages: torch.Tensor) -> torch.Tensor:
    with core.scratch.turn:
        memory = core.queries(q.shape[0])
        memory.copy_(q)
        return core(batch, pages).clone()


def close(out: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool((out.double() - truth).norm() < 2e-2 * truth.norm())


def test_cores_that_share_memory_are_called_in_turns(backend: Backend | None) -> None:
    cores = Cores(backend)
    problems = [cores.problem(seed) for seed in range(3)]

    def work(number: int) -> None:
        *problem, truth = problems[number]
        for count in range(30):
            assert close(attended((cores.core, cores.other)[count % 2], *problem), truth)

    together(3, work)


def test_a_core_refuses_pages_that_are_none_of_its_own(backend: Backend | None) -> None:
    cores = Cores(backend)
    q, batch, pages, truth = cores.problem(0)
    with cores.core.scratch.turn:
        for make in HOSTILE.values():
            if torch.is_tensor(given := make(pages)) and given.shape == (1, 16, 96):
                continue  # a cache of fewer pages
            with pytest.raises(ValueError, match=r"^pages "):
                cores.core(batch, given)
    assert close(attended(cores.core, q, batch, pages), truth)


class Interrupted:
    """An op that calls something else first."""

    def __init__(self, op: Any, first: Callable[[], object]) -> None:
        self._op, self._first = op, first

    def __call__(self, *arguments: Any, **tensors: Any) -> None:
        self._first()
        self._op(*arguments, **tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)


def test_a_call_from_within_a_call_is_refused_and_spoils_nothing() -> None:
    backend = load_backend("cpu", options={"native": "portable"})
    scene, other, cores = Scene(backend), Scene(backend, seed=1), Cores(backend)
    q, batch, pages, _ = cores.problem(0)
    within: list[Callable[[], object]] = [
        scene.run,
        other.run,
        lambda: scene.layer.plan(scene.batch),
        scene.layer.state_dict,
        lambda: scene.layer.load_state_dict(random_state_dict(CONFIG, seed=9)),
        lambda: scene.layer.replace_ops(lambda role, op: op),
        lambda: attended(cores.core, q, batch, pages),
        cores.core.kv_b_proj,
        lambda: cores.core.load(torch.zeros(3 * 64, 64)),
    ]
    refused = []

    def interrupt() -> None:
        for call in within:
            with pytest.raises(RuntimeError, match="already running a layer of this backend") as error:
                call()
            refused.append(error)

    scene.layer.replace_ops(lambda role, op: Interrupted(op, interrupt))
    scene.check(scene.run())
    assert len(refused) >= 5 * len(within)
    other.check(other.run())


def test_a_default_dtype_changes_nothing(backend: Backend | None) -> None:
    def results() -> list[torch.Tensor]:
        scene, cores = Scene(backend), Cores(backend)
        q, batch, pages, _ = cores.problem(0)
        return [scene.run(), scene.pages.clone(), attended(cores.core, q, batch, pages)]

    expected = results()
    for dtype in (BF16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            actual = results()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(map(torch.equal, actual, expected)), dtype


def test_a_step_of_no_requests_is_refused(backend: Backend | None) -> None:
    scene = Scene(backend)
    batch = scene.batch.subset([])
    with pytest.raises(ValueError, match="the batch has no requests"):
        scene.run(batch=batch, hidden=scene.hidden[:0])


def test_a_compiled_model_calls_a_layer_as_it_is() -> None:
    scene = Scene(load_backend("cpu", options={"native": "portable"}))
    held = scene.cache.pages.clone()

    def model(hidden: torch.Tensor, batch: RaggedBatch, pages: torch.Tensor) -> torch.Tensor:
        return 2 * scene.layer(hidden * 1, batch, pages)

    seen = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append([node.op for node in graph.graph.nodes].count("call_function"))
        return graph.forward

    compiled = torch.compile(model, backend=count)
    for _ in range(2):
        scene.cache.pages.copy_(held)
        scene.check(compiled(scene.hidden, scene.batch, scene.pages) / 2)
    assert seen == [1, 1]  # what comes before the layer, and what comes after it
