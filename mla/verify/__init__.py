"""When a result is right: float64 oracles, tolerances, verdicts."""
