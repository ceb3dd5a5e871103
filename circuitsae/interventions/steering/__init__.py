"""Steering: a feature, a group of them or a direction pushed with many strengths, and what that does besides.

`directions` is what one pushes, `sweep` measures, `report` holds what was measured, says which strengths break the
model and recommends one or none, `page` draws it.
"""

from circuitsae.interventions.steering.directions import Direction, SteeringDirection, difference_of_prompts
from circuitsae.interventions.steering.report import Limits, SteeringReport
from circuitsae.interventions.steering.sweep import STRENGTHS, steer

__all__ = ["STRENGTHS", "Direction", "Limits", "SteeringDirection", "SteeringReport", "difference_of_prompts", "steer"]
