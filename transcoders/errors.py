"""Every exception of both packages.

    CircuitsaeError                 anything this distribution raises on purpose
    ├── InputError                  what was given cannot be used (also a ValueError; exit code 2)
    │   ├── ModelError              a model that is not there or cannot be read
    │   ├── PromptError             a prompt or target token the model cannot take
    │   ├── DictionaryError         a dictionary that does not belong to this model, width or frame
    │   ├── FileFormatError         a file that is not what it claims to be
    │   └── WriteError              a place that cannot be written to (the disk is full, …)
    └── CheckFailedError            a check was run and its answer is no (exit code 1)
        ├── NotFiniteError          a computation came to NaN or infinity
        └── LostRankError           another process of a distributed run does not answer any more

Each message says what was wrong (with the value), what was expected, and what to do.
"""


class CircuitsaeError(Exception):
    """Base of every error raised on purpose."""


class InputError(CircuitsaeError, ValueError):
    """What was given cannot be used."""


class ModelError(InputError):
    """A model that is not there or cannot be read."""


class PromptError(InputError):
    """A prompt or a target token that the model cannot take."""


class DictionaryError(InputError):
    """A dictionary that does not belong to this model, width or frame."""


class FileFormatError(InputError):
    """A file that is not what it claims to be."""


class WriteError(InputError):
    """A place that cannot be written to."""


class CheckFailedError(CircuitsaeError):
    """A check was run and its answer is no."""


class NotFiniteError(CheckFailedError):
    """A computation came to NaN or infinity."""


class LostRankError(CheckFailedError):
    """Another process of a distributed run does not answer any more."""


class Stopped(KeyboardInterrupt):
    """Work was asked to stop by a signal, has kept what it had, and says how to go on."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
        """As a shell has it: 130 for SIGINT (Ctrl-C), 143 for SIGTERM."""
