"""What steering did: one row per strength, and the strength to use, or none."""

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd
import plotly.graph_objects as go

from circuitsae.interventions.steering.page import figure, page
from circuitsae.interventions.steering.settings import Limits, distinct_trigrams
from transcoders.files import write_file

FORMAT = "circuitsae-steering/1"


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
    handle: str
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
        plain = {name: getattr(self, name) for name in ("model", "handle", "push", "metric", "want", "n")}
        plain["clean_loss"] = self.clean_loss if math.isfinite(self.clean_loss) else None
        frames = {name: _records(getattr(self, name)) for name in ("table", "effects", "generations")}
        return {
            "format": FORMAT, **plain, "units": list(self.units), "limits": asdict(self.limits),
            "recommended": self.recommended, "reason": self.reason, "command": self.command, **frames,
        }  # fmt: skip

    def to_figure(self) -> go.Figure:
        """Effect on the metric and side effects against strength, beside the controls'."""
        return figure(self.to_json())

    def save(self, folder: str | Path) -> Path:
        """Write `steering.json` and `steering.html` (one file, works offline); returns the page."""
        folder, document = Path(folder), self.to_json()
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)
        write_file(folder / "steering.json", text)
        write_file(folder / "steering.html", page(document))
        return folder / "steering.html"


def _where(frame: pd.DataFrame, mask: Any) -> pd.DataFrame:
    return cast(pd.DataFrame, frame[mask])


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{key: plain(value) for key, value in row.items()} for row in frame.to_dict("records")]
