"""What a crosscoder is trained on: all its sites side by side, as one vector that an autoencoder reads."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transcoders.data.activations import ActivationBatch
from transcoders.errors import InputError
from transcoders.sites import Site
from transcoders.training.batches import Source, Stream
from transcoders.training.config import SAEConfig, TrainConfig
from transcoders.training.initialise import measure_scales
from transcoders.training.split import WHOLE, Split


class SideBySide:
    """`Source` of one layer, whose vectors are those of several sites, each brought to variance one."""

    def __init__(self, inner: Source, sites: Sequence[Site], config: SAEConfig) -> None:
        self.inner, self.inner_sites, self.config = inner, tuple(sites), config
        self.name, self.origin, self.corpus, self.bos = inner.name, inner.origin, inner.corpus, inner.bos
        self.first, self.frame, self.d_vocab, self.device = inner.first, inner.frame, inner.d_vocab, inner.device
        self.n_layers, self.d_model = 1, len(self.inner_sites) * inner.d_model
        self.limits: Mapping[Site, float] = inner.limits
        self.trained_on: Mapping[str, str] | None = None  # it is evaluated by other means
        self.scales: Tensor | None = None

    def fingerprint(self) -> str | None:
        return self.inner.fingerprint()

    def sites(self, config: TrainConfig) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        """One, which stands for all."""
        one = (Site(0, self.config.site),)
        return one, one

    def sample(self, sites: Sequence[Site], tokens: int) -> Float[Tensor, "token 1 width"]:
        """The first one also says the scales."""
        found = self.inner.sample(self.inner_sites, tokens).float()
        self.limits = self.inner.limits
        if self.scales is None:
            self.scales = measure_scales(found, found, self.config).write
        return _joined(found, self.scales)

    def open(
        self, sites: Sequence[Site], *, batch: int, state: Mapping[str, Any] | None = None, split: Split = WHOLE
    ) -> "_Joined":
        of_inner = None
        if state is not None:
            of_inner = {key: value for key, value in state.items() if key not in ("sites", "scales")}
            if (theirs := tuple(state["sites"])) != tuple(map(str, self.inner_sites)):
                raise InputError(
                    f"The run is of a crosscoder of {', '.join(theirs)}, not of {', '.join(map(str, self.inner_sites))}"
                    "; give those sites, or another output folder."
                )
            self.scales = torch.tensor(state["scales"], device=self.device)
        if self.scales is None:
            raise InputError("A stream of a crosscoder begins after a sample of it; call `sample` first.")
        whole = self.inner.open(self.inner_sites, batch=batch, state=of_inner, split=split)
        self.limits = self.inner.limits
        return _Joined(whole, self.inner_sites, self.scales)


class _Joined:
    """`Stream` of another one's sites side by side."""

    def __init__(self, whole: Stream, sites: Sequence[Site], scales: Float[Tensor, "site"]) -> None:
        self.whole, self.sites, self.scales = whole, sites, scales

    def __iter__(self) -> Iterator[ActivationBatch]:
        for batch in self.whole:
            joined = _joined(batch.reads, self.scales)
            yield ActivationBatch(joined, joined[:, :0])

    def state(self) -> dict[str, Any]:
        return {**self.whole.state(), "sites": list(map(str, self.sites)), "scales": self.scales.tolist()}

    def place(self, row: int) -> str:
        return self.whole.place(row)


def _joined(
    vectors: Float[Tensor, "token site d_model"], scales: Float[Tensor, "site"]
) -> Float[Tensor, "token 1 width"]:
    return (vectors.float() * scales[:, None]).flatten(1).unsqueeze(1)
