"""A crosscoder on disk: `crosscoder.json` and `crosscoder.safetensors`, which carry the same id."""

import uuid
from pathlib import Path

import torch
from jsonschema import Draft202012Validator

from transcoders.crosscoders.crosscoder import Crosscoder
from transcoders.dictionaries import DictionaryProvenance
from transcoders.errors import FileFormatError
from transcoders.files import new_files, write_json
from transcoders.formats.files import (
    read_json,
    read_site,
    read_tensors,
    require_settings,
    require_shapes,
    tensor_shapes,
    write_tensors,
)
from transcoders.formats.native import ACTIVATION, PROVENANCE, SITES, THRESHOLD, activation_of, described

CONFIG, WEIGHTS = "crosscoder.json", "crosscoder.safetensors"
_FORMAT, _VERSION = "crosscoder", 1
_SETTINGS = Draft202012Validator(
    {
        "type": "object",
        "required": ["format", "version", "id", "sites", "labels", "activation", "provenance"],
        "properties": {
            "format": {"const": _FORMAT},
            "version": {"const": _VERSION},
            "id": {"type": "string"},
            "sites": SITES,
            "labels": SITES,
            "activation": ACTIVATION,
            "provenance": PROVENANCE,
        },
    }
)


def save_crosscoder(crosscoder: Crosscoder, folder: Path | str) -> None:
    """Write it to a folder, whole or not at all."""
    identity = uuid.uuid4().hex
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "id": identity,
        "sites": list(map(str, crosscoder.sites)),
        "labels": list(crosscoder.labels),
        "activation": described(crosscoder.activation),
        "provenance": crosscoder.provenance.to_json(),
    }
    with new_files(Path(folder)) as temporary:
        write_tensors(temporary / WEIGHTS, crosscoder.state_dict(), {"id": identity})
        write_json(temporary / CONFIG, record)


def load_crosscoder(folder: Path | str, *, device: str | torch.device = "cpu") -> Crosscoder:
    """What `save_crosscoder` wrote; `FileFormatError` where the folder holds none, or it is damaged."""
    folder = Path(folder).expanduser()
    path = folder / CONFIG
    if not path.is_file():
        raise FileFormatError(f"{folder} holds no crosscoder ({CONFIG}); give a folder that train_crosscoder wrote.")
    record = read_json(path)
    require_settings(path, record, _SETTINGS)
    sites = [read_site(path, text) for text in record["sites"]]
    n = len(sites)
    expected: dict[str, tuple[int | str, ...]] = {
        "W_enc": (n, "d_model", "feature"), "b_enc": ("feature",), "W_dec": (n, "feature", "d_model"),
        "b_dec": (n, "d_model"), "scales": (n,),
    }  # fmt: skip
    if record["activation"]["name"] in ("jumprelu", "jumptopk"):
        expected[THRESHOLD] = ("feature",)
    require_shapes(folder / WEIGHTS, tensor_shapes(folder / WEIGHTS), expected)
    tensors, metadata = read_tensors(folder / WEIGHTS, device=device, weights=True)
    if metadata.get("id") != record["id"]:
        raise FileFormatError(f"{path} and {folder / WEIGHTS} were not saved together; save the crosscoder again.")
    if len(record["labels"]) != n or len(set(sites)) != n:
        raise FileFormatError(f"{path} does not name its {n} sites once each; save the crosscoder again.")
    return Crosscoder(
        **{name: tensors[name] for name in expected if name != THRESHOLD},  # pyright: ignore[reportArgumentType]
        activation=activation_of(record["activation"], tensors, ""),
        sites=sites,
        labels=record["labels"],
        provenance=DictionaryProvenance.from_json(record["provenance"]),
    )
