"""Draw the pictures of docs/gallery.md from committed results: `python -m benchmarks.pictures`."""

from __future__ import annotations

from pathlib import Path

from mla.bench import results
from mla.bench.report import pictures

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FOLDER = ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures"
ZEN4, ZEN5 = "cpu-epyc-zen4-avx512-bf16-2vcpu", "cpu-epyc-zen5-avx512-bf16-2vcpu"
# What the pictures of a result file are called here, the file, and those taken from sections of its report.
TAKEN = {
    "zen5-lite": (
        f"{ZEN5}-deepseek-v2-lite",
        {"scenarios": ["decode-latency", "prefill-latency"], "samples": ["decode-samples"]},
    ),
    "zen4-lite": (
        f"{ZEN4}-deepseek-v2-lite",
        {"roofline": ["roofline"], "stages": ["decode-stages"]},
    ),
    "zen4-scaling": (f"scaling-{ZEN4}-deepseek-v2-lite-threads2", {"grid": ["by-batch-latency"]}),
}


def render() -> dict[str, str]:
    """Return every picture of the gallery by the name of its file, which ends in -light.svg or -dark.svg."""
    made: dict[str, str] = {}
    for short, (name, taken) in TAKEN.items():
        path = RESULTS / f"{name}.json"
        every = pictures.render([path.name], [results.read(path)], only=taken)
        names = [f"{one}-{mode}.svg" for part in taken.values() for one in part for mode in ("light", "dark")]
        made |= {f"{short}-{one}": every[one] for one in names}
    return made


if __name__ == "__main__":
    pictures.write(render(), FOLDER)
