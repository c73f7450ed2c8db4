"""The layer: its math on torch, how a step is planned, and which op runs where."""
