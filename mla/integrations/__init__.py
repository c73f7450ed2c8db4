"""Ways to use this project's ops from other frameworks."""
