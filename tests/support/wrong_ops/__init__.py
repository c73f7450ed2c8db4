"""Projections, norms, rotations and cache writes that are wrong in one way: the ways in which kernels fail.

Each function returns a new op; its arguments are the numbers that a real bug might have had.
"""
