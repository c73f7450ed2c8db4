"""Benchmark fixtures: the layer, a stack of layers, one op, `transformers`."""
