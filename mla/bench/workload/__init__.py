"""Scenarios, grids over them, and the workloads that are shipped."""
