"""Where a set of dictionaries comes from, whether it belongs to a model, and how texts are read with it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from transcoders.errors import DictionaryError
from transcoders.language_model import LanguageModel
from transcoders.sites import Frame, Site

logger = logging.getLogger(__name__)

AGREEMENT = ("cosine", "norm_ratio", "reach", "measured", "tokens")
"""What dictionaries keep of their Jacobian agreement (`transcoders.evaluation.Agreement.summary`)."""

VECTORS, ROWS = "vectors", "rows of tokens"
"""What stands for the name of a corpus where training read no text."""


@dataclass(frozen=True, kw_only=True)
class DictionaryProvenance:
    """The model, text and settings that a set of dictionaries was trained with."""

    model: str
    """Name of the language model."""
    model_origin: Mapping[str, str] = field(default_factory=dict)
    """`LanguageModel.origin`: the revision, adapter and quantisation of its weights, where they had one."""
    fingerprint: str | None = None
    """`LanguageModel.fingerprint()` of its weights; None in files of other tools, which do not record it."""
    frame: Frame = field(default_factory=Frame)
    """Coordinates of the model's weights; the same hook carries another tensor in another frame."""
    corpus: str | None = None
    """Name of the training text."""
    tokens: int = 0
    """Tokens seen in training."""
    bos: bool | None = None
    """Whether the rows of training text began with BOS; None where it is not known, or for vectors."""
    seed: int | None = None
    """Seed of initialisation and data order."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that trained it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The training configuration, or the configuration file of another tool."""
    normalisation: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Factors of the `read` and `write` of each layer that are folded into the weights; empty where there are none."""
    d_vocab: int | None = None
    """Tokens of the model's vocabulary, which tells a tuned sibling from another model; None where it is not known."""
    first: int = 1
    """The first position with features. What is before it was left out in training, and is exact: attention sinks with
    outlier activations (position 0 in most models), or a chat prefix."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Norms of activations, by site (`"3.mlp_out"`). A token over one of them was left out in training, and is exact:
    it has no features in any layer. Empty where no token was left out for that."""

    agreement: Mapping[str, float] = field(default_factory=dict)
    """How small changes are passed on, as `transcoders.evaluation.Agreement.summary` says; empty where that was not
    measured. It is a property of these weights: other ones need another measurement."""

    def __post_init__(self) -> None:
        if self.first < 0:
            raise DictionaryError(f"The first position with features counts from 0; got first={self.first}.")

    def to_json(self) -> dict[str, Any]:
        # What older releases do not know is written where it says something.
        return {k: v for k, v in asdict(self).items() if v or k not in ("model_origin", "limits", "agreement")}

    @property
    def site_limits(self) -> dict[Site, float]:
        """`limits` by site."""
        return {Site.parse(site): limit for site, limit in self.limits.items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DictionaryProvenance":
        factors = {side: [float(x) for x in values] for side, values in record.get("normalisation", {}).items()}
        return cls(**{**record, "frame": Frame(**record.get("frame", {})), "normalisation": factors})

    def trained_with_bos(self, model: LanguageModel) -> bool | None:
        """Whether rows of training text began with BOS, as this or another tool's settings say; None if they do not."""
        nested = self.config.get("metadata")
        places = (self.config, nested if isinstance(nested, Mapping) else {})
        for stated in (self.bos, *(place.get("prepend_bos") for place in places)):
            if isinstance(stated, bool):
                return stated
        if self.corpus in (None, VECTORS, ROWS) or "context" not in self.config:
            return None
        # Our own files without a record: what `train` did then.
        return model.bos is not None and model.bridge_adds_bos


def reading_as_trained(
    model: LanguageModel, provenance: DictionaryProvenance, bos: bool | None = None
) -> LanguageModel:
    """`model` with texts read as `bos` or its own `with_bos` says, or else as in the dictionaries' training.

    Where nothing is known of that, they are read as the model's own tokenizer does, and a line of the log says so.
    """
    if bos is not None or model.bos_is_chosen:
        return model.with_bos(bos)
    trained = provenance.trained_with_bos(model)
    if trained is None and model.has_tokenizer and model.bos is not None:
        trained = model.adds_bos
        logger.warning(
            "The dictionaries do not say whether they were trained with a beginning-of-text token; prompts are read as "
            "%s's tokenizer does, %s %s first; --bos or --no-bos (bos=True or bos=False) says otherwise.",
            model.name, "with" if trained else "without", model.token_string(model.bos),
        )  # fmt: skip
    if trained and model.bos is None:
        if model.has_tokenizer:
            logger.warning(
                "The dictionaries were trained with a beginning-of-text token, but %s has none; prompts go without.",
                model.name,
            )
        return model
    return model.with_bos(trained)


def check_fits(provenance: DictionaryProvenance, n_layers: int, width: int, model: LanguageModel, read: Site) -> None:
    """Raises `DictionaryError` unless dictionaries of these sizes and this origin can be used with `model`.

    `width`: of what is read, at `read` and its like. Other weights in a model of the same layers, width and (where it
    is recorded) vocabulary, such as a tuned one's, are no error; a line of the log names them.
    """
    sizes = (
        (f"{read.kind} of width {{}}", width, model.width(read)),
        ("{} layers", n_layers, model.n_layers),
        ("a vocabulary of {} tokens", provenance.d_vocab or model.d_vocab, model.d_vocab),
    )
    for size, ours, theirs in sizes:
        if ours != theirs:
            raise DictionaryError(
                f"The dictionaries, trained on {provenance.model}, are for {size.format(ours)}, but {model.name} has "
                f"{size.format(theirs)}; load dictionaries trained on {model.name}."
            )
    if provenance.frame != model.frame:
        raise DictionaryError(
            f"The dictionaries were trained in the {provenance.frame.name!r} frame, but {model.name} is loaded in "
            f"the {model.frame.name!r} frame; load the model in the {provenance.frame.name!r} frame."
        )
    if has_other_weights(provenance, model):
        logger.warning(
            "The dictionaries were trained on %s with weights %s; %s has the same sizes, but weights %s. They are used "
            "as they are; how well they fit is told by L0 and FVU.",
            provenance.model, provenance.fingerprint, model.name, model.fingerprint(),
        )  # fmt: skip


def has_other_weights(provenance: DictionaryProvenance, model: LanguageModel) -> bool | None:
    """Whether dictionaries were trained on other weights than the model's; None where that cannot be told."""
    # A fingerprint of rounded weights differs from the one of the weights it was rounded from.
    exact = model.dtype in (torch.float32, torch.float64)
    return provenance.fingerprint != model.fingerprint() if provenance.fingerprint is not None and exact else None
