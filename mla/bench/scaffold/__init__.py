"""`new-backend`: the project a new backend starts from."""
