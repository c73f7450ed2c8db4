"""Kept failures, damaged: each is replayed, or ends in one sentence, and no kernel leaves its memory.

By hand with kernels that find every access outside of an operand (torch's memory is watched as well):

    FUZZ_EXAMPLES=2000 CXX='g++ -fsanitize=address' ASAN_OPTIONS=detect_leaks=0:log_path=asan \\
        LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \\
        pytest -n0 tests/fuzz/test_kept_failures.py

in a checkout that is installed editable, so that kernels are compiled with `CXX`; they are kept beside those
of other arguments. What is found ends the process, and is in the file `asan.PID`.
"""

from __future__ import annotations

import copy
import faulthandler
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

import mla
from mla import MLA, LatentCache, MLAConfig
from mla.bench.cli.main import main
from mla.failures import file
from mla.failures.call import JudgedCall, Watched, Watcher
from mla.layer.ops import layer_roles
from mla.weights import random_state_dict
from mla_backends import host
from mla_backends.api import OPS

Kept = tuple[dict[str, Any], dict[str, torch.Tensor]]  # the document, and the tensors
CONFIG = MLAConfig(
    64, 2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32
)
INDEXED = replace(CONFIG, index_topk=8, index_n_heads=4, index_head_dim=32)
NEW, OLD = (1, 3, 7), (20, 30, 0)
ORIGIN = file.Origin(
    backend="cpu", options=["threads=1"], device="cpu", command="repeat", where="here", reason="wrong"
)
ROOM = 1 << 29  # bytes of the machine, so that what asks for all of them is quick
HUNG = 300  # seconds after which an example shows where it hangs, and ends the run
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    1,
    -1,
    7,
    2**31,
    2**47,
    2**63,
    2**64,
    10**400,
    -0.5,
    1e39,
    "",
    "x",
    "1",
    [],
    [1],
    {},
)
INTEGERS = (torch.int32, torch.int64)
OTHERS = (torch.uint8, torch.bool, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.complex64)


class Collecting(Watcher):
    """Keeps a right call of every kind."""

    def __init__(self, calls: dict[str, JudgedCall]) -> None:
        self._calls = calls
        super().__init__(lambda: None)

    @property
    def last(self) -> JudgedCall | None:
        return None

    @last.setter
    def last(self, judged: JudgedCall | None) -> None:
        if judged is not None:
            self._calls.setdefault(judged.call.facts.kind, judged)


def made() -> dict[str, JudgedCall]:
    """Return a right call of every kind of op, by kind, as layers on the CPU make it."""
    backend = mla.load_backend("cpu", threads=1)
    names = {id(op): name for name, op in backend.ops().items()}
    calls, bf16 = dict[str, JudgedCall](), torch.bfloat16
    for attention, config in (("absorbed", CONFIG), ("expanded", CONFIG), ("auto", INDEXED)):
        specs = layer_roles(config, bf16, torch.device("cpu"))
        layer = MLA(config, backend=backend, dtype=bf16, attention=attention)
        layer.load_state_dict(random_state_dict(config, 0, bf16))
        cache = LatentCache(config, max_tokens=160, page_size=16, dtype=bf16, shuffle=3)
        ids = cache.new_sequences(len(NEW))
        for sequence, length in zip(ids, OLD, strict=True):
            index = {"index": torch.ones(length, 32)} if config.index_topk else {}
            cache.load(sequence, torch.ones(length, 32), torch.ones(length, 32), **index)
        watcher = Collecting(calls)

        def watched(role: str, op: Any, watcher: Watcher = watcher, specs: Any = specs) -> Watched:
            return Watched(role, names.get(id(op), "reference"), op, watcher, specs[role][1])

        layer.replace_ops(watched)
        hidden = torch.randn(sum(NEW), 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        layer(hidden, cache.extend(ids, NEW), *cache.of_layer(0))
    return calls


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    """Return a failure of every kind of op."""
    folder, by_kind = tmp_path_factory.mktemp("kept"), {}
    for kind, judged in made().items():
        file.write_call(folder, judged, ORIGIN)
        tensors = safetensors.torch.load_file(folder / file.NAME)
        with safetensors.safe_open(folder / file.NAME, framework="pt") as opened:
            by_kind[kind] = (json.loads(opened.metadata()[file.KEY]), tensors)
    assert by_kind.keys() == OPS.keys()
    return by_kind


# ---------------------------------------------------------------------------------------------- damage


def places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (holder, key) of every value in a tree."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], (dict, list)):
            yield from places(holder[key])


def damage_document(random: Random, document: dict[str, Any]) -> None:
    """Change a number a little, or replace, drop or exchange a value; most often in the call."""
    tree = document if random.random() < 0.1 else document["call"]
    holder, key = random.choice(list(places(tree)))
    value, how = holder[key], random.choice(("nudge", "nudge", "nudge", "replace", "drop", "exchange"))
    if how == "nudge" and type(value) in (int, float):
        holder[key] = random.choice((value + 1, value - 1, value * 2, value // 2, -value, 0, value + 16))
    elif how == "drop":
        del holder[key]
    elif how == "exchange":
        other, name = random.choice(list(places(tree)))
        holder[key], other[name] = copy.deepcopy((other[name], value))
    else:
        holder[key] = copy.deepcopy(random.choice(VALUES))


def damage_tensors(random: Random, tensors: dict[str, torch.Tensor]) -> None:
    """Give a tensor another dtype, shape or numbers, or drop it, or exchange it with another."""
    name, other = random.choice(sorted(tensors)), random.choice(sorted(tensors))
    tensor, how = tensors[name], random.choice(("dtype", "shape", "numbers", "numbers", "drop", "exchange"))
    if how == "dtype":
        tensors[name] = tensor.to(random.choice(OTHERS))
    elif how == "shape":
        turned = tensor.transpose(0, -1) if tensor.dim() else tensor[None]
        changed = (
            tensor.flatten(),
            tensor[None],
            turned,
            turned[:-1],
            turned[:0],
            torch.cat([turned, turned]),
        )
        tensors[name] = random.choice(changed).contiguous()
    elif how == "numbers" and tensor.dtype in INTEGERS and tensor.numel():
        place = random.randrange(tensor.numel())
        number = random.choice((-1, 0, 1, 2, 15, 16, 63, 160, 2**20, 2**31 - 1, -(2**31)))
        tensor.view(-1)[place] = (
            number if random.random() < 0.5 else int(tensor.view(-1)[place]) + random.choice((-1, 1))
        )
    elif how == "numbers":
        tensors[name] = torch.full_like(tensor, random.choice((0, 1, 100)))
    elif how == "exchange":
        tensors[name], tensors[other] = tensors[other], tensor
    else:
        del tensors[name]


def damage_bytes(random: Random, data: bytes) -> bytes:
    """Truncate a file, or change bytes, most often in its header."""
    if random.random() < 0.3:
        return data[: random.randrange(len(data))] + random.choice((b"", b"\0", b"x" * 999))
    changed = bytearray(data)
    for _ in range(random.randint(1, 3)):
        stop = random.choice((8, 8 + int.from_bytes(data[:8], "little"), len(data)))
        changed[random.randrange(stop)] = random.choice(
            (0, 255, *b'0123456789"[]{},:', random.randrange(256))
        )
    return bytes(changed)


def replace_file(random: Random, path: Path) -> None:
    """Put something in the place of the file that is no regular one, or that lies elsewhere."""
    what = random.choice(("fifo", "zero", "loop", "folder", "away"))
    content = path.read_bytes()
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "away":
        path.with_name("elsewhere").write_bytes(content)
        path.symlink_to("elsewhere")
    else:
        path.symlink_to("/dev/zero" if what == "zero" else path)


def damaged(random: Random, kept: dict[str, Kept], folder: Path) -> None:
    """Write a damaged failure into a folder."""
    document, tensors = copy.deepcopy(kept[random.choice(sorted(kept))])
    if random.random() < 0.05:
        tensors = copy.deepcopy(kept[random.choice(sorted(kept))][1])
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        if random.random() < 0.6 and document.get("call"):
            damage_document(random, document)
        elif tensors:
            damage_tensors(random, tensors)
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", file.KEY: json.dumps(document)}
    data = safetensors.torch.save(whole, metadata)
    data = damage_bytes(random, data) if random.random() < 0.25 else data
    (folder / file.NAME).write_bytes(data)
    if random.random() < 0.05:
        replace_file(random, folder / file.NAME)


# ---------------------------------------------------------------------------------------------- judgement


@pytest.fixture
def replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[Path], None]], int]:
    """Return a function that replays what another one writes into a folder, and returns the exit code."""
    available, number = host.memory_available, itertools.count()
    monkeypatch.setattr(host, "memory_available", lambda: min(ROOM, available() or ROOM))
    monkeypatch.chdir(tmp_path)

    def replay(write: Callable[[Path], None]) -> int:
        folder = Path(f"kept-{next(number)}")
        folder.mkdir()
        write(folder)
        capsys.readouterr()
        faulthandler.dump_traceback_later(HUNG, exit=True, file=2)
        code = main(["replay", str(folder)])
        faulthandler.cancel_dump_traceback_later()
        out, err = capsys.readouterr()
        assert code in (0, 2, 3, 4)
        assert "Traceback" not in err
        assert "shows the traceback" not in err  # of an error that nobody has foreseen
        said = out if code in (0, 4) else err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code in (2, 3)), err
        assert said.endswith("\n")
        return code

    return replay


def test_an_undamaged_failure_of_every_kind_is_replayed(
    kept: dict[str, Kept], replay: Callable[[Callable[[Path], None]], int]
) -> None:
    for document, tensors in kept.values():
        metadata = {file.KEY: json.dumps(document)}
        data = safetensors.torch.save(tensors, metadata)
        assert replay(lambda folder, data=data: (folder / file.NAME).write_bytes(data)) == 0  # type: ignore[misc]


@pytest.fixture
def attempt(kept: dict[str, Kept], replay: Callable[[Callable[[Path], None]], int]) -> Callable[[int], int]:
    """Return a function that damages and replays a failure; an example shows no tensors."""
    return lambda seed: replay(lambda folder: damaged(Random(seed), kept, folder))


@settings.get_profile("fuzz")
@given(seed=st.integers(0, 2**64))
def test_a_damaged_failure_is_replayed_or_refused(attempt: Callable[[int], int], seed: int) -> None:
    event(f"exit code {attempt(seed)}")
