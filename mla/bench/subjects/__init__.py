"""What can be timed: the layer, a stack of layers, one op, `transformers`."""
