"""Claim: `circuitsae --help` answers in under a second, because no command imports torch before it runs."""

import statistics
import subprocess
import sys
import time

from machine import write_table


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    ours = "import circuitsae.cli as c\ntry:\n c.main(['--help'])\nexcept SystemExit: pass"
    pairs = [(seconds(ours), seconds("import torch")) for _ in range(5)]
    help_s, torch_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        write_table(
            "startup",
            str(__doc__).strip(),
            ["`circuitsae --help` (s)", "`import torch` alone (s)", "ratio"],
            [[f"{help_s:.2f}", f"{torch_s:.2f}", f"{help_s / torch_s:.2f}"]],
        )
    )


if __name__ == "__main__":
    main()
