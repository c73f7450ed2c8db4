"""The loop over scenarios, and what may end it early."""
