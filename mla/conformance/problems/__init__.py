"""Inputs that the checks share, and the right results for them."""
