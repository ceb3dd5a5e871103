"""Two models that read the same tokens, as if they were one."""

from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import Int
from torch import Tensor

from transcoders.errors import ModelError
from transcoders.files import short_hash
from transcoders.language_model import LanguageModel
from transcoders.sites import Site


class ModelPair(LanguageModel):
    """Two models of one width and tokenizer. Its layers are those of the first, and then those of the second.

    It is read, never edited: `of` says which model a site belongs to. `ModelError` for models that do not go together.
    """

    def __init__(self, first: LanguageModel, second: LanguageModel) -> None:
        """Nothing is copied: tokens, BOS and device are those of the first."""
        self.__dict__.update(first.__dict__)
        self.first, self.second = first, second
        self.name = f"{first.name} and {second.name}"
        for what in ("d_vocab", "d_model", "dtype", "device"):
            ours, theirs = (getattr(model, what) for model in (first, second))
            if ours != theirs:
                raise ModelError(
                    f"Models are compared on the same tokens and at the same width; {first.name} has {what} {ours}, "
                    f"{second.name} has {theirs}. Give a model and another one that was trained from it."
                )
        if first.has_tokenizer and second.has_tokenizer and _vocabulary(first) != _vocabulary(second):
            raise ModelError(
                f"{first.name} and {second.name} cut texts into other tokens; give two models with one tokenizer."
            )

    n_layers = property(lambda self: self.first.n_layers + self.second.n_layers, doc="Of both.")
    context = property(lambda self: min(self.first.context, self.second.context), doc="Of the one that reads less.")

    def both(self, site: Site) -> tuple[Site, Site]:
        """A site of the first model, and the same one of the second."""
        for model in (self.first, self.second):
            model.hook(site)
        return site, Site(site.layer + self.first.n_layers, site.kind)

    def of(self, site: Site) -> tuple[LanguageModel, Site]:
        """The model that a site belongs to, and what it is called there."""
        n = self.first.n_layers
        return (self.first, site) if site.layer < n else (self.second, Site(site.layer - n, site.kind))

    def label(self, site: Site) -> str:
        """Which model, and which of its sites."""
        return f"{'first' if site.layer < self.first.n_layers else 'second'}.{self.of(site)[1]}"

    def visit(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Iterable[Site],
        see: Callable[[Site, Tensor], None],
        *,
        positions: Int[Tensor, "batch pos"] | None = None,
    ) -> None:
        """`LanguageModel.visit` of the one and then of the other, each up to its own last site."""
        sites = list(sites)
        for model in (self.first, self.second):
            own = {self.of(site)[1]: site for site in sites if self.of(site)[0] is model}
            model.visit(tokens, own, lambda site, value, own=own: see(own[site], value), positions=positions)

    def hook(self, site: Site) -> str:
        model, own = self.of(site)
        return model.hook(own)

    def width(self, site: Site) -> int:
        model, own = self.of(site)
        return model.width(own)

    def fingerprint(self) -> str:
        """Of both."""
        return short_hash([self.first.fingerprint(), self.second.fingerprint()])

    def run(self, *given: Any, **how: Any) -> Any:
        raise ModelError(f"{self.name} are read side by side; run one of them (`pair.first`, `pair.second`).")


def _vocabulary(model: LanguageModel) -> dict[str, int]:
    return model.tokenizer.get_vocab()
