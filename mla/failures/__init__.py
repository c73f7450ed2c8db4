"""The first failure, kept: one call of an op with its operands as they lay in memory, to call it again."""
