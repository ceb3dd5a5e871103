"""How well the evidence is measured."""
