"""The schema of result files, and their comparison."""

from mla.bench.results.facts import backend_facts
from mla.bench.results.file import content, decode, decoded, encode, read, write
from mla.bench.results.schema import (
    SCHEMA_VERSION,
    Agreement,
    BackendFacts,
    Case,
    Ceiling,
    Cost,
    Latency,
    Memory,
    NewLengths,
    Plan,
    Planned,
    Roofline,
    Run,
    Stage,
    Throughput,
    Timing,
)
from mla.verify.verdict import Check

__all__ = [
    "SCHEMA_VERSION",
    "Agreement",
    "BackendFacts",
    "Case",
    "Ceiling",
    "Check",
    "Cost",
    "Latency",
    "Memory",
    "NewLengths",
    "Plan",
    "Planned",
    "Roofline",
    "Run",
    "Stage",
    "Throughput",
    "Timing",
    "backend_facts",
    "content",
    "decode",
    "decoded",
    "encode",
    "read",
    "write",
]
