"""What ranks are forked from."""

from ranks_of_a_run import start_ranks

__all__ = ["start_ranks"]
