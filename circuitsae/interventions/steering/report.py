"""What steering did: one row per strength, which of them break the model, and the strength to use, or none."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd
import plotly.graph_objects as go

from circuitsae.interventions.steering.page import figure, page
from circuitsae.report.beside import ways_from
from circuitsae.report.notebook import framed
from transcoders.errors import InputError
from transcoders.files import write_file

FORMAT = "circuitsae-steering/1"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A strength breaks the model where any of these is passed; such a strength is never recommended."""

    loss: float = 0.1
    """The loss on unrelated text rises by more than this share of the clean model's."""
    kl: float = 0.5
    """The mean KL(clean ‖ steered) on unrelated text is more than this, in nats per token."""
    distinct: float = 0.5
    """Of three tokens in a row, continuations have fewer distinct ones than this share of the clean model's."""

    def __post_init__(self) -> None:
        if self.loss < 0 or self.kl < 0 or not 0 <= self.distinct <= 1:
            raise InputError(f"{self} are no limits; give loss and kl from 0 on, and distinct from 0 to 1.")

    def passed(
        self, *, clean_loss: float, loss_rise: float | None, kl: float | None, distinct: float, clean_distinct: float
    ) -> str:
        """What was passed, in words; empty if nothing was. What is None was not measured."""
        reasons = []
        if loss_rise is not None and not loss_rise <= self.loss * clean_loss:  # NaN breaks too
            reasons.append(f"loss on unrelated text {loss_rise:+.3f}, limit {self.loss * clean_loss:+.3f}")
        if kl is not None and not kl <= self.kl:
            reasons.append(f"KL on unrelated text {kl:.3f}, limit {self.kl:g}")
        if distinct < self.distinct * clean_distinct:
            reasons.append(f"continuations repeat: {distinct:.0%} distinct trigrams, clean {clean_distinct:.0%}")
        return "; ".join(reasons)


def distinct_trigrams(rows: Sequence[Sequence[int]]) -> float:
    """Share of distinct ones among the trigrams within each row, mean over the rows; 1 for rows too short for any."""
    shares = []
    for row in rows:
        grams = [tuple(row[i : i + 3]) for i in range(len(row) - 2)]
        shares.append(len(set(grams)) / len(grams) if grams else 1.0)
    return sum(shares) / len(shares) if shares else 1.0


def tabulate(
    effects: pd.DataFrame, side: pd.DataFrame, written: pd.DataFrame, *, clean_loss: float, limits: Limits
) -> pd.DataFrame:
    """One row per strength; see `SteeringReport.table`."""
    clean_distinct = distinct_trigrams(written[written.strength.isna()].tokens.tolist())
    rows = []
    for strength in sorted(effects.strength.unique()):
        here = _where(effects, effects.strength == strength)
        own, others = _where(here, here.control < 0), _where(here, here.control >= 0)
        by_control = others.groupby(["set", "control"]).effect.mean().abs()
        around = _where(side, side.strength == strength)
        mine, theirs = (_where(around, side_of).mean() for side_of in (around.control < 0, around.control >= 0))
        distinct = distinct_trigrams(written[written.strength == strength].tokens.tolist())
        row: dict[str, Any] = {"strength": strength}
        for name, short in (("prompts", ""), ("held_out", "held_out_")):
            found = own.effect[own.set == name]  # empty, and its figures NaN, where no such prompts were given
            row[f"{short}effect"], row[f"{short}std"] = found.mean(), found.std(ddof=0)
            row[f"{short}up"] = (found > 0).mean()
            row[f"{short}control"] = by_control[name].max() if len(found) else math.nan
        row |= {"kl": mine.kl, "control_kl": theirs.kl}
        row |= {"loss_rise": mine.loss_rise, "control_loss_rise": theirs.loss_rise, "distinct": distinct}
        row["broken"] = limits.passed(
            clean_loss=clean_loss,
            loss_rise=mine.loss_rise if len(around) else None,
            kl=mine.kl if len(around) else None,
            distinct=distinct,
            clean_distinct=clean_distinct,
        )
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class SteeringReport:
    """A sweep of strengths, its side effects and controls."""

    model: str
    direction: str
    """What was pushed."""
    push: str
    units: tuple[float, ...]
    """What strength 1 means for each feature."""
    metric: str
    want: str
    clean_loss: float
    """Of the model by itself on the unrelated text, in nats per token; NaN without such text."""
    limits: Limits
    table: pd.DataFrame
    """By strength: mean `effect` on the metric (and `held_out_effect`), its standard deviation over the prompts, the
    share of prompts on which the metric went `up`, the largest |mean effect| of any `control`; on unrelated text `kl`
    and `loss_rise` in nats per token beside the mean of the controls'; share of `distinct` trigrams written; why it is
    `broken`, or an empty text."""
    effects: pd.DataFrame
    """One row per set, prompt, control (−1: what was pushed) and strength: metric `before`, `after`, `effect`."""
    generations: pd.DataFrame
    """`prompt`, `strength` (NaN: the clean model), `text`."""
    n: dict[str, int]
    """How many prompts, held-out prompts, unrelated texts and controls."""
    command: str = ""

    @property
    def handle(self) -> str:
        """What was pushed, by its old name."""
        warnings.warn("SteeringReport.handle is now called direction.", DeprecationWarning, stacklevel=2)
        return self.direction

    @cached_property
    def _choice(self) -> tuple[float | None, str]:
        sign = 1 if self.want == "up" else -1
        table = self.table
        moves = _where(table, sign * table.effect > table.control)
        if moves.empty:
            return None, f"no strength moves the metric {self.want} by more than every control"
        whole = _where(moves, moves.broken == "")
        if whole.empty:
            return None, "every strength that moves the metric by more than the controls breaks the model"
        best = whole.loc[(sign * whole.effect).idxmax()]
        held_out = bool(self.n.get("held_out", 1))
        if held_out and not sign * best.held_out_effect > best.held_out_control:
            return None, f"what strength {best.strength:g} does to the prompts it does not do to held-out ones"
        other = f"held out {best.held_out_effect:+.3f}, controls at most {best.held_out_control:.3f}"
        alone = f"controls at most {best.control:.3f}; not tested on held-out prompts"
        unheard = "" if self.n.get("unrelated", 1) else "; side effects not measured"
        return float(best.strength), (
            f"largest effect on the prompts ({best.effect:+.3f}) that does not break the model; "
            f"{other if held_out else alone}{unheard}"
        )

    @property
    def recommended(self) -> float | None:
        """The strength to use; None where none does what is wanted, beyond the controls, without breaking the model."""
        return self._choice[0]

    @property
    def reason(self) -> str:
        """Why this strength, or why none."""
        return self._choice[1]

    def side_by_side(self, strength: float | None = None) -> pd.DataFrame:
        """`prompt`, `before`, `after`: continuations with one strength (default: the recommended, else the largest)."""
        if strength is None:
            strength = self.recommended if self.recommended is not None else max(self.table.strength, key=abs)
        clean = _where(self.generations, self.generations.strength.isna()).set_index("prompt").text
        after = _where(self.generations, self.generations.strength == strength)
        return pd.DataFrame({
            "prompt": after.prompt.tolist(), "before": clean[after.prompt].tolist(), "after": after.text.tolist(),
        })  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        plain = {name: getattr(self, name) for name in ("model", "push", "metric", "want", "n")}
        plain["handle"] = self.direction  # the name that files have had from the beginning
        plain["clean_loss"] = self.clean_loss if math.isfinite(self.clean_loss) else None
        frames = {name: _records(getattr(self, name)) for name in ("table", "effects", "generations")}
        return {
            "format": FORMAT, **plain, "units": list(self.units), "limits": asdict(self.limits),
            "recommended": self.recommended, "reason": self.reason, "command": self.command, **frames,
        }  # fmt: skip

    def to_figure(self) -> go.Figure:
        """Effect on the metric and side effects against strength, beside the controls'."""
        return figure(self.to_json())

    def _repr_html_(self) -> str:
        return framed(page(self.to_json()), title=f"Steering by {self.direction}")

    def save(self, folder: str | Path) -> Path:
        """Write `steering.json` and `steering.html` (one file, works offline); returns the page."""
        folder, document = Path(folder), self.to_json()
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)
        write_file(folder / "steering.json", text)
        html = folder / "steering.html"
        write_file(html, page(document, ways_from(html)))
        return html


def _where(frame: pd.DataFrame, mask: Any) -> pd.DataFrame:
    return cast(pd.DataFrame, frame[mask])


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{key: plain(value) for key, value in row.items()} for row in frame.to_dict("records")]
