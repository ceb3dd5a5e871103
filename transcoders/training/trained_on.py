"""Under which names the model and the text of a run are found again: `trained_on.json` in its folder."""

from collections.abc import Mapping
from pathlib import Path

from transcoders.files import lasting, write_json

TRAINED_ON = "trained_on.json"


def trained_on(
    model: str | None, origin: Mapping[str, str], corpus: Mapping[str, str] | None = None
) -> dict[str, str] | None:
    """The names, from `LanguageModel.place` and `origin` and `Corpus.place`; None where the model has no place.

    Without a text where it has no place, or where the model brings it along.
    """
    if model is None:
        return None
    names = {"model": model}
    if "revision" in origin:
        names["revision"] = origin["revision"]
    if "adapter" in origin:
        names["adapter"] = lasting(origin["adapter"])
    return names | {f"corpus_{key}".removesuffix("_source"): value for key, value in (corpus or {}).items()}


def write_trained_on(folder: Path, names: Mapping[str, str | None] | None) -> None:
    """Into a run folder, those that are known; whole or not at all. Without any, an earlier run's are removed."""
    if names is None:
        (folder / TRAINED_ON).unlink(missing_ok=True)
        return
    write_json(folder / TRAINED_ON, {name: value for name, value in names.items() if value is not None})
