"""Steering: a feature, a group of them or a direction pushed with many strengths, and what that does besides.

`handles` is what one pushes, `settings` says which strengths count as breaking the model, `sweep` measures, `report`
holds what was measured and recommends a strength or none, `page` draws it.
"""

from circuitsae.interventions.steering.handles import Direction, Handle, difference_of_prompts
from circuitsae.interventions.steering.report import SteeringReport
from circuitsae.interventions.steering.settings import Limits
from circuitsae.interventions.steering.sweep import STRENGTHS, steer

__all__ = ["STRENGTHS", "Direction", "Handle", "Limits", "SteeringReport", "difference_of_prompts", "steer"]
