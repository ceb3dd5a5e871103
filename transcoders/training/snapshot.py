"""A checkpoint as dictionaries, to look at a run under way or at one of its earlier steps."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoders.devices import AUTO
from transcoders.dictionaries import DictionaryProvenance, DictionarySet
from transcoders.errors import FileFormatError, InputError
from transcoders.formats.files import read_json, read_tensors
from transcoders.precision import check_device
from transcoders.training.batches import sites_of_kind
from transcoders.training.checkpoint import RECORD, TENSORS, Which, find_checkpoint, is_checkpoint
from transcoders.training.config_reading import config_from_json
from transcoders.training.step import Run


def from_checkpoint(
    folder: Path | str, *, which: Which = "latest", name: str | None = None, device: str | torch.device = "auto"
) -> DictionarySet:
    """The dictionaries of a checkpoint, as a run that ended there would hand them out. Training may go on meanwhile.

    `folder`: the output folder of a run, of whose checkpoints `which` says the one: `"latest"`, `"best"` (the least
    FVU, or loss where the weight of a penalty is given, since the checkpoint before it) or the number of a step; or a
    checkpoint itself. `name`: which dictionary, where several were trained at once. The optimizer's state is not read.

    Raises `InputError` where there is no such checkpoint or dictionary, and `FileFormatError` where it is damaged.
    """
    device = "cpu" if device == AUTO else device  # until a model takes them to its own
    check_device(device)
    folder = Path(folder).expanduser()
    place = folder if is_checkpoint(folder) else find_checkpoint(folder, which)
    record = read_json(place / RECORD)
    number = _number(place, record, name)
    try:
        config = config_from_json(record["run"]["config"][number])
        provenance = DictionaryProvenance.from_json(_provenance(record, number))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise FileFormatError(f"{place / RECORD} does not say what was trained; take another checkpoint.") from error
    prefix = f"{number}."
    found, _ = read_tensors(
        place / TENSORS,
        device=device,
        wanted=lambda n: n.startswith(prefix) and not n.startswith(f"{prefix}optimizer."),
    )
    tensors: dict[str, Tensor] = {n.removeprefix(prefix): tensor for n, tensor in found.items()}
    run = Run.of_weights(config, tensors, place, torch.device(device))
    exported = run.export(*sites_of_kind(config, run.weights.n_layers), provenance)
    assert exported is not None  # there are no other ranks
    return exported


def _number(place: Path, record: dict[str, Any], name: str | None) -> int:
    """The place of the dictionary among those that were trained together."""
    names = record.get("names")
    if not isinstance(names, list) or not names:  # of an earlier release
        names = [str(i) for i in range(len(record["runs"]))] if isinstance(record.get("runs"), list) else ["0"]
    if name is None and len(names) == 1:
        return 0
    if name is None or name not in names:
        asked = "no name was given" if name is None else f"there is no {name!r}"
        raise InputError(
            f"{place} holds several dictionaries, and {asked}; give name=… of {', '.join(map(repr, names))}."
        )
    return names.index(name)


def _provenance(record: dict[str, Any], number: int) -> dict[str, Any]:
    """What the checkpoint says, or of one of an earlier release what is known."""
    if "provenance" in record:
        return record["provenance"][number]
    run = record["run"]
    config = run["config"][number]
    return {
        "model": run["model"], "fingerprint": run["fingerprint"], "corpus": run["corpus"], "config": config,
        "seed": config["seed"], "tokens": record["step"] * config["batch"],
    }  # fmt: skip
