"""Checks of projections, norm, rotation and cache write: what they compute, and where kernels fail."""
