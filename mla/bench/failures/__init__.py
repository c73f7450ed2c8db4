"""What `--dump-failure` does when an implementation turns out wrong: find the op, and keep its call."""
