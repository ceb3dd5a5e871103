"""Workers in processes of their own: what they are asked is a line, what they answer a line that begins with a mark."""

import json
import math
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ANSWER = "@@"
"""Marks the answer among the lines that libraries print."""
_GOODBYE = 20.0
"""Seconds that a worker has to end."""


def answer_in(lines: Iterable[str]) -> Any:
    """The first answer among some lines; None where there is none."""
    marked = (line.removeprefix(ANSWER) for line in lines if line.startswith(ANSWER))
    found = next(marked, None)
    return None if found is None else json.loads(found)


def _end(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()  # before its pipe is closed, which whoever reads it takes for the end
    process.kill()


class AnsweringProcess:
    """A worker that is asked one task after the other, begun at the first and anew where it died."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command, self.environment = list(command), dict(environment)
        self.process: subprocess.Popen[str] | None = None
        self.log = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process

    def ask(self, task: str, *, seconds: float = math.inf) -> dict[str, Any]:
        """Its answer; `error`, with its last words, where it ended instead, or was ended after so many seconds."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
                env=self.environment,
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        late = threading.Event()
        patience = threading.Timer(min(seconds, threading.TIMEOUT_MAX), _end, (self.process, late))
        patience.daemon = True
        patience.start()
        try:
            self.process.stdin.write(task + "\n")
            self.process.stdin.flush()
            found = answer_in(self.process.stdout)
        except BrokenPipeError:
            found = None
        if found is None:
            self.process.wait()  # its pipe is closed some time before it has ended, and is begun anew
        patience.cancel()
        if found is None and late.is_set():
            return {"error": f"no answer within {seconds:g} s"}
        return self._ended() if found is None else found

    def _ended(self) -> dict[str, Any]:
        self.log.seek(0)
        return {"error": "the process ended: " + self.log.read()[-500:].decode(errors="replace").strip()}

    def stop(self) -> None:
        if self.process is not None:
            try:
                self.process.communicate(timeout=_GOODBYE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()
        self.log.close()
