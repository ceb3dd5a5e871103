"""What a run says of itself in its output folder: `run.json`, written before the first step and after the last file.

A run is complete where that file says so and its dictionaries are those that it wrote. Until then `resume` goes on.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transcoders.dictionaries import DictionarySet
from transcoders.errors import FileFormatError, InputError
from transcoders.files import file_hash, write_json
from transcoders.formats.files import read_json
from transcoders.formats.registry import load_dictionaries
from transcoders.training.batches import Source
from transcoders.training.config import TrainConfig
from transcoders.training.config_reading import config_from_json

logger = logging.getLogger(__name__)

_RUN, _SETTINGS = "run.json", "config.json"

_FREE_TO_CHANGE = ("log_to", "parallel", "checkpoint_every", "keep_last", "keep_best")
"""Settings that nothing trained depends on: a run may be resumed with others."""


def identity_of(source: Source, configs: Sequence[TrainConfig], start: str | None = None) -> dict[str, Any]:
    """What the result of a run depends on, as JSON; `start`: a hash of the weights that it starts from."""
    identity = {
        "model": source.name,
        "fingerprint": source.fingerprint(),
        "corpus": source.corpus,
        "config": [config.to_json() for config in configs],
    } | ({} if start is None else {"start": start})
    return json.loads(json.dumps(identity))  # tuples become lists, as in a file


def require_same_run(out: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises `InputError` where a folder belongs to another model, corpus or configuration, naming what differs."""
    mine, theirs = _settings(expected), _settings(found)
    differ = [key for key in (mine | theirs) if mine.get(key) != theirs.get(key)]
    if differ:
        each = "; ".join(f"its {key} is {theirs.get(key)!r}, this run's {mine.get(key)!r}" for key in differ)
        raise InputError(
            f"{out} belongs to another run: {each}. Give the settings of that run, or another output folder."
        )


def mark_started(out: Path, identity: Mapping[str, Any]) -> None:
    """From here on the folder is that of this run, which is not complete."""
    write_json(out / _RUN, {"run": identity, "finished": None})


def mark_finished(out: Path, identity: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """All steps are done, and the dictionaries of the run are in `folders`."""
    wrote = {str(folder.relative_to(out)): file_hash(folder / _SETTINGS) for folder in folders}
    write_json(out / _RUN, {"run": identity, "finished": wrote})


def was_started(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether this run was started in the folder; `InputError` where another one was."""
    record = _read(out)
    if record is not None:
        require_same_run(out, record["run"], identity)
    return record is not None


def finished_dictionaries(out: Path, identity: Mapping[str, Any], device: torch.device) -> list[DictionarySet] | None:
    """What a complete run wrote; None where this run is not complete, or its files are damaged.

    `InputError` where the folder belongs to another run, and where other dictionaries have taken the place of its own.
    """
    if not was_started(out, identity) or not (wrote := (_read(out) or {})["finished"]):
        return None
    for name, expected in wrote.items():
        settings = out / name / _SETTINGS
        if settings.is_file() and file_hash(settings) != expected:
            raise InputError(
                f"The run in {out} is complete, but {settings.parent} holds other dictionaries than it wrote; load "
                "them with load_dictionaries, or move them away to have its own made again."
            )
    try:
        return [load_dictionaries(out / name, device=device) for name in wrote]
    except FileFormatError as error:
        logger.warning("The run in %s was complete, but its files are damaged and made again: %s", out, error)
        return None


def _read(out: Path) -> dict[str, Any] | None:
    """None where there is no record, or none that can be used."""
    path = out / _RUN
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        if not isinstance(record.get("run"), dict) or not isinstance(record.get("finished", 0), dict | None):
            raise FileFormatError(f"{path} does not say what run it is of.")
    except FileFormatError as error:
        logger.warning("%s It is left out of account.", error)
        return None
    return record


def _settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with each setting of each configuration by its name, numbered where there are several."""
    configs = identity.get("config")
    configs = configs if isinstance(configs, list) else [configs]
    settings = {key: value for key, value in identity.items() if key != "config"}
    for number, config in enumerate(configs):
        place = f"config {number}, " if len(configs) > 1 else ""
        entries = _with_defaults(config) if isinstance(config, dict) else {"config": config}
        settings |= {f"{place}{key}": value for key, value in entries.items() if key not in _FREE_TO_CHANGE}
    return settings


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and what it leaves out as an earlier release did, which did not know it."""
    try:
        known = json.loads(json.dumps(config_from_json(config).to_json()))
    except (TypeError, ValueError):  # of another kind of run, or of a later release
        return config
    return known | config
