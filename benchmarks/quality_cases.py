"""What `quality.py` compares: kinds, shapes, libraries with their rates, and where each library runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENTS = Path("~/.cache/circuitsae-interop").expanduser()
"""Made by `benchmarks/interop`."""

KINDS = ("topk", "batchtopk", "jumprelu", "gated", "l1", "transcoder", "skip", "clt")
RANKED = ("topk", "batchtopk", "transcoder", "skip")
"""Kinds with k features; of the others L0 follows from a penalty."""


@dataclass(frozen=True)
class Shape:
    """A dictionary's."""

    d: int
    width: int
    k: int
    rates: tuple[float, ...]
    """That everybody with Adam tries beside its default."""


SHAPES = {
    "small": Shape(128, 512, 8, (1e-3, 2e-3, 4e-3)),
    "large": Shape(768, 12288, 32, (3e-4, 1e-3, 2e-3)),
}
SIGNUM = (0.1, 0.3, 2.0)
"""Rates that sparsify tries with its own optimiser, in multiples of its default."""
CLT_RATES = (3e-4, 1e-3, 3e-3)
DATA = ("synthetic", "tinystories")
STEPS = (500, 3000, 12000)
OURS = "circuitsae"


@dataclass(frozen=True)
class Peer:
    """A library that is compared with ours."""

    module: str
    environment: str
    kinds: tuple[str, ...]
    weighted: dict[str, float] = field(default_factory=dict)
    """Kinds whose L0 is set by the weight of a penalty, with its default; the one that gives L0 = k is looked for."""
    checkout: bool = False
    """Whether it is on no package index, so that the user's checkout goes on PYTHONPATH."""

    def rates(self, name: str, shape: Shape) -> tuple[float, ...]:
        if name == "sparsify":
            return tuple(factor * 5e-3 / (shape.width / 2**14) ** 0.5 for factor in SIGNUM)
        return CLT_RATES if "clt" in self.kinds else shape.rates


SPARSIFY = ("topk", "transcoder", "skip")
SAES = ("topk", "batchtopk", "jumprelu", "gated", "l1")
PEERS = {
    "sparsify": Peer("sparsify", "eai-sparsify", SPARSIFY),
    "sparsify-adam": Peer("sparsify", "eai-sparsify", SPARSIFY),
    "dictionary-learning": Peer("dictionary_learning", "dictionary-learning", SAES, weighted={"gated": 0.1, "l1": 0.1}),
    "sae-lens": Peer("sae_lens", "sae-lens", SAES, weighted={"jumprelu": 1.0, "gated": 1.0, "l1": 1.0}),
    "clt-forge": Peer("clt_forge", "sae-lens", ("clt",), weighted={"clt": 1e-3}, checkout=True),
    "oracle": Peer("transcoders", "", ("clt",), weighted={"clt": 5e-3}),
}


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    data: str
    shape: str
    kind: str

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(name for name, peer in PEERS.items() if self.kind in peer.kinds)


@dataclass(frozen=True)
class Cell:
    """One training; what tells it from all others."""

    case: Case
    library: str
    steps: int
    seed: int
    rate: float | None
    """None: the library's default."""
    settings: tuple[tuple[str, Any], ...] = ()

    def key(self, version: str) -> dict[str, Any]:
        return {
            "data": self.case.data, "shape": self.case.shape, "kind": self.case.kind, "library": self.library,
            "steps": self.steps, "seed": self.seed, "rate": self.rate, "settings": dict(self.settings),
            "version": version,
        }  # fmt: skip


def cases() -> list[Case]:
    """All rows; the small Llama is 128 wide, so the large shape has synthetic data alone."""
    shapes = [("synthetic", "small"), ("tinystories", "small"), ("synthetic", "large")]
    return [Case(data, shape, kind) for data, shape in shapes for kind in KINDS if (shape, kind) != ("large", "clt")]
