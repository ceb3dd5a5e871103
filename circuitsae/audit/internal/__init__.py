"""Whether the circuit causes the behaviour."""
