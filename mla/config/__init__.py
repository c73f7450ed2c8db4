"""The numbers that define one MLA layer, how model families spell them, and presets."""

from mla.config.layer_config import DIMENSIONS, LongRopeScaling, MLAConfig, QueryScaling, YarnScaling

__all__ = ["DIMENSIONS", "LongRopeScaling", "MLAConfig", "QueryScaling", "YarnScaling"]
