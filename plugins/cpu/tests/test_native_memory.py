"""The kernels touch nothing beside their arguments, do nothing undefined, and survive a lack of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from native_cases import BF16, any_bits, bits, levels_here, load

from mla_backend_cpu import compilation, products
from mla_backend_cpu.library import Library
from mla_backend_cpu.native_ops import CACHE_BYTES, pages

# The checks do not see what the tile instructions of AMX touch; the emulation is checked instead.
UNTILED = next(name for name in levels_here() if name != "amx")


@pytest.mark.parametrize("name", dict.fromkeys(("portable", UNTILED, compilation.EMULATED)))
def test_the_sanitizers_find_nothing(tmp_path: Path, name: str) -> None:
    """Ragged, page-boundary and poisoned cases stay within memory that is just large enough."""
    (level,), program = compilation.levels(name), tmp_path / "driver"
    flags = [flag for flag in compilation.FLAGS if flag not in ("-O3", "-fPIC", "-fvisibility=hidden")]
    checks = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    driver = Path(__file__).with_name("native_driver.cpp")
    built = subprocess.run(
        ["g++", *flags, *checks, *level.flags, f"-I{compilation.SOURCES}", str(driver), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    # GCC 12 aligns vectors in such frames to 32 bytes, and reads them as if to 64.
    quiet = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run([str(program)], env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" cases, 0 wrong\n")


#: Each op at its first call, in a process that may take one more MiB, and then as much as it likes.
SHORT = """if True:
    import pathlib, resource, sys
    import torch
    from native_cases import BF16, expanded_case, latent_case, load
    from mla_backend_cpu.native_ops import NativeExpandedAttention, NativeLatentAttention
    from mla_backend_cpu.native_ops import NativeBatchedLinear, NativeLinear
    from mla_backend_cpu.sparse_ops import NativeSelectLatents, NativeSparseAttention

    torch.set_num_threads(2)
    kernels = load(sys.argv[1])
    fp32 = torch.float32

    def product(op, dtype, *shape, **more):
        op, inputs = op(kernels), shape[-1]
        packed = op.pack(torch.ones(*shape[1:-1], 64, inputs, dtype=dtype))
        x, out = torch.ones(shape, dtype=dtype), torch.zeros(*shape[:-1], 64, dtype=dtype)
        return out, lambda: op(packed, x=x, out=out, **more)

    def attention(op, case, batch, width, **more):
        op, (rows, heads, _) = op(kernels), case.q.shape
        given = {"q": case.q, "softmax_scale": 0.1, "lse": torch.empty(rows, heads), **more}
        out, state = torch.zeros(rows, heads, width, dtype=BF16), op.prepare(case.spec, batch)
        return out, lambda: op(state, out=out, **given)

    def select(keys, most):
        case, tokens = latent_case([8], [keys], latent=32, rotary=0), 8
        tables = dict(block_table=case.table, kv_lens=case.view().kv_lens_device, cu_q=case.view().cu_q)
        q, weights = torch.ones(tokens, 1, 32, dtype=BF16), torch.ones(tokens, 1)
        out, op = torch.zeros(tokens, most, dtype=torch.int32), NativeSelectLatents(kernels)
        return out, lambda: op(None, q=q, weights=weights, cache=case.cache, **tables, out=out)

    product(NativeLinear, BF16, 32, 256, bias=None)[1]()  # its threads are there from now on
    latent = latent_case([1, 4], [400, 9], latent=1 << 15)
    expanded = expanded_case([1, 4], [20, 9], value=1 << 17)
    view, wide = latent.view(), latent_case([1], [40], 40, latent=1 << 15)
    calls = {  # each product keeps more than the one before
        "linear": product(NativeLinear, BF16, 512, 1 << 11, bias=None),
        "linear, fp32": product(NativeLinear, fp32, 512, 1 << 12, bias=None),
        "batched": product(NativeBatchedLinear, BF16, 256, 2, 1 << 14),
        "batched, fp32": product(NativeBatchedLinear, fp32, 256, 2, 1 << 15),
        "latent": attention(
            NativeLatentAttention, latent, view, 1 << 15, cache=latent.cache, block_table=latent.table,
            kv_lens=view.kv_lens_device, cu_q=view.cu_q,
        ),
        "expanded": attention(
            NativeExpandedAttention, expanded, expanded.lengths, 1 << 17, k=expanded.k, v=expanded.v
        ),
        "select": select(20_000, 9_000),
        "sparse": attention(
            NativeSparseAttention, wide, wide.view(), 1 << 15, cache=wide.cache, block_table=wide.table,
            kv_lens=wide.view().kv_lens_device, cu_q=wide.view().cu_q,
            selection=torch.arange(0, 40, 2, dtype=torch.int32)[None],
        ),
    }
    for name, (out, call) in calls.items():
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), before[1]))
        try:
            call()
        except MemoryError as error:
            print(name, "-", error)
        resource.setrlimit(resource.RLIMIT_AS, before)
        call()
        assert (out == out.flatten()[0]).all() if out.shape[-1] == 64 else out.any(-1).all(), name
"""


@pytest.mark.parametrize("name", dict.fromkeys((UNTILED, compilation.EMULATED)))
def test_a_lack_of_memory_is_an_error_and_no_end(name: str) -> None:
    # What is allocated comes from the system, and not from what others have freed.
    variables = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", SHORT, name],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    why = "out of memory: there is none left for what the kernel keeps while it computes."
    names = ["linear", "linear, fp32", "batched", "batched, fp32", "latent", "expanded", "select", "sparse"]
    if name == "avx512_bf16" and products.widening_gain(load(name)) <= 1:  # they read rows as they are
        names = [call for call in names if call not in ("linear", "batched")]
    assert done.stdout.splitlines() == [f"{call} - {why}" for call in names], done.stderr
    assert done.returncode == 0, done.stderr


def test_a_large_cache_is_put_on_huge_pages_once_and_keeps_its_bytes() -> None:
    """The system may refuse, which changes nothing; so what is asked of it is what is checked."""
    kernels = load(UNTILED)
    asked: list[tuple[int, int]] = []

    def move(address: int, size: int) -> None:
        asked.append((address, size))
        kernels.functions.mla_huge_pages(address, size)

    watched = Library(kernels.level, kernels.functions)
    watched.functions = SimpleNamespace(mla_huge_pages=move)  # type: ignore[assignment]
    numbers = any_bits(CACHE_BYTES // (64 * 128 * 2), 64, 128, seed=1)
    memory, before = numbers.view(torch.int16).numpy(), bits(numbers)
    for life in (1, 2):  # a cache may get the memory of one that is gone
        cache = torch.from_numpy(memory).view(BF16)
        for part in (cache, cache.view(-1, 64, 128), cache[1:]):  # what is left is too small
            assert pages(watched, part, False, 128) is part
        assert asked == life * [(cache.data_ptr(), CACHE_BYTES)]
    assert torch.equal(bits(cache), before)
