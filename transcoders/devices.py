"""Where work is done when no device was named, and which kernels suit a device: one table, measured or built in.

`device="auto"` is the accelerator there is, CUDA before MPS, unless the model is so small that the CPU is faster: an
accelerator waits for each launch of a kernel, whatever little the kernel has to do. From which size on it pays is
measured by `circuitsae doctor --tune`, which writes `table_path()`; where that has nothing for this machine and this
torch, `BUILT_IN` holds.
"""

import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from transcoders.errors import InputError
from transcoders.files import write_json

logger = logging.getLogger(__name__)

AUTO = "auto"
Device = str | torch.device
Work = Literal["attribution", "training", "encode"]
"""Graphs and runs of a model; steps of training; activations of dictionaries."""
WORKS: tuple[Work, ...] = get_args(Work)


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is known of one device beside this machine's CPU."""

    parameters: Mapping[Work, float] = field(default_factory=dict)
    """Of a model, from which on the device is faster than the CPU, by work; infinite where it never was. Of a CPU
    none."""
    sparse_below: float
    """Density of active features below which kernels of active features alone are faster than dense products."""
    sparse_from: int
    """Features of a layer from which they can be."""
    launch_work: float = 5.8e10
    """Products in a block of a model that take as long as a pass over it does whatever its rows. Where it was not
    measured, of 8,192 tokens at a width of 768: an estimate."""
    measured: str = ""
    """When; empty of what is built in."""


_EVEN = dict.fromkeys(WORKS, 1e7)
BUILT_IN: Mapping[str, Line] = {
    "cpu": Line(sparse_below=0.05, sparse_from=512),
    "cuda": Line(parameters=_EVEN, sparse_below=0.05, sparse_from=512),
    "mps": Line(parameters=_EVEN, sparse_below=0.05, sparse_from=512),
}
"""By type of device, where nothing was measured.

Ten million parameters lie between two models that were once run on an H200: one of 1 M, whose graph took .166 s there
and .119 s on the CPU beside it, and one of 124 M, which was several times faster there. Nothing was measured on MPS.
Densities and widths are those of `benchmarks/sparse_kernels.py`, on a CPU.
"""


def accelerators() -> list[torch.device]:
    """One of each type that torch can use here, CUDA before MPS."""
    found = [torch.device("cuda")] if torch.cuda.is_available() and torch.cuda.device_count() else []
    return found + ([torch.device("mps")] if torch.backends.mps.is_available() else [])


def choose_device(
    device: Device | None = AUTO,
    *,
    parameters: float | None = None,
    work: Work = "attribution",
    dtype: torch.dtype = torch.float32,
) -> torch.device:
    """The device that was named; of `"auto"` (or None) the first accelerator, or the CPU where that is faster.

    `parameters`: of the model, roughly; None where that is not known, and the accelerator is taken. MPS has no float64.
    """
    if device is not None and device != AUTO:
        return torch.device(device)
    for accelerator in accelerators():
        if accelerator.type == "mps" and dtype == torch.float64:
            continue
        least = line_of(accelerator).parameters.get(work, 0.0)
        return accelerator if parameters is None or parameters >= least else torch.device("cpu")
    return torch.device("cpu")


def free_memory(device: torch.device, otherwise: int) -> int:
    """Bytes of a CUDA device that nothing holds, torch's own reserve included; of any other device `otherwise`."""
    if device.type != "cuda":
        return otherwise
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


# the table


def table_path() -> Path:
    """The table in the user's cache folder: `$XDG_CACHE_HOME`, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "circuitsae" / "devices.json"


def device_name(device: torch.device) -> str:
    """A device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name() if device.type == "cpu" else f"{processor_name()} ({device.type})"


def processor_name() -> str:
    """The processor as its maker calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def table_key(device: torch.device) -> str:
    """The name of a line: the device, of an accelerator the processor beside it, and torch's version."""
    beside = "" if device.type == "cpu" else f" beside {processor_name()}"
    return f"{device_name(device)}{beside}, torch {torch.__version__}"


def line_of(device: torch.device) -> Line:
    """The table's line of a device: what was measured here, or what is built in for its type."""
    return read_table().get(table_key(device)) or BUILT_IN.get(device.type, BUILT_IN["cuda"])


def read_table() -> dict[str, Line]:
    """All that was measured, by `table_key`; nothing, and a warning, where the file is not such a table."""
    path = table_path()
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {str(key): _line(value) for key, value in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        logger.warning("%s is no table of devices (%s); write it again with circuitsae doctor --tune.", path, error)
        return {}


def write_table(lines: Mapping[torch.device, Line]) -> Path:
    """Put measured lines into the table, beside those of other machines; returns where it lies."""
    path = table_path()
    kept = read_table() | {table_key(device): line for device, line in lines.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder.") from error
    write_json(path, {key: _stored(line) for key, line in kept.items()})
    return path


def _stored(line: Line) -> dict[str, Any]:
    """Without infinities, which JSON has not: null is never."""
    finite = {work: least if math.isfinite(least) else None for work, least in line.parameters.items()}
    return {**vars(line), "parameters": finite}


def _line(stored: Mapping[str, Any]) -> Line:
    never = {work: math.inf if least is None else float(least) for work, least in stored["parameters"].items()}
    found = Line(
        parameters={work: never[work] for work in WORKS if work in never},
        sparse_below=float(stored["sparse_below"]),
        sparse_from=int(stored["sparse_from"]),
        launch_work=float(stored.get("launch_work", Line.launch_work)),
        measured=str(stored.get("measured", "")),
    )
    return replace(found, sparse_from=max(1, found.sparse_from))
