"""Peak memory and CPU time of the stages of `trace` on prompts of several lengths; Linux only.

Run from the repository's root, with OMP_NUM_THREADS=1. Writes benchmarks/results/trace_memory.md.
"""

import ctypes
import gc
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path("benchmarks/results/trace_memory.md")
LENGTHS = (64, 236, 509)


def resident(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024


def stage(n: int, name: str, run: Callable[[], Any]) -> Any:
    """Run one stage and print its row of the table."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, used = resident("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    result = run()
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    print(f"| {n} | {name} | {before:.0f} | {resident('VmHWM'):.0f} | {cpu:.1f} |", flush=True)
    return result


def measure(n: int) -> None:
    from circuitsae.pocket.stories import story

    from circuitsae.attribution import attribute_pruned
    from circuitsae.commands.shared import load_replacement
    from circuitsae.validation import validate

    model = stage(n, "load", lambda: load_replacement("pocket", None, "cpu", "float32"))
    rng, words, ids = random.Random(0), "", []
    while len(ids) < n:
        for word in story(rng).split():
            words = f"{words} {word}".strip()
            ids = model.model.to_tokens(words)
            if len(ids) >= n:
                break
    graph, _ = stage(n, "attribute", lambda: attribute_pruned(model, ids[:n]))
    stage(n, "validate", lambda: validate(model, graph, edges=100))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        rows = [
            subprocess.run([sys.executable, __file__, str(n)], check=True, capture_output=True, text=True).stdout
            for n in LENGTHS
        ]
        head = "| tokens | stage | MB held before | peak MB | CPU-seconds |\n|---|---|---|---|---|\n"
        about = "Memory of the whole process by stage of `trace` on pocket, by `benchmarks/trace_memory.py`."
        RESULT.write_text(f"# Memory of a trace\n\n{about}\n\n{head}{''.join(rows)}")
