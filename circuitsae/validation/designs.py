"""What is run to predict and to measure each claim, by how attention patterns and norm scales answer in a graph.

Where they are held (`frozen`) a graph is a linear map, and a full removal is predicted by one run of it. Where they
answer as their derivatives say (`linear`; of autoencoders the MLPs between them do, too), an edge is a derivative:

| claim    | what it says of a small change of s                  | predicted: dose ±ε with | measured with       |
|----------|------------------------------------------------------|-------------------------|---------------------|
| `graph`  | t moves so much where all features between answer    | features of slope one   | features recomputed |
| `direct` | t moves so much where all sites between are held     | sites held              | sites held          |
| `model`  | t moves so much in the model, without a dictionary   | as `graph`              | the model itself    |

Where errors answer, too (`errors` of a graph is `linear`), so do all MLPs, and what features stand for is taken from
them: `direct` is predicted and measured with the model's own MLPs less what active features answer, `graph` with the
model's own; attention and norms are held or live as in the graph.

Everything else is live in all of them. Errors stay what they were but in the model itself. Measured are doses of up to
a tenth, of which `measured` is ten times the largest, so that it compares with a prediction of the full removal; of
the model's effect it is the full removal. Transcoders' features between answer by the true MLPs in `graph`, as they do
where all is held.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from circuitsae.attribution.limits import Errors, Response
from circuitsae.graph.notes import Claim
from circuitsae.interventions import Regime, RegimeName
from circuitsae.interventions.forward import Held
from circuitsae.replacement import ReplacementModel

DOSES = (0.1, 0.25, 0.5, 1.0)
"""Shares of a source's contribution that are taken out; predictions are of the full removal."""
SMALL_DOSES = (0.025, 0.05, 0.1)
"""The same of a graph of derivatives."""
SMALL = {torch.float64: 1e-5}
"""A dose at which nothing switches; 1e-2 in lower precision, where less would drown in rounding."""
STEP = {torch.float64: 1e-3, torch.float32: 3e-3}
"""The same, there and back, of a derivative; larger, as attention may round to float32 within a float64 model."""
PREDICTED_BY: dict[Claim, RegimeName] = {"graph": "linear", "direct": "frozen", "model": "linear"}


@dataclass(frozen=True)
class Design:
    """The runs behind every claim."""

    doses: tuple[float, ...]
    """Of what is measured; the last stands for the full removal."""
    derivative: bool
    """Whether predictions are derivatives, found by a small dose there and back, or runs of a linear map."""
    predicted: Mapping[RegimeName, RegimeName | Regime]
    """What is run for each name of `PREDICTED_BY`."""
    tested: Mapping[Claim, RegimeName | Regime]
    between: Mapping[Claim, Mapping[str, Regime]]
    """Between what is held and what is live: one thing let go."""

    def small(self, dtype: torch.dtype) -> float:
        """The smallest dose."""
        return (STEP if self.derivative else SMALL).get(dtype, 1e-2)

    def steps(self, count: int, small: float) -> Float[np.ndarray, "source dose"]:
        """The doses of a prediction."""
        return np.tile([[small, -small]], (count, 1)) if self.derivative else np.ones((count, 1))

    def predict(
        self, effect: Float[np.ndarray, "source dose target"], small: float
    ) -> Float[np.ndarray, "source one target"]:
        """The effect of a full removal that `steps` foretell."""
        return (effect[:, :1] - effect[:, 1:]) / (2 * small) if self.derivative else effect


HELD = Design(
    doses=DOSES,
    derivative=False,
    predicted={"frozen": "frozen", "linear": "linear"},
    tested={"graph": "graph", "direct": "direct", "model": "model"},
    between={
        "graph": {},
        "direct": {
            "direct patterns": Regime(mlps="constant", norms="frozen"),
            "direct norms": Regime(mlps="constant", patterns="frozen"),
        },
        "model": {
            "first": Regime(patterns="frozen", norms="frozen"),
            "model patterns": Regime(norms="frozen"),
            "model norms": Regime(patterns="frozen"),
        },
    },
)


def design_of(model: ReplacementModel, response: Response | None, errors: Errors = "held") -> Design:
    """Of graphs of a model; `response` and `errors` are theirs, by default what they must be."""
    if errors == "linear":
        held: Held = "live" if response == "linear" else "frozen"
        edges = Regime(mlps="errors", patterns=held, norms=held)
        whole = Regime(patterns=held, norms=held)
        return _derivatives(direct=edges, graph=whole, graph_tested=whole)
    if response != "linear" and not model.spliced:
        return HELD
    answering = Regime(mlps="features", first="frozen") if model.spliced else Regime(first="frozen")
    return _derivatives(direct=Regime(mlps="constant"), graph=Regime(mlps="linear"), graph_tested=answering)


def _derivatives(*, direct: Regime, graph: Regime, graph_tested: Regime) -> Design:
    """Of small doses, by what is run to predict and test `direct`, to predict `graph`, and to test that."""
    return Design(
        doses=SMALL_DOSES,
        derivative=True,
        predicted={"frozen": direct, "linear": graph},
        tested={"graph": graph_tested, "direct": direct, "model": "model"},
        between={"graph": {}, "direct": {}, "model": {}},
    )
