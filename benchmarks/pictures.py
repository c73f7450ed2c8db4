"""Draw the pictures of docs/gallery.md from committed results: `python -m benchmarks.pictures`."""

from __future__ import annotations

from pathlib import Path

from mla.bench import results
from mla.bench.report import page

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FOLDER = ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures"
ZEN4, ZEN5 = "cpu-epyc-zen4-avx512-bf16-2vcpu", "cpu-epyc-zen5-avx512-bf16-2vcpu"
# What the pictures of a result file are called here, the file, and those that are taken.
TAKEN = {
    "zen5-lite": (f"{ZEN5}-deepseek-v2-lite", ["decode-latency", "prefill-latency"]),
    "zen4-lite": (f"{ZEN4}-deepseek-v2-lite", ["roofline"]),
    "zen4-scaling": (f"scaling-{ZEN4}-deepseek-v2-lite-threads2", ["by-batch-latency"]),
}


def render() -> dict[str, str]:
    """Return every picture of the gallery by the name of its file, which ends in -light.svg or -dark.svg."""
    made: dict[str, str] = {}
    for short, (name, taken) in TAKEN.items():
        path = RESULTS / f"{name}.json"
        every = page.pictures([path.name], [results.read(path)])
        made |= {
            f"{short}-{part}-{mode}.svg": every[f"{part}-{mode}.svg"]
            for part in taken
            for mode in ("light", "dark")
        }
    return made


if __name__ == "__main__":
    page.write_pictures(render(), FOLDER)
