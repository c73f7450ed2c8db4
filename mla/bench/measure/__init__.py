"""Timing: variants, warm-up, passes, samples and their statistics."""
