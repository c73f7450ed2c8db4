"""`new-backend`: the project that a new backend starts from."""
