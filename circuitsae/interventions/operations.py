"""What is done to a target's value. Every operation is affine: `v ← αv + β`, so that any number of them compose.

| operation                  | α      | β                                                        |
|----------------------------|--------|----------------------------------------------------------|
| `Zero`                     | 0      | 0                                                        |
| `Scale(factor)`            | factor | 0                                                        |
| `Set(value)`               | 0      | value                                                    |
| `Add(value)`               | 1      | value                                                    |
| `Mean(means)`              | 0      | mean over other prompts (template and role, or corpus)   |
| `Patch(source)`            | 0      | the value in another prompt                              |
| `Resample(prompts, seed)`  | 0      | the value in another prompt, drawn at random             |
| `Replace(by)`              | 0      | 0; and `by` is set to the feature's clean activation     |
| `ReplaceToken(token)`      | 0      | the embedding of another token                           |
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from circuitsae.interventions.means import Means
from circuitsae.interventions.prompts import PromptLike
from circuitsae.interventions.targets import Feature, Places, Target, target_id

Value = float | Float[Tensor, "*n"]


@dataclass(frozen=True)
class Zero:
    """Remove it."""


@dataclass(frozen=True)
class Scale:
    """Multiply it."""

    factor: float


@dataclass(frozen=True, eq=False)
class Set:
    """Put a value in its place: a number for a feature, for others a vector, or one for each chosen position."""

    value: Value


@dataclass(frozen=True, eq=False)
class Add:
    """Add a value; shapes as in `Set`."""

    value: Value


@dataclass(frozen=True, eq=False)
class Mean:
    """Put its mean over other prompts in its place."""

    means: Means


@dataclass(frozen=True, eq=False)
class Patch:
    """Put its value in another prompt in its place.

    Read there at the same position, at the position of the same role where the target names roles, or `at`.
    """

    source: PromptLike
    at: Places = None


@dataclass(frozen=True, eq=False)
class Resample:
    """Put its value in a prompt drawn from `prompts` in its place; a prompt never draws itself.

    What is drawn depends on the seed and the prompt intervened on only: all that is resampled in one run from the same
    set with the same seed comes from one prompt.
    """

    prompts: Sequence[PromptLike]
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Replace:
    """Features only: this one off, and at the same positions another one set to this one's clean activation."""

    by: Feature
    value: Value | None = None
    """Set the other feature to this instead."""


@dataclass(frozen=True)
class ReplaceToken:
    """Tokens only: another token's embedding, by its text (one token, mind the leading space) or id."""

    token: str | int


Operation = Zero | Scale | Set | Add | Mean | Patch | Resample | Replace | ReplaceToken


@dataclass(frozen=True)
class Intervention:
    """One change of one target. A list of them is one alternative: all made in the same run, in their order."""

    target: Target
    operation: Operation

    def __str__(self) -> str:
        match self.operation:
            case Scale(factor):
                done = f"scale {factor:g}"
            case Set(value) | Add(value):
                shown = f"{value:g}" if isinstance(value, int | float) else f"a vector of {value.shape[-1]}"
                done = f"{type(self.operation).__name__.lower()} {shown}"
            case Replace(by):
                done = f"replace by {target_id(by)}"
            case ReplaceToken(token):
                done = f"replace by {token!r}"
            case other:
                done = type(other).__name__.lower()
        return f"{target_id(self.target)} {done}"
