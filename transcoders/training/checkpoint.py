"""What a run is resumed from: one folder for each checkpoint, complete or not there at all.

One training at a time in an output folder. Which checkpoints stay: the latest ones, and the best where it is asked for.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from transcoders.errors import FileFormatError, InputError
from transcoders.files import file_hash, new_folder, remove_folder, write_error, write_json
from transcoders.formats.files import read_json, read_tensors
from transcoders.formats.one_by_one import write_one_by_one
from transcoders.precision import all_finite
from transcoders.training.split import Piece

TENSORS, RECORD = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything the rest of a run depends on besides model and corpus."""

    shapes: Mapping[str, Tensor]
    """Of each tensor, without its data."""
    tensors: Iterator[Tensor | None]
    """One after the other; None on ranks that write nothing, all of which take part."""
    record: dict[str, Any]

    def written(self) -> Iterator[Tensor]:
        for tensor in self.tensors:
            assert tensor is not None
            yield tensor

    def take_part(self) -> None:
        """What ranks do that write nothing, while another one writes."""
        for _ in self.tensors:
            pass


def save_checkpoint(out: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write the folder, whole or not at all."""
    folder = out / f"checkpoint-{step:08d}"
    with new_folder(folder) as temporary:
        write_one_by_one(temporary / TENSORS, checkpoint.shapes, checkpoint.written())
        write_json(temporary / RECORD, {**checkpoint.record, "sha256": file_hash(temporary / TENSORS)})


def keep_checkpoints(out: Path, step: int, *, keep_last: int, keep_best: bool) -> None:
    """Remove all but the last ones up to `step`, and the best where it is to stay.

    Those of later steps could not be resumed from, or the run would not be at this one.
    """
    there = checkpoints(out)
    stay = [folder for folder in there if _step(folder) <= step][-keep_last:]
    if keep_best and (best := _best([folder for folder in there if _step(folder) <= step])) is not None:
        stay.append(best)
    for other in there:
        if other not in stay:
            remove_folder(other)


def remove_checkpoints(out: Path) -> None:
    for folder in checkpoints(out):
        remove_folder(folder)


def checkpoints(out: Path) -> list[Path]:
    """The folders of a run's checkpoints, the earliest first."""
    named = (path for path in out.glob("checkpoint-*") if is_checkpoint(path))
    return sorted(named, key=_step)


def is_checkpoint(folder: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d{8,}", folder.name) is not None and folder.is_dir()


def latest_checkpoint(out: Path) -> Path | None:
    """The folder of a run's latest checkpoint, or None where it has none."""
    return max(checkpoints(out), key=_step, default=None)


def way_back(out: Path | None) -> str:
    """From where a run that stopped can go on, in a sentence."""
    folder = None if out is None else latest_checkpoint(out)
    if folder is None:
        return "There is no checkpoint to go back to."
    return f"The last good checkpoint is {folder}, from which `resume` (--resume) goes on."


Which = Literal["latest", "best"] | int
"""A checkpoint of a run: the latest, the one of the least `score`, or that of a step."""


def find_checkpoint(out: Path, which: Which = "latest") -> Path:
    """Its folder; `InputError` where there is none."""
    there = checkpoints(out)
    if not there:
        raise InputError(
            f"There is no checkpoint in {out}; give the output folder of a run, or one of its checkpoints."
        )
    if which == "latest":
        return there[-1]
    steps = {_step(folder): folder for folder in there}
    if which == "best":
        if (best := _best(there)) is None:
            raise InputError(
                f"No checkpoint in {out} can be compared with the others yet, as k, L0 or the penalty have not come to "
                f"their last values; take one by its step ({', '.join(map(str, steps))})."
            )
        return best
    if which not in steps:
        raise InputError(f"{out} has no checkpoint {which!r}; it has those of the steps {', '.join(map(str, steps))}.")
    return steps[which]


def _best(folders: Sequence[Path]) -> Path | None:
    """The one whose record has the least `score`, of equals the latest."""
    scored = [(score, -_step(folder), folder) for folder in folders if (score := _score(folder)) is not None]
    return min(scored)[2] if scored else None


def _score(folder: Path) -> float | None:
    try:
        score = read_json(folder / RECORD).get("score")
    except FileFormatError:  # a damaged one is not the best, and says so where it is resumed
        return None
    return float(score) if isinstance(score, int | float) and math.isfinite(score) else None


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def read_record(folder: Path, *, steps: int, runs: int) -> dict[str, Any]:
    """What a checkpoint says of itself; `FileFormatError` unless it can be of a run of so many steps."""
    path = folder / RECORD
    record = read_json(path)
    step = _whole(path, record, "step", 1, steps)
    data = record.get("data")
    if not isinstance(data, dict):
        raise damaged(path, "data", data, "an object")
    if "chunk" in data:
        # Every chunk holds a batch at least, so there were not more chunks than steps.
        chunk = _whole(path, data, "chunk", 0, step)
        _whole(path, data, "batch_in_chunk", 0, step - chunk)
    if not isinstance(record.get("run"), dict):
        raise damaged(path, "run", record.get("run"), "an object")
    states = record.get("runs")
    if not isinstance(states, list) or len(states) != runs:
        raise damaged(path, "runs", states, f"a list of {runs}")
    for state in states:
        sparse = state.get("sparse") if isinstance(state, dict) else None
        if not isinstance(sparse, list) or not all(isinstance(each, bool) for each in sparse):
            raise damaged(path, "runs", state, "objects with `sparse`, true or false for each layer")
        _require_numbers(path, state.get("controller"))
    return record


def read_state(
    folder: Path,
    record: Mapping[str, Any],
    device: torch.device,
    own: Callable[[str], tuple[str, Piece] | None] = lambda name: (name, Piece(name)),
) -> dict[str, Tensor]:
    """A checkpoint's tensors; `FileFormatError` where they are not those that were written with its record.

    `own`: of a tensor, the name it has on this rank and the piece of it that is here.
    """
    path, names = folder / TENSORS, {}

    def wanted(name: str) -> bool:
        names[name] = own(name)
        return names[name] is not None

    read, _ = read_tensors(
        path, device=device, wanted=wanted, part=lambda name, whole: names[name][1].cut(str(path), whole)
    )
    tensors = {names[name][0]: tensor for name, tensor in read.items()}
    if "sha256" in record and record["sha256"] != file_hash(path):
        raise FileFormatError(f"{path} was changed after it was written; {_DAMAGED}.")
    return tensors


def require_like(folder: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises `FileFormatError` unless there are the same names, of the same shapes and types, and all is finite."""
    path = folder / TENSORS
    if odd := sorted(found.keys() ^ expected.keys()):
        verb = "holds an unknown tensor" if odd[0] in found else "lacks the tensor"
        raise FileFormatError(f"{path} {verb} {odd[0]}; {_DAMAGED}.")
    for name, tensor in found.items():
        like = expected[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise FileFormatError(
                f"{path} has {name} as {list(tensor.shape)} of {tensor.dtype}; expected {list(like.shape)} of "
                f"{like.dtype}; {_DAMAGED}."
            )
        if not all_finite(tensor):
            raise FileFormatError(f"{path} has numbers in {name} that are not finite; {_DAMAGED}.")


def require_for_each_layer(folder: Path, values: Sequence[Any], n_layers: int) -> None:
    if len(values) != n_layers:
        raise damaged(folder / RECORD, "sparse", values, f"a list of {n_layers}")


_DAMAGED = "the checkpoint is damaged"


def _whole(path: Path, record: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise damaged(path, key, value, f"a whole number from {least} to {most}")
    return value


def _require_numbers(path: Path, controller: Any) -> None:
    keys = {"log_weight", "l0", "seen", "gain"}
    if not isinstance(controller, dict) or controller.keys() != keys:
        raise damaged(path, "controller", controller, f"an object of {', '.join(sorted(keys))}")
    for key, value in controller.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
            raise damaged(path, key, value, "a finite number")


def damaged(path: Path, key: str, value: Any, expected: str) -> FileFormatError:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:60] + "…"
    return FileFormatError(f"{path} has {key} = {shown}; expected {expected}; {_DAMAGED}.")


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
