"""Why a backend is or is not usable."""
