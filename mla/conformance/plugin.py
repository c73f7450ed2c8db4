"""Nothing: an installation of before names this module as a plugin of pytest."""
