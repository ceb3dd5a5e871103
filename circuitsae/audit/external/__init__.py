"""How far the circuit holds beyond where it was found."""
