"""What this machine has, and what is missing."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.text import Text

from circuitsae.pocket import DICTIONARY_DIR, MODEL_DIR
from circuitsae.tables import Column, show_table

_PACKAGES = ("circuitsae", "torch", "transformer-lens", "transformers", "safetensors", "networkx", "plotly", "pandas")
_OPTIONAL = {
    "peft": "models with an adapter (`pip install peft`)",
    "bitsandbytes": "models quantised to 8 or 4 bits",
    "playwright": "the viewer's tests (`pip install 'circuitsae[tests]'`)",
}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def diagnose(console: Console) -> bool:
    """Print versions, device, threads, memory and what is missing; whether everything required is there."""
    versions = {name: _version(name) for name in _PACKAGES}
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    rows: list[tuple[str, str | Text]] = [("python", f"{platform.python_version()} on {system}")]
    rows += [(name, found or Text("missing", style="red")) for name, found in versions.items()]
    rows += (_device() | _memory()).items()
    pocket = {"pocket model": MODEL_DIR, "pocket dictionaries": DICTIONARY_DIR}
    for name, folder in pocket.items():
        rows.append(
            (
                name,
                "here"
                if folder.is_dir()
                else Text("missing; `pip install --force-reinstall --no-deps circuitsae` brings it back", style="red"),
            )
        )
    show_table(console, "circuitsae doctor", [Column("", text=True), Column("", wraps=True)], rows)
    if _version("torch") is not None:
        _show_devices(console)
    missing = [name for name, found in versions.items() if found is None]
    missing += [name for name, folder in pocket.items() if not folder.is_dir()]
    for name, use in _OPTIONAL.items():
        if _version(name) is None:
            console.print(f"Optional: {name} is not installed; needed only for {use}.", highlight=False)
    if not any(shutil.which(browser) for browser in _BROWSERS):
        console.print("Optional: no Chromium; needed only for the viewer's tests.", highlight=False)
    console.print(f"Missing: {', '.join(missing)}" if missing else "Everything required is here.", highlight=False)
    return not missing


def tuned(console: Console) -> None:
    """Measure the table of devices on this machine, and keep it."""
    from circuitsae.tuning import tune
    from transcoders.devices import write_table

    with console.status("measuring") as status:
        found = tune(say=status.update)
    path = write_table(found)
    console.print(f"Measured, and written to {path}.", highlight=False, soft_wrap=True, markup=False)


def _show_devices(console: Console) -> None:
    """The table in force, and where it lies."""
    import torch

    from transcoders.devices import WORKS, accelerators, choose_device, device_name, line_of, table_path

    here = accelerators()
    works = WORKS if here else ()
    columns = [Column("device", text=True), *(Column(f"{work} from", keep=1) for work in works)]
    columns += [Column("sparse kernels below", keep=2), Column("from features", keep=2), Column("measured", text=True)]
    rows = []
    for device in (torch.device("cpu"), *here):
        line = line_of(device)
        sizes = [_size(line.parameters[work]) if work in line.parameters else "" for work in works]
        kernels = [f"{100 * line.sparse_below:.2g} % active", f"{line.sparse_from:,}"]
        rows.append([device_name(device), *sizes, *kernels, line.measured or "built in"])
    title = "where a device is faster than the CPU, in parameters of a model" if here else "kernels of this machine"
    show_table(console, title, columns, rows)
    if not here:
        console.print(f"No accelerator: --device auto is {choose_device()}.", highlight=False)
    where = table_path()
    said = f"Measured: {where}." if where.is_file() else f"Nothing was measured; --tune does, and writes {where}."
    console.print(said, highlight=False, soft_wrap=True, markup=False)


def _size(parameters: float) -> str:
    if parameters in (0.0, float("inf")):
        return "always" if parameters == 0 else "never"
    return f"{parameters / 1e6:.3g} M"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> dict[str, str]:
    if _version("torch") is None:
        return {}
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("Apple GPU (mps)")
    return {
        "device": ", ".join(devices) or "CPU only",
        "threads": f"{torch.get_num_threads()} used by torch, {os.cpu_count()} on the machine",
    }


def _memory() -> dict[str, str]:
    free_disk = shutil.disk_usage(Path.cwd()).free / 2**30
    found = {"disk": f"{free_disk:.0f} GiB free here"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        found["memory"] = f"{total:.1f} GiB"
    return found
