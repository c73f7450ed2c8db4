"""One op of the contract without the layer."""
