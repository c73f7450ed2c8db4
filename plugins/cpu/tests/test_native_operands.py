"""Whatever the kernels are given, they read and write it rightly, or a sentence says why they do not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from native_cases import BF16, LAYOUTS, Canvas, angles, bits, draw, expanded_case, latent_case, load
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_backends.operands as operand_checks
from mla_backend_cpu.library import Library
from mla_backend_cpu.native_ops import (
    NativeBatchedLinear,
    NativeExpandedAttention,
    NativeLatentAttention,
    NativeLinear,
    NativeOp,
    NativeRmsNorm,
    NativeRotateQuery,
    NativeWriteLatent,
)
from mla_backend_cpu.recorded import sequence
from mla_backends import BackendError
from mla_backends.api import OpCall


@pytest.fixture(scope="module")
def kernels() -> Library:
    """Return kernels of any level: what they are given is checked before."""
    return load("portable")


pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
Call = tuple[NativeOp, tuple[Any, ...], dict[str, Any]]


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def linear(kernels: Library) -> Call:
    op = NativeLinear(kernels)
    return op, (op.pack(draw(20, 8)),), {"x": draw(5, 8), "bias": draw(20), "out": empty(5, 20)}


def batched(kernels: Library) -> Call:
    op = NativeBatchedLinear(kernels)
    return op, (op.pack(draw(3, 20, 8)),), {"x": draw(5, 3, 8), "out": empty(5, 3, 20)}


def norm(kernels: Library) -> Call:
    return (
        NativeRmsNorm(kernels),
        (),
        {"x": draw(5, 32), "weight": draw(32), "eps": 1e-6, "out": empty(5, 32)},
    )


def rotate(kernels: Library) -> Call:
    given = {"x": draw(5, 3, 32), "cos_sin": angles(5, 32), "interleaved": True, "out": empty(5, 3, 32)}
    return NativeRotateQuery(kernels), (), given


def write(kernels: Library) -> Call:
    given = {"kv_a": draw(5, 96), "weight": draw(64), "eps": 1e-6, "cos_sin": angles(5, 32)}
    cache = torch.zeros(3, 4, 96, dtype=BF16)
    return (
        NativeWriteLatent(kernels),
        (),
        {**given, "interleaved": True, "slots": torch.arange(5), "cache": cache},
    )


def latent(kernels: Library) -> Call:
    case = latent_case([1, 4], [20, 9])
    view = case.view()
    given = {"q": case.q, "cache": case.cache, "block_table": case.table, "kv_lens": view.kv_lens_device}
    more = {"cu_q": view.cu_q, "softmax_scale": 0.1, "out": empty(5, 3, 64)}
    return NativeLatentAttention(kernels), (None,), {**given, **more, "lse": empty(5, 3, dtype=torch.float32)}


def expanded(kernels: Library) -> Call:
    op, case = NativeExpandedAttention(kernels), expanded_case([1, 4], [20, 9])
    given = {"q": case.q, "k": case.k, "v": case.v, "softmax_scale": 0.1, "out": empty(5, 3, 32)}
    state = op.prepare(case.spec, case.lengths)
    return op, (state,), {**given, "lse": empty(5, 3, dtype=torch.float32)}


CALLS = (linear, batched, norm, rotate, write, latent, expanded)
WRITTEN = ("out", "lse")


class Wrapper(torch.Tensor):
    """Has no memory."""

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, *arguments: Any) -> Any:
        raise AssertionError("a kernel's operand was computed with")


def resized(x: torch.Tensor, part: float) -> torch.Tensor:
    view = torch.cat((x.reshape(-1)[:1], x.reshape(-1)))[1:].view(x.shape)  # not where its storage begins
    view.untyped_storage().resize_(int(part * view.nbytes))
    return view


def nested(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([x, x], dtype=x.dtype)


HOSTILE: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "meta": lambda x: x.to("meta"),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "wrapper": Wrapper,
    "sparse": lambda x: x.to_sparse(),
    "nested": nested,
    "gone": lambda x: resized(x, 0),
    "shrunk": lambda x: resized(x, 0.5),
    "zero without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "another dtype": lambda x: (
        x.double() if x.is_floating_point() else (x.int() if x.itemsize == 8 else x.long())
    ),
    "of the same size": lambda x: (
        x.view({2: torch.float16, 4: torch.int32, 8: torch.double}[x.itemsize])
        if x.dtype != torch.int32
        else x.view(torch.float32)
    ),
    "one dimension more": lambda x: x[None],
    "a row less": lambda x: x[:-1] if x.dim() > 1 else x[: x.shape[0] // 2],
    "a list": lambda x: x.tolist(),
    "nothing": lambda x: None,
}


def faults(name: str, right: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Return what may be wrong with an operand."""
    more: dict[str, Callable[[torch.Tensor], Any]] = {}
    if right.is_floating_point():
        more["negated"] = torch._neg_view
    if name in WRITTEN:
        more["expanded"] = lambda x: x[:1].expand_as(x)
    if name == "cache":
        more["strided"] = lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]]
    left_out = {"cache": ("a row less",), "bias": ("nothing",)}.get(name, ())
    return {**{fault: make for fault, make in HOSTILE.items() if fault not in left_out}, **more}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_an_operand_that_is_not_what_its_memory_says_is_refused_by_name(
    kernels: Library, call: Callable[[Library], Call]
) -> None:
    op, arguments, given = call(kernels)
    op(*arguments, **given)
    results = [bits(given[name]) for name in (*WRITTEN, "cache") if name in given]
    tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
    for name, right in tensors.items():
        for fault, make in faults(name, right).items():
            with pytest.raises(ValueError, match=r" (must|is|has|need) ") as error:
                op(*arguments, **{**given, name: make(right)})
            if fault != "a row less":  # where another operand has a row too many
                assert str(error.value).startswith((name, "the native ops need a cache")), fault
    op(*arguments, **given)
    again = [bits(given[name]) for name in (*WRITTEN, "cache") if name in given]
    assert all(torch.equal(*pair) for pair in zip(results, again, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_how_operands_are_strided_changes_no_bit(
    kernels: Library, call: Callable[[Library], Call], layout: str
) -> None:
    op, arguments, given = call(kernels)
    op(*arguments, **given)
    for name, right in given.items():
        if (
            name == "cache"
            or not isinstance(right, torch.Tensor)
            or (layout == "swapped" and right.dim() < 2)
        ):
            continue
        canvas = Canvas(right.shape, layout, right.dtype) if right.is_floating_point() else None
        strided = right.repeat_interleave(2, 0)[::2] if canvas is None else canvas.holding(right)
        again = {key: torch.full_like(x, 7) if key in WRITTEN else x for key, x in given.items()}
        op(*arguments, **{**again, name: strided})
        written = {key: again[key] for key in WRITTEN if key in given and key != name}
        written |= {name: canvas.taken()} if canvas is not None and name in WRITTEN else {}
        assert all(torch.equal(bits(x), bits(given[key])) for key, x in written.items()), name


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_right_operands_are_not_asked_twice(
    kernels: Library, call: Callable[[Library], Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long check, which finds the words of a refusal, costs several times what the short one does."""
    op, arguments, given = call(kernels)
    op(*arguments, **given)  # the first check of a process is always the long one
    asked: list[Any] = []
    monkeypatch.setattr(operand_checks, "_why", lambda *given: asked.append(given))
    if "weight" in given:
        given["weight"] = torch.nn.Parameter(given["weight"], requires_grad=False)
    op(*arguments, **given)
    assert not asked


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_transforms_of_torch_func_are_refused(kernels: Library, call: Callable[[Library], Call]) -> None:
    op, arguments, given = call(kernels)
    name = next(iter(given))

    def apply(x: torch.Tensor) -> torch.Tensor:
        op(*arguments, **{**given, name: x})
        return x

    with pytest.raises(ValueError, match=f"^{name} has no memory of its own"):
        torch.vmap(apply)(torch.stack((given[name], given[name])))


def test_what_a_mode_fakes_is_not_written_to(kernels: Library) -> None:
    op, (packed,), given = linear(kernels)
    strided = torch.cat((given["x"], given["x"]), dim=1)[:, ::2]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for wrong in (
            lambda: op.pack(draw(20, 8)),
            lambda: op.unpack(packed),
            lambda: op(packed, **{**given, "x": strided}),
        ):
            with pytest.raises(ValueError, match="is a FakeTensor"):
                wrong()


def test_sizes_that_the_kernels_do_not_have_are_refused(kernels: Library) -> None:
    changes: list[tuple[Callable[[Library], Call], dict[str, Any], str]] = [
        (norm, {"x": draw(5, 8), "weight": draw(8), "out": empty(5, 8)}, "features 8"),
        (rotate, {"x": draw(5, 3, 16), "cos_sin": angles(5, 16), "out": empty(5, 3, 16)}, "dim 16"),
        (write, {"weight": draw(60)}, "kv_lora_rank 60"),
        (write, {"weight": draw(96)}, "qk_rope_head_dim 0"),
        (write, {"weight": draw(112)}, "qk_rope_head_dim -16"),
        (latent, {"out": empty(5, 3, 0)}, "kv_lora_rank 0"),
        (latent, {"out": empty(5, 3, 128)}, "qk_rope_head_dim -32"),
        (latent, {"cache": empty(8, 0, 96)}, "pages without a slot"),
        (expanded, {"v": draw(29, 3, 0), "out": empty(5, 3, 0)}, "v_head_dim 0"),
    ]
    for call, change, message in changes:
        op, arguments, given = call(kernels)
        with pytest.raises(ValueError, match=message):
            op(*arguments, **{**given, **change})


def test_a_sequence_takes_what_was_recorded_alone(kernels: Library) -> None:
    op, arguments, given = linear(kernels)
    run = sequence([OpCall(op, arguments, given)], [given["x"], given["out"]])
    assert run is not None
    op(*arguments, **given)
    truth = given["out"].clone()
    for place, name in enumerate(("x", "out")):
        strided = torch.cat((given[name], given[name]), dim=1)[:, : given[name].shape[1]]
        for wrong in (
            *(make(given[name]) for make in HOSTILE.values()),
            strided,
            torch._neg_view(given[name]),
        ):
            moved = [given["x"], given["out"]]
            moved[place] = wrong
            with pytest.raises(ValueError, match=r"^a moving tensor"):
                run(*moved)
    moved = [given["x"].clone(), empty(5, 20)]
    run(*moved)
    assert torch.equal(moved[1], truth)
    with pytest.raises(ValueError, match="is a FakeTensor"):
        sequence([OpCall(op, arguments, {**given, "x": HOSTILE["fake"](given["x"])})], [])


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_ops_are_copied_and_not_pickled(kernels: Library, call: Callable[[Library], Call]) -> None:
    op, arguments, given = call(kernels)
    copied = copy.deepcopy(arguments)
    copy.deepcopy(op)(*copied, **given)
    with pytest.raises(BackendError, match=r"cannot be pickled: save the layer's state_dict\(\)"):
        pickle.dumps(op)
