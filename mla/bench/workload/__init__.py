"""Scenarios, grids over them, and the shipped workloads."""
