"""The device's limits, and how near a latency comes to them."""
