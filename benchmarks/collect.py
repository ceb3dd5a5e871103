"""Claim: collecting feature cards takes minutes on two cores and as much memory for a million tokens as for a quarter.

Feature cards of the pocket model's cross-layer transcoder (4 layers of 1,024 features), each size in a process of its
own. Without inputs and outputs, a second pass whose cost is that of `benchmarks/global_weights.py`. Peak memory is
that of the whole process; the last column is what model and dictionaries take before the pass.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from answers import answer_in
from machine import write_table

SIZES = (250_000, 500_000, 1_000_000)


def measured(tokens: int) -> dict[str, float]:
    """What the worker says of one size."""
    worker = Path(__file__).parent / "workers" / "collect_worker.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(worker), str(tokens), folder]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return answer_in(said.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=SIZES)
    rows = []
    for tokens in parser.parse_args().tokens:
        found = measured(tokens)
        cells = (
            f"{found['tokens']:,}", f"{found['wall']:.0f}", f"{found['cpu']:.0f}",
            f"{found['tokens'] / found['wall']:,.0f}", f"{found['peak_mb']:.0f}", f"{found['held_mb']:.0f}",
        )  # fmt: skip
        rows.append(cells)
        print(*cells, flush=True)
    columns = ["tokens", "wall (s)", "processor (s)", "tokens / s", "peak memory (MB)", "before the pass (MB)"]
    print(write_table("collect", str(__doc__).strip(), columns, rows))


if __name__ == "__main__":
    main()
