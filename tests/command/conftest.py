"""Tasks of a launcher."""

from launch_variables import launched

__all__ = ["launched"]
