"""Dictionaries on the Hugging Face hub: a repository with their folder, and a card that says what they are."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transcoders.dictionaries import DictionarySet
from transcoders.errors import FileFormatError, InputError
from transcoders.formats.registry import list_dictionaries, load_dictionaries
from transcoders.hub import first_line, hub_problem

_NOT_UPLOADED = [".*", "*/.*", "checkpoint-*"]
_CARD = "README.md"
_KINDS = {
    "sae": ("sparse autoencoders", "sparse-autoencoder"),
    "plt": ("transcoders", "transcoder"),
    "mixed": ("transcoders and sparse autoencoders", "transcoder"),
    "clt": ("a cross-layer transcoder", "cross-layer-transcoder"),
}


def upload_dictionaries(folder: Path | str, repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Put a folder of dictionaries, in any format, on the hub as `OWNER/NAME`, and return its address.

    The repository is made where there is none; checkpoints of training stay here. A model card is written from what
    the dictionaries say of themselves; a README.md in the folder, such as a run's, follows it, or stands in its place
    where it begins with the hub's settings (`---`). `token`: otherwise that of `hf auth login`.
    Raises `FileFormatError` where the folder holds no sound dictionaries, and `InputError` where the hub refuses.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileFormatError(f"There is no folder {folder}; give a folder of dictionaries.")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo) is None:
        raise InputError(f"{repo!r} is no name of a repository; give OWNER/NAME, such as 'me/gpt2-transcoders'.")
    own = (folder / _CARD).read_text(encoding="utf-8") if (folder / _CARD).is_file() else ""
    card = None if own.startswith("---") else "\n".join(filter(None, [model_card(folder, repo), own]))
    if (problem := hub_problem()) is not None:
        raise InputError(f"Nothing was uploaded, for the hub cannot be asked ({problem}); check the network.")
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=_NOT_UPLOADED, commit_message="Upload dictionaries"
        )
        if card is not None:
            api.upload_file(
                path_or_fileobj=card.encode(), path_in_repo=_CARD, repo_id=repo, commit_message="Describe dictionaries"
            )
    except Exception as error:  # the hub client raises many kinds, of its own and of its HTTP library
        raise InputError(
            f"The hub refused {repo!r} ({first_line(error)[:200]}); log in with `hf auth login` as somebody who may "
            "write there, or give a token."
        ) from error
    return str(address)


def model_card(folder: Path | str, repo: str) -> str:
    """What the dictionaries in a folder are and how they are loaded, as the hub's model card.

    Where the folder offers more than can be loaded at once, the card lists the offers.
    """
    name, offers = list_dictionaries(folder)
    try:
        loaded = load_dictionaries(folder)
    except FileFormatError:
        raise
    except InputError:  # more than one dictionary of a layer: each is sound on its own, or is refused when loaded
        return _card(repo, {"format": name, "dictionaries": len(offers)}, "dictionaries", [], None)
    what, tag = _KINDS[loaded.kind]
    return _card(repo, {**described(loaded), "format": name}, what, [tag], loaded.provenance.model)


def described(dictionaries: DictionarySet) -> dict[str, Any]:
    """What a set of dictionaries is, and what it says of its training; only what is known."""
    said, layers = dictionaries.provenance, range(dictionaries.n_layers)
    held = [layer for layer in layers if dictionaries.n_features(layer)]
    widths = sorted({dictionaries.n_features(layer) for layer in held})
    facts: dict[str, Any] = {
        "kind": dictionaries.kind,
        "model": said.model,
        "layers": _ranges(held),
        "reads": _kinds_of(dictionaries.reads),
        "writes": _kinds_of(dictionaries.writes),
        "d_model": dictionaries.d_model,
        "features of a layer": ", ".join(f"{width:,}" for width in widths),
        "activation": _activations(dictionaries),
        "skip": any(dictionaries.skip(layer) is not None for layer in held) or None,
        "frame": said.frame.name,
        "corpus": said.corpus,
        "training tokens": said.tokens or None,
        "BOS": said.bos,
        "weights of the model": said.fingerprint,
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _card(repo: str, facts: Mapping[str, Any], what: str, tags: list[str], model: str | None) -> str:
    import yaml

    head: dict[str, Any] = {"tags": ["mechanistic-interpretability", "circuitsae", *tags]}
    of_the_hub = model is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)
    if of_the_hub and model not in ("unknown", "random", "pocket"):
        head["base_model"] = model
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    named = f" of {_cell(model)}" if model else ""
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {repo.split("/")[1]}

{what[0].upper()}{what[1:]}{named}.

| | |
|---|---|
{rows}

```python
from transcoders import load_dictionaries

dictionaries = load_dictionaries("{repo}")
```

`circuitsae dictionaries info {repo}` prints what they are.
"""


def _cell(value: Any) -> str:
    return re.sub(r"[|\s<>`]+", " ", str(value))[:200].strip()


def _kinds_of(sites: Any) -> str:
    return ", ".join(dict.fromkeys(site.kind for site in sites))


def _activations(dictionaries: DictionarySet) -> str | None:
    activation = getattr(dictionaries, "activation", None)
    held = [d for layer, d in enumerate(getattr(dictionaries, "layers", ())) if dictionaries.n_features(layer)]
    found = [activation] if activation is not None else [d.activation for d in held]
    return ", ".join(dict.fromkeys(f"{a.name}{f' (k = {a.k})' if hasattr(a, 'k') else ''}" for a in found)) or None


def _ranges(numbers: list[int]) -> str:
    """0–3, 5 of 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
