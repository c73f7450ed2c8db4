"""A kept call is made again exactly: the same numbers, strides and neighbours, and the same verdict."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from faulty_backend import FaultyOp
from kept_calls import EVERY_KIND, watched_call
from safetensors.torch import save_file
from wrong_ops.base import mutant

from mla import MLA, LatentCache, MLAConfig
from mla.errors import OutOfMemory, ResultError, UnknownOp
from mla.failures import call as calls
from mla.failures import file
from mla.failures.call import CallFacts, Watched, Watcher
from mla.failures.file import CannotReplay, replay
from mla.layer.ops import layer_roles
from mla.reference import REFERENCE
from mla.verify.layer_check import Poison
from mla.weights import random_state_dict
from mla_backends import BackendError
from mla_backends.api import FusedOp
from mla_backends.testing import HostBackend

CPU = torch.device("cpu")
CONFIG = MLAConfig(
    64, 4, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12
)
KINDS = {role: kind for role, (kind, _) in layer_roles(CONFIG, torch.float32, CPU).items()}
# Absorbed: a decode, several tokens over the end of a page; expanded: a prefill.
NEW, OLD = (1, 3, 9), (40, 30, 0)
ORIGIN = file.Origin(backend="host", options=[], device="cpu", command="repeat", where="here", reason="wrong")

Replace = Callable[[str, FusedOp], FusedOp]


def run_layer(
    replace: Replace = lambda role, op: op, attention: str = "auto", dtype: torch.dtype = torch.float32
) -> Watcher:
    """Run a forward of a small layer whose ops are watched."""
    layer = MLA(CONFIG, dtype=dtype, attention=attention)
    layer.load_state_dict(random_state_dict(CONFIG, 0, dtype))
    cache = LatentCache(CONFIG, max_tokens=256, page_size=16, dtype=dtype, shuffle=3)
    ids = cache.new_sequences(len(NEW))
    random = torch.Generator().manual_seed(0)
    for sequence, length in zip(ids, OLD, strict=True):
        cache.load(sequence, *(torch.randn(length, width, generator=random).to(dtype) for width in (32, 8)))
    Poison(cache, ids, [a + b for a, b in zip(NEW, OLD, strict=True)], nan_safe_tail=True).apply()
    watcher = Watcher(lambda: None)
    watcher.lengths = (NEW, [a + b for a, b in zip(NEW, OLD, strict=True)])
    specs = layer_roles(CONFIG, dtype, CPU)
    layer.replace_ops(lambda role, op: Watched(role, "mine", replace(role, op), watcher, specs[role][1]))
    hidden = torch.randn(sum(NEW), 64, generator=random).to(dtype)
    layer(hidden, cache.extend(ids, NEW), cache.pages[0])
    return watcher


def faulty(role: str, fault: str) -> Replace:
    return lambda name, op: FaultyOp(KINDS[name], fault) if name == role else op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("attention", "count"), [("auto", 8), ("absorbed", 9), ("expanded", 8)])
def test_a_right_layer_has_no_wrong_call(attention: str, count: int, dtype: torch.dtype) -> None:
    watcher = run_layer(attention=attention, dtype=dtype)
    assert watcher.wrong is None
    assert watcher.judged >= count
    assert watcher.reason == ""


ABSORBED = [role for role in KINDS if role not in ("kv_b_proj", "expanded_attention")]
CASES = [(role, "absorbed") for role in ABSORBED]
CASES += [(role, "expanded") for role in ("kv_b_proj", "expanded_attention", "rotate_query")]


@pytest.mark.parametrize(("role", "attention"), CASES)
@pytest.mark.parametrize("fault", ["scale", "head", "half"])
def test_the_wrong_op_of_a_forward_is_found_and_kept(
    role: str, attention: str, fault: str, tmp_path: Path
) -> None:
    wrong = run_layer(faulty(role, fault), attention).wrong
    assert wrong is not None
    assert (wrong.call.facts.role, wrong.call.facts.kind) == (role, KINDS[role])
    file.write_call(tmp_path, wrong, ORIGIN)
    kept = file.read(tmp_path)
    backend = HostBackend(ops={"mine": FaultyOp(KINDS[role], fault)})
    assert replay(kept, backend) == [wrong.reason]
    assert replay(kept, backend, "reference", runs=2) == ["", ""]


@pytest.mark.parametrize(("kind", "cache_format"), EVERY_KIND)
def test_a_call_of_every_kind_is_kept_and_replayed(kind: str, cache_format: str, tmp_path: Path) -> None:
    file.write_call(tmp_path, watched_call(kind, cache_format), ORIGIN)
    assert replay(file.read(tmp_path), HostBackend(), "reference") == [""]


@pytest.fixture(scope="module")
def kept_attention(tmp_path_factory: pytest.TempPathFactory) -> file.Failure:
    folder = tmp_path_factory.mktemp("kept")
    wrong = run_layer(faulty("latent_attention", "scale"), "absorbed").wrong
    assert wrong is not None
    file.write_call(folder, wrong, ORIGIN)
    return file.read(folder)


def test_rows_of_a_kept_call_have_names(kept_attention: file.Failure) -> None:
    reason = kept_attention.document.reason
    assert reason.startswith("out: 52 of 52 rows are wrong, every row; request ")
    wrong = run_layer(faulty("o_proj", "half"), "absorbed").wrong
    assert wrong is not None
    assert wrong.reason == "out: 1 of 13 rows hold NaN or infinity: request 2, position 8 (row 12)"


class Looking(FusedOp):
    """Notes what it is called with, and computes nothing."""

    def __init__(self, kind: str) -> None:
        self.contract = REFERENCE[kind].contract
        self.seen: dict[str, Any] = {}
        self.memory: dict[str, torch.Tensor] = {}

    def prepare(self, spec: Any, batch: Any) -> Any:
        self.batch = batch

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        self.seen = tensors
        self.memory = {
            name: torch.tensor(operand.untyped_storage().tolist(), dtype=torch.uint8)
            for name, operand in tensors.items()
            if torch.is_tensor(operand)
        }


def test_a_call_is_made_again_in_the_same_layout(kept_attention: file.Failure) -> None:
    op = Looking("latent_attention")
    kept_attention.call().make(op, CPU)
    cache = op.seen["cache"]
    assert cache.shape == (16, 16, 40)
    owned = {
        int(page)
        for row, length in zip(op.seen["block_table"], op.batch.kv_lens, strict=True)
        for page in row[: -(-length // 16)]
    }
    assert owned
    for page in range(16):
        assert bool(cache[page].isnan().all()) == (page not in owned)
    assert (op.batch.query_lens, op.batch.kv_lens) == (NEW, (41, 33, 9))
    assert op.seen["cu_q"].tolist() == [0, 1, 4, 13]
    assert op.seen["softmax_scale"] == CONFIG.softmax_scale
    assert bool(op.seen["out"].isnan().all())


def strided_call() -> tuple[calls.RecordedCall, torch.Tensor]:
    """Return a recorded rotation from columns to columns of wide rows, and the rows that x is part of."""
    wide, out = torch.randn(5, 4, 30), torch.full((5, 4, 20), 7.0)
    spec = layer_roles(CONFIG, torch.float32, CPU)["rotate_query"][1]
    facts = CallFacts.of("rotate_query", "rotate_query", "mine", spec)
    tensors = {"x": wide[..., 3:11], "cos_sin": torch.randn(5, 8), "interleaved": True, "out": out[..., 12:]}
    calls.poison_outputs(tensors)
    return calls.record(facts, tensors), wide


def test_strides_are_kept_amid_poison() -> None:
    recorded, wide = strided_call()
    op = Looking("rotate_query")
    recorded.make(op, CPU)
    x, out = op.seen["x"], op.seen["out"]
    assert (x.stride(), out.stride()) == ((120, 30, 1), (80, 20, 1))
    assert torch.equal(x, wide[..., 3:11])
    for tensor in (x, out):
        around = tensor.as_strided((5, 4, tensor.stride(1)), tensor.stride(), tensor.storage_offset())
        assert bool(around[..., 8:].isnan().all())
    assert bool(out.isnan().all())


@pytest.mark.parametrize(("refuses", "alone"), [(True, None), (False, False)], ids=["refuses", "is right"])
def test_a_wrong_call_is_kept_where_the_op_does_not_repeat_it(refuses: bool, alone: bool | None) -> None:
    class Once(FaultyOp):
        calls = 0

        def __call__(self, *leading: Any, **tensors: Any) -> None:
            Once.calls += 1
            if Once.calls > 1 and refuses:
                raise BackendError("once is enough")
            (super().__call__ if Once.calls == 1 else self.right)(*leading, **tensors)

    watcher = run_layer(lambda name, op: Once(KINDS[name], "scale") if name == "o_proj" else op)
    assert watcher.wrong is not None
    assert (watcher.wrong.call.facts.role, watcher.wrong.alone) == ("o_proj", alone)
    assert "every row" in watcher.wrong.reason


def test_what_lies_between_rows_must_stay() -> None:
    recorded, _ = strided_call()

    class Overrunning(Looking):
        def __call__(self, *leading: Any, **tensors: Any) -> None:
            REFERENCE["rotate_query"](**tensors)
            out = tensors["out"]
            out.as_strided((4, 1), (20, 1), out.storage_offset() + 8).zero_()

    assert recorded.make(REFERENCE["rotate_query"], CPU)[1] == ""
    said = recorded.make(Overrunning("rotate_query"), CPU)[1]
    assert said == "memory beside rows of `out` was written"
    watcher, spec = Watcher(lambda: None), layer_roles(CONFIG, torch.float32, CPU)["rotate_query"][1]
    wide, out = torch.randn(5, 4, 30), torch.zeros(5, 4, 20)[..., 12:]
    op = Watched("rotate_query", "mine", Overrunning("rotate_query"), watcher, spec)
    op(x=wide[..., 3:11], cos_sin=torch.randn(5, 8), interleaved=True, out=out)
    assert watcher.wrong is not None, "its call by itself has nothing beside it"
    assert watcher.wrong.reason == said


@pytest.mark.parametrize(("row", "where"), [(-1, "before the first row of"), (9, "behind the last row of")])
def test_memory_beside_an_output_belongs_to_somebody_else(row: int, where: str) -> None:
    """A suite may put a row of its own there."""

    def beside(right: Any, *, out: torch.Tensor, **rest: Any) -> None:
        right(out=out, **rest)
        out.as_strided(out.shape[1:], out.stride()[1:], out.storage_offset() + row * out.stride(0)).zero_()

    watcher = Watcher(lambda: None)
    op = Watched("rms_norm", "mine", mutant("rms_norm", beside), watcher)
    out = torch.full((11, 33), torch.nan)[1:-1]
    op(x=torch.randn(9, 33), weight=torch.randn(33), eps=1e-6, out=out)
    assert watcher.wrong is not None
    assert watcher.wrong.reason == f"memory {where} `out` was written"


def changed(kept: file.Failure, **changes: Any) -> file.Failure:
    """Return a failure whose call has other facts."""
    assert kept.document.call is not None
    facts = msgspec.structs.replace(kept.document.call, **changes)
    return file.Failure(msgspec.structs.replace(kept.document, call=facts), kept.tensors)


@pytest.mark.parametrize("large", [{"pages": 2**42}, {"gaps": {"q": (0, 2**40, 0)}}], ids=["cache", "gaps"])
def test_memory_that_does_not_fit_is_not_made(kept_attention: file.Failure, large: dict[str, Any]) -> None:
    said = r"this call needs .* GiB of memory, and .* are free: free more\."
    with pytest.raises(OutOfMemory, match=said):
        replay(changed(kept_attention, **large), HostBackend(), "reference")


def test_an_op_that_writes_lse_is_not_blamed_for_a_call_without_one(kept_attention: file.Failure) -> None:
    outputs = kept_attention.call().facts.outputs
    kept = changed(kept_attention, outputs={"out": outputs["out"]}, absent=["lse"])
    assert replay(kept, HostBackend(), "reference") == [""]
    with pytest.raises(CannotReplay, match="op 'other' needs an lse to write to, and the kept call has none"):
        replay(kept, HostBackend(ops={"other": FaultyOp("latent_attention", "none")}), "other")


@pytest.mark.parametrize("name", ["q", "block_table", "cache"])
def test_an_op_that_writes_to_its_input_is_wrong(kept_attention: file.Failure, name: str) -> None:
    class Writing(FusedOp):
        contract = "latent_attention/1"

        def prepare(self, spec: Any, batch: Any) -> Any:
            return REFERENCE["latent_attention"].prepare(spec, batch)

        def __call__(self, *leading: Any, **tensors: Any) -> None:
            REFERENCE["latent_attention"](*leading, **tensors)
            tensors[name].flatten()[3:4] += 1
            tensors[name][0, 0] += 1

    (reason,) = replay(kept_attention, HostBackend(ops={"mine": Writing()}))
    assert ("of the cache have changed" if name == "cache" else f"wrote to its input {name}") in reason


def test_a_write_beside_the_slots_is_damage(tmp_path: Path) -> None:
    wrong = run_layer(faulty("write_latent", "stray"), "absorbed").wrong
    assert wrong is not None
    assert wrong.reason.startswith(
        "1 slots of the cache have changed that are not written; the first is slot "
    )


def test_an_op_that_is_not_there_or_refuses_is_told(kept_attention: file.Failure) -> None:
    with pytest.raises(UnknownOp, match=r"no latent_attention named 'mine'. --op takes: reference\."):
        replay(kept_attention, HostBackend())
    refusing = FaultyOp("latent_attention", "none")
    refusing.unsupported_batch = lambda *arguments: ["3 requests are too many"]  # type: ignore[method-assign]
    with pytest.raises(CannotReplay, match="refuses this call: 3 requests are too many"):
        replay(kept_attention, HostBackend(ops={"mine": refusing}))


def test_a_call_that_reads_too_much_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_CALL_BYTES", 10_000)
    watcher = run_layer(faulty("w_uv", "scale"), "absorbed")
    assert watcher.reason.startswith("a call of qkv_a_proj reads ")
    assert watcher.reason.endswith("more than the 9.77 KiB that are kept: choose a smaller shape.")
    monkeypatch.undo()
    monkeypatch.setattr("mla_backends.host.memory_available", lambda: 10_000)
    watcher = run_layer(faulty("w_uv", "scale"), "absorbed")
    assert watcher.reason.startswith("a call of qkv_a_proj takes ")
    assert watcher.reason.endswith(" with its strides, and 9.77 KiB of memory are free: free more.")


def test_files_that_are_none_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"holds no failure.safetensors"):
        file.read(tmp_path)
    (tmp_path / file.NAME).write_bytes(b"nothing")
    with pytest.raises(ResultError, match="is not a failure that --dump-failure kept"):
        file.read(tmp_path)
    file.write(tmp_path, file.Document(origin=ORIGIN), {"output": torch.zeros(2)})
    with pytest.raises(ResultError, match=r"holds tensors of a whole layer.*with: repeat"):
        file.read(tmp_path).call()
    words = {file.KEY: '{"version": 1, "call": 5}'}  # all else was another before
    save_file({}, tmp_path / file.NAME, words)
    said = "its version is 1, and this program reads version 2: run the command that kept it again"
    with pytest.raises(ResultError, match=said):
        file.read(tmp_path)
    (tmp_path / file.NAME).unlink()
    os.mkfifo(tmp_path / file.NAME)
    with pytest.raises(ResultError, match="kept: it is not a regular file"):
        file.read(tmp_path)


def test_a_failure_of_an_earlier_run_makes_room_for_the_next(tmp_path: Path) -> None:
    """What is replayed is of the last run, which may have found nothing."""
    (tmp_path / file.NAME).write_bytes(b"earlier")
    file.prepare(tmp_path)
    assert (tmp_path / file.BEFORE).read_bytes() == b"earlier"
    assert not (tmp_path / file.NAME).exists()
    file.prepare(tmp_path)
    assert (tmp_path / file.BEFORE).read_bytes() == b"earlier"
