"""The machine a result was measured on, the rate it was trained with, and where results are written."""

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from transcoders.files import write_file

RESULTS = Path(__file__).parent / "results"


def earlier_rate(features: int) -> float:
    """The default learning rate until `learning_rate.py` measured it: what most tables here were trained with."""
    return 4e-3 * min(1.0, (512 / features) ** 0.5)


def machine() -> str:
    """One line: processor or GPU, threads, versions."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_table(name: str, claim: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write `results/<name>.md` with the claim, the machine and a Markdown table; returns its text."""
    text = table_text(name, claim, machine(), columns, rows)
    write_file(RESULTS / f"{name}.md", text)
    return text


def table_text(name: str, claim: str, where: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A page with the claim, the machine and a Markdown table."""
    lines = [f"# {name}", "", claim, "", f"Machine: {where}", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"
