"""TokenSpeed's kernels on a fake that has what their source says, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mla_backends import BackendError
from mla_backends.kernels import TokenspeedMla, TokenspeedPrefill, tokenspeed
from mla_backends.kernels.tokenspeed import own_pages
from mla_backends.selftest import try_expanded

FAKE = "tokenspeed"
WRONG = r"worst (row|lse) error|NaN or infinity"
FAILS = (AssertionError, RuntimeError, ValueError)


@pytest.fixture
def fakes(installed: Any) -> Any:
    """Install the fake package, and return what it shares with the others."""
    with installed(FAKE) as package:
        yield package


# ------------------------------------------------------------------------------------------- decoding


def test_a_page_of_nan_behind_a_row_or_behind_the_table_is_not_read(
    fakes: Any, make_problem: Any, assert_right: Any
) -> None:
    """The kernel reads whole tiles, and page 0 where the table ends."""
    for width in (1, 2, 3):
        problem = make_problem([1], [33])
        spare, first = problem.view.block_table[0, 1].item(), problem.view.block_table[0, 0].item()
        problem.view.block_table = torch.full((1, width), spare, dtype=torch.int32)
        problem.view.block_table[0, 0] = first
        assert problem.cache[spare].isnan().all()
        assert_right(problem.run(TokenspeedMla()), problem.truth())


def test_the_table_of_a_row_holds_its_own_pages_only() -> None:
    table = torch.tensor([[7, 8, 9], [3, 0, 0], [5, 6, 0], [4, 0, 0]], dtype=torch.int32)
    lens = torch.tensor([190, 64, 65, 1], dtype=torch.int32)
    assert own_pages(table, lens, 64).tolist() == [[7, 8, 9, 9], [3, 3, 3, 3], [5, 6, 6, 6], [4, 4, 4, 4]]
    assert own_pages(table[:1, :1], lens[3:], 32).tolist() == [[7, 7, 7, 7]]
    assert own_pages(table[:1], lens[:1], 128).tolist() == [[7, 8, 8]]
    assert own_pages(table, lens, 64).dtype == torch.int32


def test_one_workspace_serves_all_batches(
    fakes: Any, make_problem: Any, assert_right: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenspeed, "multiprocessors", lambda device: 148)
    op = TokenspeedMla()
    for count, queries, heads in (
        (1, 1, 128),
        (3, 4, 96),
        (73, 1, 3),
        (74, 2, 128),
        (200, 1, 16),
        (1, 4, 33),
    ):
        problem = make_problem([queries] * count, [9] * count, heads=heads)
        assert_right(problem.run(op), problem.truth())
    (workspace,) = (held for (name, *_), held in op._scratch._held.items() if name == "workspace")
    assert workspace.dtype == torch.int8
    assert workspace.nbytes < 40 << 20


@pytest.mark.parametrize("with_lse", [True, False])
def test_the_kernel_is_asked_for_the_log_sum_exp_only_where_somebody_reads_it(
    fakes: Any, make_problem: Any, monkeypatch: pytest.MonkeyPatch, with_lse: bool
) -> None:
    import tokenspeed_mla

    decode, asked = tokenspeed_mla.tokenspeed_mla_decode, list[bool]()

    def recorded(*, return_lse: bool, **given: Any) -> Any:
        asked.append(return_lse)
        return decode(return_lse=return_lse, **given)

    monkeypatch.setattr(tokenspeed_mla, "tokenspeed_mla_decode", recorded)
    make_problem([1], [33]).run(TokenspeedMla(), **({} if with_lse else {"lse": None}))
    assert asked == [with_lse]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor from the second element of its memory on: not at a multiple of 16 bytes."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


def test_queries_and_outputs_may_start_anywhere(fakes: Any, make_problem: Any, assert_right: Any) -> None:
    problem = make_problem([1, 1], [33, 70])
    problem.q = shifted(problem.q)
    assert problem.q.data_ptr() % 16
    out = shifted(torch.full((2, 16, 512), torch.nan).bfloat16())
    assert_right(problem.run(TokenspeedMla(), out=out), problem.truth())
    problem.cache = shifted(problem.cache)
    with pytest.raises(BackendError, match="must start at multiples of 16 bytes"):
        problem.run(TokenspeedMla())


class Unmasked(TokenspeedMla):
    def launch(self, plan: Any, call: Any) -> Any:
        import tokenspeed_mla

        decode = tokenspeed_mla.tokenspeed_mla_decode
        self._vendor.tokenspeed_mla_decode = lambda **given: decode(**{**given, "causal_mask": False})
        return super().launch(plan, call)


class NoTable(TokenspeedMla):
    """The batch's table is passed on."""

    def launch(self, plan: Any, call: Any) -> Any:
        return super().launch(call.block_table, call)


class RawEmptyRows(TokenspeedMla):
    """What the kernel gives for rows without keys is passed on."""

    def _write(self, group: Any, *rest: Any) -> None:
        super()._write(replace(group, has_empty=False), *rest)


class SmallWorkspace(TokenspeedMla):
    def _workspace(self, device: torch.device) -> torch.Tensor:
        return super()._workspace(device)[: 1 << 16]


MUTANTS: dict[str, Callable[[], TokenspeedMla]] = {
    "no mask": Unmasked,
    "the batch's table": NoTable,
    "small workspace": SmallWorkspace,
    "lse base": lambda: TokenspeedMla(replace(TokenspeedMla.limits, lse_base="e")),
    "lse layout": lambda: TokenspeedMla(replace(TokenspeedMla.limits, lse_layout="heads_first")),
    "empty rows raw": RawEmptyRows,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_fails_a_wrong_adapter(fakes: Any, check_latent: Any, mutant: str) -> None:
    with pytest.raises(FAILS, match=rf"{WRONG}|workspace_buffer too small"):
        check_latent(MUTANTS[mutant](), heads=(4, 16))


# ------------------------------------------------------------------------------------------ prefill


def test_out_may_be_strided_and_lse_left_out(fakes: Any, make_spec: Any) -> None:
    from mla_backends.api import SegmentLengths

    op, spec = TokenspeedPrefill(), make_spec(num_heads=2)
    state = op.prepare(spec, SegmentLengths((4, 0), (4, 1), causal=True))
    q, k = torch.randn(4, 2, 192).bfloat16(), torch.randn(5, 2, 192).bfloat16()
    v = torch.randn(5, 2, 128).bfloat16()
    plain, room = torch.empty(4, 2, 128).bfloat16(), torch.full((4, 3, 128), torch.nan).bfloat16()
    op(state, q=q, k=k, v=v, softmax_scale=0.1, out=plain, lse=torch.empty(4, 2))
    op(state, q=q, k=k, v=v, softmax_scale=0.1, out=room[:, :2], lse=None)
    assert torch.equal(plain, room[:, :2])
    odd = [shifted(tensor) for tensor in (q, k, v, torch.empty_like(plain))]
    op(state, q=odd[0], k=odd[1], v=odd[2], softmax_scale=0.1, out=odd[3], lse=None)
    assert torch.equal(plain, odd[3])
    assert room[:, 2].isnan().all()


class ByHalf(TokenspeedPrefill):
    """The log-sum-exp is taken for one in base 2, as that of decoding is."""

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state, **tensors)
        tensors["lse"] *= 0.6931


def test_values_that_are_passed_on_as_a_slice_are_wrong(
    fakes: Any, make_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, spec = TokenspeedPrefill(), make_spec(num_heads=2)
    assert try_expanded(op, spec) == ""
    monkeypatch.setattr(TokenspeedPrefill, "_as_read", lambda self, tensor: tensor)
    assert try_expanded(op, spec) == "gives wrong results"


def test_the_check_fails_a_log_sum_exp_of_another_base(
    fakes: Any, run_expanded: Any, assert_right: Any
) -> None:
    assert_right(*run_expanded(TokenspeedPrefill(), (2, 5), (2, 9)))
    with pytest.raises(AssertionError, match=WRONG):
        assert_right(*run_expanded(ByHalf(), (2, 5), (2, 9)))


# ------------------------------------------------------------------------------------------ refusals

OPS = {"decode": TokenspeedMla, "prefill": TokenspeedPrefill}
each_op = pytest.mark.parametrize("make", OPS.values(), ids=OPS)


def test_pages_and_batches_it_cannot_serve_are_refused(fakes: Any, make_spec: Any) -> None:
    op, spec = TokenspeedMla(), make_spec()
    assert op.unsupported_batch(spec, [1], [40], 16) == [
        "it reads pages of 32 or 64 tokens, but this cache has pages of 16"
    ]
    assert "at most 16000 rows" in op.unsupported_batch(spec, [1] * 16_001, [9] * 16_001, 64)[0]


@each_op
def test_a_package_without_cute_dsl_is_refused_before_and_by_the_preflight(
    installed: Any, make_spec: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import succeeds, and its functions raise ImportError."""
    with installed("tokenspeed_bare") as fakes:
        (reason,) = make().unsupported_reasons(make_spec())
        assert reason.startswith(
            "tokenspeed_mla cannot load CuTe DSL (No module named 'cutlass'); pip install"
        )
        assert not fakes.CALLS
        (reason,) = make().preflight(make_spec())
        assert "ImportError" in reason
        assert "because of ModuleNotFoundError: No module named 'cutlass'" in reason
        assert "pip install -U tokenspeed-mla" in reason


@each_op
def test_a_package_that_is_missing_or_old_is_refused(
    installed: Any, make_spec: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed("nvidia_c"):  # a fake of another package
        assert make(install="pip install it").unsupported_reasons(make_spec()) == [
            "tokenspeed_mla is not installed (pip install it)"
        ]
    with installed(FAKE):
        import tokenspeed_mla

        for name in ("tokenspeed_mla_decode", "tokenspeed_mla_prefill"):
            monkeypatch.setattr(tokenspeed_mla, name, lambda query, out: None)
        assert any(
            "takes no argument return_lse" in reason for reason in make().unsupported_reasons(make_spec())
        )


@each_op
def test_a_preflight_names_what_it_compiles(fakes: Any, make_spec: Any, make: Any) -> None:
    op = make()
    assert "tokenspeed_mla" in op.compiles
    assert op.preflight(make_spec()) == []
