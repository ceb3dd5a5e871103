"""The command line. Thin, and imports torch only inside a command."""

import logging
import os
import sys

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

import circuitsae
from circuitsae.commands.compare import compare
from circuitsae.commands.evaluate import evaluate
from circuitsae.commands.exchange import export_graph, import_graph
from circuitsae.commands.features import features
from circuitsae.commands.graphs import show, trace, validate
from circuitsae.commands.intervene import intervene
from circuitsae.commands.reproduce import reproduce
from circuitsae.commands.shared import counts
from circuitsae.commands.steer import steer
from circuitsae.commands.train import train
from transcoders.errors import CheckFailedError, InputError

app = tyro.extras.SubcommandApp()
for command in (trace, validate, show, compare, train, evaluate, intervene, steer, reproduce):
    app.command(command)
app.command(features, name="features", help="Feature cards: collect them over a corpus, and browse them.")
app.command(name="import")(import_graph)
app.command(name="export")(export_graph)


@app.command
def doctor() -> None:
    """Versions, device, threads, memory, and what is missing."""
    from circuitsae.doctor import diagnose

    if not diagnose(Console()):
        raise CheckFailedError(
            "something required is missing (see the table); install it with `pip install --upgrade circuitsae`"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Exit codes: 0 done, 1 a check failed, 2 wrong use."""
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"circuitsae {circuitsae.__version__}")
        return
    # Threads that spin while they wait make torch several times slower on a busy machine; read when torch starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    errors = Console(stderr=True)
    try:
        app.cli(
            prog="circuitsae",
            description="Attribution graphs of language models, with every edge tested by intervention.",
            args=arguments,
            registry=counts(),
            sort_subcommands=False,
        )
    except InputError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except CheckFailedError as error:
        errors.print(f"[red]check failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
