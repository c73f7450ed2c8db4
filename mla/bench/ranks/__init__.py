"""A run over several ranks: rank 0 measures as it would one device, and the others do what it says.

So nothing that is decided by looking at a clock (warm-ups, budgets, passes) has to be agreed on.
"""
