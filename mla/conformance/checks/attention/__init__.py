"""Checks of `latent_attention` and `expanded_attention`, in rooms by why kernels fail (`registry.KINDS`)."""
