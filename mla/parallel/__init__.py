"""One MLA layer over several ranks of `torch.distributed`: heads, tokens of the context, or requests."""
