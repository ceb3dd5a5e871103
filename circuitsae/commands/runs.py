"""What a run folder of `train` says of itself, so that it can be evaluated by its name alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circuitsae.commands.shared import THE_WHOLE, CorpusPart, Weights
from transcoders.errors import FileFormatError, InputError
from transcoders.files import lasting
from transcoders.training.trained_on import TRAINED_ON, write_trained_on


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The model and the text of a run, by the names under which they are found again."""

    model: str
    corpus: str | None = None
    """None for the pocket model's own text."""
    corpus_config: str | None = None
    corpus_split: str | None = None
    corpus_revision: str | None = None
    corpus_column: str | None = None
    revision: str | None = None
    adapter: str | None = None

    @classmethod
    def given(cls, model: str, corpus: str | None, weights: Weights, part: CorpusPart = THE_WHOLE) -> "TrainedOn":
        """As `train` was called, local places by their full paths."""
        stated = weights.stated()
        return cls(
            model=lasting(model), corpus=None if corpus is None else lasting(corpus), revision=stated.get("revision"),
            adapter=stated.get("adapter"), **part.stated(),
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Into a run folder; whole or not at all."""
        write_trained_on(folder, vars(self))

    @classmethod
    def of(cls, folder: Path) -> "TrainedOn":
        """What the folder says, or else the dictionaries in it, which name local places by their last part only.

        Raises `FileFormatError` for a record that makes no sense.
        """
        from transcoders.formats.files import read_json

        if not (folder / TRAINED_ON).is_file():
            return cls._of_dictionaries(folder)
        record: Any = read_json(folder / TRAINED_ON)
        known = set(record) <= set(cls.__dataclass_fields__) and "model" in record
        if not known or not all(isinstance(value, str) for value in record.values()):
            raise FileFormatError(
                f"{folder / TRAINED_ON} does not say what the run was trained on; name the model and the text: "
                f"circuitsae evaluate MODEL {folder} --corpus TEXT."
            )
        return cls(**record)

    @classmethod
    def _of_dictionaries(cls, folder: Path) -> "TrainedOn":
        from circuitsae.loading import POCKET, load_dictionaries
        from transcoders.dictionaries.provenance import ROWS, VECTORS

        provenance = load_dictionaries(folder).provenance
        nameless = (VECTORS, ROWS) if provenance.model != POCKET else (VECTORS, ROWS, POCKET)
        origin = {name: provenance.model_origin.get(name) for name in ("revision", "adapter")}
        return cls(
            model=provenance.model, corpus=None if provenance.corpus in nameless else provenance.corpus, **origin
        )

    def weights(self, given: Weights) -> Weights:
        """Which weights to load: those given, and otherwise those of the run."""
        revision, adapter = given.revision or self.revision, given.adapter or self.adapter
        return replace(given, revision=revision, adapter=adapter)

    def part(self, given: CorpusPart) -> CorpusPart:
        """Which part of the corpus to read: that of the run, but for what is given."""
        names = ("corpus_config", "corpus_split", "corpus_revision", "corpus_column")
        mine = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(THE_WHOLE, **mine | given.stated())


def require_run(folder: str) -> Path:
    """A run folder that was named alone; raises `InputError` where it is none."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(
            f"There is no run folder {folder}; give one that `circuitsae train` wrote, or a model and dictionaries: "
            "circuitsae evaluate MODEL DICTIONARIES."
        )
    return path
