"""Questions about the device and its stack: driver, sensors, the precision of fp32 products, flushes."""

from __future__ import annotations

import os
import statistics
from typing import TYPE_CHECKING

from benchmarks.gpu.questions.asking import Asked, device_module, question, raised

if TYPE_CHECKING:
    from mla_backends.api import Backend

# A product of fp32 numbers has a relative error of about 1e-7 in fp32 and of 3e-4 in TF32.
TF32_ERROR = 3e-5
_OVERRIDES = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "MUSA_ALLOW_TF32")


@question("driver", "Which driver is there, and what do the sensors say without special permissions?")
def driver(backend: Backend) -> Asked:
    readings: dict[str, str] = {}
    failure = raised(lambda: readings.update(backend.sensors()))
    facts = {key: value for key, value in backend.environment().items() if "driver" in key or "cuda" in key}
    said = f"{len(readings)} readings: {', '.join(sorted(readings))}" if readings else "no readings"
    return Asked(failure or said, {**facts, **readings})


@question("tf32", "Are fp32 products computed in fp32 once the backend is set up?")
def tf32(backend: Backend) -> Asked:
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    got = (a.to(backend.device) @ b.to(backend.device)).cpu().double()
    exact = a.double() @ b.double()
    error = float((got - exact).norm() / exact.norm())
    flags = {
        "torch.backends.cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **{name: os.environ[name] for name in _OVERRIDES if name in os.environ},
    }
    rounded = error > TF32_ERROR
    said = "no, their precision is that of TF32" if rounded else "yes"
    return Asked(said, {"relative error": f"{error:.1e}", **flags}, wrong=rounded)


@question("l2-flush", "Does the flush before a cold forward really empty the last-level cache?")
def l2_flush(backend: Backend) -> Asked:
    import torch

    from mla.bench.measure.passes import CacheFlush

    device_module(backend)
    timer = backend.device_timer()
    assert timer is not None
    flush, cache = CacheFlush(backend), backend.device_info().cache_bytes or 32 << 20
    data = torch.ones(cache // 4 // 4, device=backend.device)  # a quarter of the cache

    def read(flushed: bool) -> float:
        times = []
        for _ in range(15):
            data.sum()
            if flushed:
                flush()
            timer.start()
            data.sum()
            times.append(timer.stop() * 1e3)
        return round(statistics.median(times), 2)

    read(False)
    warm, cold = read(False), read(True)
    said = f"reading {data.nbytes >> 20} MiB takes {cold / warm:.2f} times as long after it"
    return Asked(said, {"warm us": warm, "after the flush us": cold, "flushed MiB": flush.bytes >> 20})
