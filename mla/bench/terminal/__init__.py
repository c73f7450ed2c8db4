"""How runs, comparisons and limits are printed."""
