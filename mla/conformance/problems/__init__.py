"""Inputs, and what is right for them, that the checks share."""
