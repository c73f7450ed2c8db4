"""The report of a run: its schema, what it covered, and the card that is printed from it."""

from mla.conformance.report.card import card, summary
from mla.conformance.report.schema import (
    SCHEMA_VERSION,
    Cases,
    CheckedBackend,
    CheckResult,
    ConformanceReport,
    ConformanceReportError,
    Coverage,
    Failure,
    Refusal,
    Slow,
    Status,
    decode,
    write,
)

__all__ = [
    "SCHEMA_VERSION",
    "Cases",
    "CheckResult",
    "CheckedBackend",
    "ConformanceReport",
    "ConformanceReportError",
    "Coverage",
    "Failure",
    "Refusal",
    "Slow",
    "Status",
    "card",
    "decode",
    "summary",
    "write",
]
