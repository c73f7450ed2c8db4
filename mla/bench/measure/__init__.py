"""Samples: warm-up, passes, ways of timing, and the statistics of them."""
