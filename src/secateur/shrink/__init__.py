"""Shrinking: a plan applied to weights and configuration, as pure tensor maths; nothing is zeroed, rows go."""

from secateur.shrink.apply import check_plan, kept_channels, shrink_config, shrink_generation_config, shrink_parameters

__all__ = ["check_plan", "kept_channels", "shrink_config", "shrink_generation_config", "shrink_parameters"]
