"""How many prompts, circuits and resamples an audit takes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of an audit; `Settings.quick()` is for minutes on two cores."""

    held_out: int = 200
    """Prompts on which the circuit is judged."""
    few: int = 50
    """Prompts of measurements that take many circuits."""
    random: int = 100
    """Random circuits."""
    resamples: int = 20
    """Times that circuits are found anew on other prompts."""
    many: int = 2000
    """Prompts drawn from the templates, for the worst of them."""
    seed: int = 0

    @classmethod
    def quick(cls, seed: int = 0, *, large: bool = False) -> "Settings":
        """Fewer of everything; of a `large` model, a run of which takes long, fewer still."""
        if large:
            return cls(held_out=24, few=6, random=10, resamples=4, many=60, seed=seed)
        return cls(held_out=100, few=24, random=30, resamples=8, many=500, seed=seed)
