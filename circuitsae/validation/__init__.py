"""Whether a graph's claims hold when one intervenes."""

from circuitsae.validation.edges import Validation, validate
from circuitsae.validation.statistics import Agreement, agreement

__all__ = ["Agreement", "Validation", "agreement", "validate"]
