"""Changing what a node writes, in one of three regimes, and reading what follows."""

from circuitsae.interventions.changes import Change, node_change, random_change
from circuitsae.interventions.regimes import Regime, reads_after

__all__ = ["Change", "Regime", "node_change", "random_change", "reads_after"]
