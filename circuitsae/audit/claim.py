"""What is claimed of a circuit: a file that its author writes before it is audited.

Criteria of the family `claim` ask whether it is there and can be used, never whether it is true; `external` tests its
predictions. The keys of the file are described in `claims/schema.json`, beside examples for the pocket model.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match

from transcoders.errors import FileFormatError

SCHEMA = Path(__file__).parent / "claims" / "schema.json"
Level = Literal["behaviour", "algorithm", "implementation"]


@dataclass(frozen=True, kw_only=True)
class Expect:
    """Where the metric goes, and how far: a share of what ablating everything takes away from it."""

    metric: Literal["falls", "rises", "stays"]
    at_least: float | None = None
    at_most: float | None = None

    def range(self) -> tuple[float, float]:
        """The least and the largest change of f, that of the whole model being 1, that is expected."""
        least, most = self.at_least or 0.0, float("inf") if self.at_most is None else self.at_most
        match self.metric:
            case "falls":
                return -most, -least
            case "rises":
                return least, most
            case "stays":
                return -most, most

    def __str__(self) -> str:
        bounds = [
            ("by at least ", self.at_least),
            ("within " if self.metric == "stays" else "by at most ", self.at_most),
        ]
        said = " and ".join(f"{word}{value:g}" for word, value in bounds if value is not None)
        return " ".join(filter(None, (self.metric, said)))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One change of the model, and what it is expected to do."""

    change: Literal["ablate", "scale", "keep"]
    expect: Expect
    role: str = ""
    units: tuple[str, ...] = ()
    dose: float = 0.5
    """For `scale`."""
    on: str = ""
    """Another task; the circuit's own unless named."""

    def __str__(self) -> str:
        what = self.role or ", ".join(self.units) or "the circuit"
        done = {"ablate": "ablated", "scale": f"scaled by {self.dose:g}", "keep": "alone"}[self.change]
        return f"{what} {done}{f' on {self.on}' if self.on else ''}: the metric {self.expect}"


@dataclass(frozen=True, kw_only=True)
class Interpretation:
    """What a role is said to do, and who says so."""

    role: str
    does: str
    by: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed of a circuit, and what would refute it."""

    claim: str
    level: Level | None = None
    units: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Roles and the names of their members; none: those that are found by behaviour."""
    refuted_by: tuple[str, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    extends_to: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    interpretation: tuple[Interpretation, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> "Claim":
        """Read a claim file, TOML by its name or else JSON. Raises `FileFormatError` for one that it cannot use."""
        read = tomllib.loads if Path(path).suffix.lower() == ".toml" else json.loads
        try:
            record = read(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileFormatError(
                f"{path} is no claim file ({type(error).__name__}: {error}); give one in TOML or JSON."
            ) from error
        return cls.from_json(record, where=str(path))

    @classmethod
    def from_json(cls, record: Any, *, where: str = "The claim") -> "Claim":
        """From the values of a claim file. Raises `FileFormatError` for a key or a value that it cannot have."""
        error = best_match(_schema().iter_errors(record))
        if error is not None:
            raise FileFormatError(f"{where} cannot be read ({_said(error)}); {_hint(error)}")
        own = dict(record)
        own["units"] = {
            role: () if members == "found" else tuple(members) for role, members in own.get("units", {}).items()
        }
        for name in ("refuted_by", "extends_to", "models"):
            own[name] = tuple(own.get(name, ()))
        own["interpretation"] = tuple(Interpretation(**each) for each in own.get("interpretation", ()))
        own["predictions"] = tuple(_prediction(each, own["units"], where) for each in own.get("predictions", ()))
        return cls(**own)


def _prediction(record: Mapping[str, Any], roles: Mapping[str, Any], where: str) -> Prediction:
    made = Prediction(**{**record, "units": tuple(record.get("units", ())), "expect": Expect(**record["expect"])})
    if made.role and made.units:
        raise FileFormatError(f"{where}: a prediction names the role {made.role!r} and units; name one of them.")
    if made.role and made.role not in roles:
        raise FileFormatError(f"{where}: a prediction is about the role {made.role!r}; list it under units.")
    least, most = made.expect.range()
    if most < least or (made.expect.metric == "stays" and (made.expect.at_most is None or made.expect.at_least)):
        raise FileFormatError(
            f"{where}: nothing can be tested of {str(made)!r}; falls and rises take at_least, at most at_most, and "
            "stays takes at_most alone."
        )
    if ("dose" in record) != (made.change == "scale"):
        raise FileFormatError(f"{where}: {str(made)!r} must have a dose if, and only if, its change is 'scale'.")
    return made


@cache
def _schema() -> Draft202012Validator:
    return Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _said(error: ValidationError) -> str:
    place = ".".join(map(str, error.absolute_path))
    said = error.message if len(error.message) <= 200 else f"{error.message[:200]} …"
    return f"{place}: {said}" if place else said


def _hint(error: ValidationError) -> str:
    """What was meant by a key that there is not."""
    schema: Any = error.schema
    known = list(schema.get("properties", ())) if isinstance(schema, Mapping) else []
    if error.validator != "additionalProperties" or not isinstance(error.instance, Mapping):
        return f"{SCHEMA.name} in circuitsae/audit/claims says what it may hold."
    unknown = next(key for key in error.instance if key not in known)
    near = get_close_matches(unknown, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(known)}."
