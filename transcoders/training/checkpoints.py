"""What a run is resumed from: one folder for each checkpoint, complete or not there at all."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoders.errors import InputError
from transcoders.files import new_folder, write_json
from transcoders.formats.files import read_json, read_tensors, write_tensors


@dataclass(frozen=True)
class Checkpoint:
    """Everything the rest of a run depends on besides model and corpus."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def save_checkpoint(out: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write the folder, whole or not at all, and remove the others."""
    folder = out / f"checkpoint-{step:08d}"
    with new_folder(folder) as temporary:
        write_tensors(temporary / "state.safetensors", checkpoint.tensors)
        write_json(temporary / "state.json", checkpoint.record)
    remove_checkpoints(out, but=folder)


def remove_checkpoints(out: Path, *, but: Path | None = None) -> None:
    for folder in _folders(out):
        if folder != but:
            shutil.rmtree(folder)


def load_checkpoint(out: Path, device: torch.device) -> Checkpoint | None:
    """The latest checkpoint of a run, or None where it has none."""
    folders = _folders(out)
    if not folders:
        return None
    tensors, _ = read_tensors(folders[-1] / "state.safetensors", device=device)
    return Checkpoint(tensors, read_json(folders[-1] / "state.json"))


def require_same_run(out: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises `InputError` where a checkpoint belongs to another model, corpus or configuration."""
    for key, value in expected.items():
        if found.get(key) != value:
            raise InputError(
                f"The checkpoint in {out} belongs to another run: its {key} is {found.get(key)!r}, this run's "
                f"{value!r}; give another output folder, or the settings of that run."
            )


def _folders(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-*"))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, one named tensor for each parameter and moment."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": value for i, moments in state.items() for key, value in moments.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
