"""What is collected of each feature, and how much of it."""

from dataclasses import dataclass

from transcoders.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What is collected of each feature."""

    tokens: int = 1_000_000
    """Tokens to read; fewer where the corpus ends before."""
    context: int = 128
    """Tokens of a row, at most the model's context; the first of each row has no features."""
    top: int = 10
    """Strongest examples."""
    strata: int = 4
    """Parts of the range of activations to sample examples from; a power of two, at most 32."""
    per_stratum: int = 2
    """Examples of each."""
    before: int = 12
    """Tokens of an example before the one it is of."""
    after: int = 4
    """And after it."""
    logits: int = 10
    """Tokens whose logits it raises most, and lowers most."""
    neighbours: int = 10
    """Features that fire on the same tokens, and as many that write in the same direction."""
    connections: int = 5
    """Features that add most to it, and to which it adds most (TWERA); 0 for none. Of transcoders."""
    seed: int = 0
    """Of the samples."""
    save_every: int = 100_000
    """Tokens between two saves of the state that a killed run goes on from."""

    def __post_init__(self) -> None:
        least = {"tokens": 1, "context": 2, "top": 1, "per_stratum": 1, "before": 0, "after": 0, "logits": 1,
                 "neighbours": 1, "connections": 0, "seed": 0, "save_every": 1}  # fmt: skip
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise InputError(f"{name} = {getattr(self, name)} is too small; give {smallest} or more.")
        if self.strata not in (1, 2, 4, 8, 16, 32):
            raise InputError(f"strata = {self.strata} does not halve; give 1, 2, 4, 8, 16 or 32.")
