"""What a run is resumed from: one folder for each checkpoint, complete or not there at all.

One training at a time in an output folder.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from transcoders.errors import FileFormatError, InputError
from transcoders.files import file_hash, new_folder, write_error, write_json
from transcoders.formats.files import read_json, read_tensors, write_tensors

_TENSORS, _RECORD = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything the rest of a run depends on besides model and corpus."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def save_checkpoint(out: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write the folder, whole or not at all, and remove the others."""
    folder = out / f"checkpoint-{step:08d}"
    with new_folder(folder) as temporary:
        write_tensors(temporary / _TENSORS, checkpoint.tensors)
        write_json(temporary / _RECORD, {**checkpoint.record, "sha256": file_hash(temporary / _TENSORS)})
    remove_checkpoints(out, but=folder)


def remove_checkpoints(out: Path, *, but: Path | None = None) -> None:
    for folder in _folders(out):
        if folder != but:
            shutil.rmtree(folder)


def latest_checkpoint(out: Path) -> Path | None:
    """The folder of a run's latest checkpoint, or None where it has none."""
    return max(_folders(out), default=None)


def read_record(folder: Path, *, steps: int, runs: int) -> dict[str, Any]:
    """What a checkpoint says of itself; `FileFormatError` unless it can be of a run of so many steps."""
    path = folder / _RECORD
    record = read_json(path)
    step = _whole(path, record, "step", 1, steps)
    data = record.get("data")
    if not isinstance(data, dict):
        raise _damaged(path, "data", data, "an object")
    # Every chunk holds a batch at least, so there were not more chunks than steps.
    chunk = _whole(path, data, "chunk", 0, step)
    _whole(path, data, "batch_in_chunk", 0, step - chunk)
    if not isinstance(record.get("run"), dict):
        raise _damaged(path, "run", record.get("run"), "an object")
    states = record.get("runs")
    if not isinstance(states, list) or len(states) != runs:
        raise _damaged(path, "runs", states, f"a list of {runs}")
    for state in states:
        sparse = state.get("sparse") if isinstance(state, dict) else None
        if not isinstance(sparse, list) or not all(isinstance(each, bool) for each in sparse):
            raise _damaged(path, "runs", state, "objects with `sparse`, true or false for each layer")
        _require_numbers(path, state.get("controller"))
    return record


def read_state(folder: Path, record: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """A checkpoint's tensors; `FileFormatError` where they are not those that were written with its record."""
    path = folder / _TENSORS
    tensors, _ = read_tensors(path, device=device)
    if "sha256" in record and record["sha256"] != file_hash(path):
        raise FileFormatError(f"{path} was changed after it was written; {_ADVICE}.")
    return tensors


def require_like(folder: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises `FileFormatError` unless there are the same names, of the same shapes and types, and all is finite."""
    path = folder / _TENSORS
    if odd := sorted(found.keys() ^ expected.keys()):
        verb = "holds an unknown tensor" if odd[0] in found else "lacks the tensor"
        raise FileFormatError(f"{path} {verb} {odd[0]}; {_ADVICE}.")
    for name, tensor in found.items():
        like = expected[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise FileFormatError(
                f"{path} has {name} as {list(tensor.shape)} of {tensor.dtype}; expected {list(like.shape)} of "
                f"{like.dtype}; {_ADVICE}."
            )
        if not bool(tensor.isfinite().all()):
            raise FileFormatError(f"{path} has numbers in {name} that are not finite; {_ADVICE}.")


def require_for_each_layer(folder: Path, values: Sequence[Any], n_layers: int) -> None:
    if len(values) != n_layers:
        raise _damaged(folder / _RECORD, "sparse", values, f"a list of {n_layers}")


_ADVICE = "the checkpoint cannot be resumed, so remove it and train anew"


def require_same_run(out: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises `InputError` where a checkpoint belongs to another model, corpus or configuration, naming what differs."""
    mine, theirs = _settings(expected), _settings(found)
    differ = [key for key in (mine | theirs) if mine.get(key) != theirs.get(key)]
    if differ:
        each = "; ".join(f"its {key} is {theirs.get(key)!r}, this run's {mine.get(key)!r}" for key in differ)
        raise InputError(
            f"The checkpoint in {out} belongs to another run: {each}. Give the settings of that run, or another output "
            "folder."
        )


def _settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with each setting of each configuration by its name, numbered where there are several."""
    configs = identity.get("config")
    configs = configs if isinstance(configs, list) else [configs]
    settings = {key: value for key, value in identity.items() if key != "config"}
    for number, config in enumerate(configs):
        place = f"config {number}, " if len(configs) > 1 else ""
        entries = config if isinstance(config, dict) else {"config": config}
        settings |= {f"{place}{key}": value for key, value in entries.items()}
    return settings


def _whole(path: Path, record: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _damaged(path, key, value, f"a whole number from {least} to {most}")
    return value


def _require_numbers(path: Path, controller: Any) -> None:
    keys = {"log_weight", "l0", "seen", "gain"}
    if not isinstance(controller, dict) or controller.keys() != keys:
        raise _damaged(path, "controller", controller, f"an object of {', '.join(sorted(keys))}")
    for key, value in controller.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
            raise _damaged(path, key, value, "a finite number")


def _damaged(path: Path, key: str, value: Any, expected: str) -> FileFormatError:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:60] + "…"
    return FileFormatError(f"{path} has {key} = {shown}; expected {expected}; {_ADVICE}.")


def _folders(out: Path) -> list[Path]:
    named = (path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{8,}", path.name))
    return sorted((path for path in named if path.is_dir()), key=lambda path: int(path.name.partition("-")[2]))


_LOCK = ".training.lock"


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Make the folder and hold its lock, which a process that ends or is killed gives back; None for no folder.

    The same thread may hold it several times over. `InputError` where another training has it.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / _LOCK, timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"Another training is running in {folder}; wait for its end, or give another output folder."
        ) from error
    except NotImplementedError:  # a network file system without locks
        yield
        return
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        yield
    finally:
        lock.release()
