"""How much of a prompt's graph is asked for, and what in it answers a change."""

from dataclasses import dataclass
from typing import Literal, get_args

from circuitsae.attribution.device_sweep import ProductPrecision
from transcoders.errors import InputError

Response = Literal["frozen", "linear"]
"""How attention patterns and norm scales take a change: not at all, or as their derivative says."""
Errors = Literal["held", "linear"]
"""How what dictionaries leave of an MLP takes a change: not at all, or as the derivative of both says."""


@dataclass(frozen=True)
class Limits:
    """How much is asked for; the fields are `attribute`'s."""

    max_features: int | None
    unexplained: float | None
    edges_per_node: int | None
    batch_size: int | Literal["auto"]
    precision: ProductPrecision | None
    response: Response | None
    errors: Errors

    def __post_init__(self) -> None:
        if self.errors not in get_args(Errors):
            raise InputError(f"Unknown errors {self.errors!r}; give {' or '.join(map(repr, get_args(Errors)))}.")
        if self.errors == "linear" and self.unexplained is not None:
            raise InputError(
                "errors='linear' does not go with unexplained, which leaves features without a row; give max_features."
            )
        if self.response not in (None, *get_args(Response)):
            raise InputError(f"Unknown response {self.response!r}; give {' or '.join(map(repr, get_args(Response)))}.")
        if self.precision not in (None, *get_args(ProductPrecision)):
            raise InputError(
                f"Unknown precision {self.precision!r}; give {' or '.join(map(repr, get_args(ProductPrecision)))}."
            )
        if self.precision == "tf32" and self.unexplained is not None:
            raise InputError("precision='tf32' does not go with unexplained; leave one of them out.")
        for name in ("max_features", "edges_per_node", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise InputError(f"{name}={value} leaves nothing to compute; give at least 1.")
        if self.unexplained is not None and not 0 <= self.unexplained < 1:
            raise InputError(
                f"unexplained={self.unexplained} is not a share of the influence; give a number from 0 to below 1."
            )
