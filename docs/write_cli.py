"""Writes docs/cli.md from the help that every command prints: `python docs/write_cli.py`."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from unittest.mock import patch

PAGE = Path(__file__).with_name("cli.md")
COLUMNS = 100
HEAD = """\
# Command line

Written by `python docs/write_cli.py` from what `circuitsae COMMAND --help` prints; do not edit it by hand.

`circuitsae --version` prints the version. Exit codes: 0 done, 1 a check failed, 2 wrong use, 130 interrupted, and
143 a training or tracing that SIGTERM ended. Counts may be written 50_000, 50k, 2M or 1G.

## Completion in the shell

`circuitsae --tyro-write-completion SHELL FILE` writes completion of commands and options; bash, zsh or fish.

<!-- skip: writes into the home folder -->
```bash
mkdir -p ~/.local/share/bash-completion/completions
circuitsae --tyro-write-completion bash ~/.local/share/bash-completion/completions/circuitsae

mkdir -p ~/.zfunc    # and in .zshrc, before compinit: fpath+=~/.zfunc
circuitsae --tyro-write-completion zsh ~/.zfunc/_circuitsae

circuitsae --tyro-write-completion fish ~/.config/fish/completions/circuitsae.fish
```
"""


def page() -> str:
    """The whole page, with a section for each command."""
    sections = [f"## {' '.join(command)}\n\n```text\n{plain(help_of(command))}\n```\n" for command in commands()]
    return "\n".join([HEAD, *sections])


def commands(above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """All commands in the order of the help; those of a group stand for it."""
    text = help_of(above)
    names = re.search(r"\{([^}]+)\}", text.split("\n\n")[0])
    if names is None or not re.search(r"^ subcommands\s*$", text, re.MULTILINE):
        return [above]
    return [command for name in names[1].split(",") for command in commands((*above, name.strip()))]


def help_of(command: tuple[str, ...]) -> str:
    from circuitsae.cli import main

    printed = io.StringIO()
    wide = {"COLUMNS": str(COLUMNS), "NO_COLOR": "1", "TERM": "dumb"}
    with patch.dict(os.environ, wide), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue()


def plain(text: str) -> str:
    """A help whose titles are headings; tyro underlines them where it writes to no terminal."""
    return re.sub(r"^ (\S.*)\n -+$", r"\1:", "\n".join(map(str.rstrip, text.splitlines())), flags=re.MULTILINE).strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE} written\n")
