"""All commands as one program. Thin, and imports torch only inside a command."""

import io
import logging
import sys

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from circuitsae.commands.activations import activations
from circuitsae.commands.attention import attention
from circuitsae.commands.audit import audit
from circuitsae.commands.benchmark import benchmark
from circuitsae.commands.circuit import circuit
from circuitsae.commands.compare import compare
from circuitsae.commands.connections import connections
from circuitsae.commands.convert import convert
from circuitsae.commands.crosscoders import crosscoder, diff
from circuitsae.commands.dictionaries import dictionaries
from circuitsae.commands.evaluate import evaluate
from circuitsae.commands.exchange import export_graph, import_graph
from circuitsae.commands.explain import explain, import_labels
from circuitsae.commands.features import features
from circuitsae.commands.finetune import finetune
from circuitsae.commands.graphs import show, trace, validate
from circuitsae.commands.intervene import intervene
from circuitsae.commands.label import label
from circuitsae.commands.lens import fit_lens, lens
from circuitsae.commands.patch import causal_trace, patch
from circuitsae.commands.persist import persist
from circuitsae.commands.refine import refine
from circuitsae.commands.reproduce import reproduce
from circuitsae.commands.serve import serve
from circuitsae.commands.shared import Wide, counts
from circuitsae.commands.shift import shift
from circuitsae.commands.steer import steer
from circuitsae.commands.train import train
from circuitsae.commands.verdicts import verdicts
from circuitsae.tables import open_console
from transcoders.errors import CheckFailedError, InputError

app = tyro.extras.SubcommandApp()
for command in (
    trace, validate, attention, show, serve, compare, persist, activations, train, refine, finetune, evaluate,
    benchmark, crosscoder, diff, shift, intervene, steer, circuit, reproduce, audit, lens, fit_lens, patch,
    causal_trace,
):  # fmt: skip
    app.command(command)
features.command(label)
features.command(explain)
features.command(name="import-labels")(import_labels)
app.command(features, name="features", help="Feature cards and labels: collect them over a corpus, and browse them.")
app.command(connections)
app.command(dictionaries, name="dictionaries", help="Dictionaries by name: list, describe, mix and upload them.")
app.command(convert)
app.command(name="import")(import_graph)
app.command(name="export")(export_graph)
app.command(verdicts)


@app.command
def doctor(*, tune: tyro.conf.FlagCreatePairsOff[bool] = False, wide: Wide = False) -> None:
    """Versions, device, threads, memory, what is missing, and from which size on a device is faster than the CPU.

    Args:
        tune: First measure that, within two minutes, and keep it for this machine: a model's size from which an
            accelerator is faster than the CPU, and where kernels of active features alone are faster than dense ones.
    """
    from circuitsae.doctor import diagnose, tuned

    console = open_console(wide)
    if tune:
        tuned(console)
    if not diagnose(console):
        raise CheckFailedError(
            "something required is missing (see the table); install it with `pip install --upgrade circuitsae`"
        )


def run(arguments: list[str] | None) -> None:
    """Run a command; what was wrong is one sentence on stderr and an exit code: 1 a check failed, 2 wrong use."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever a path or a token holds can be printed
    errors = Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)]
    )
    try:
        app.cli(
            prog="circuitsae",
            description="Attribution graphs of language models, with every edge tested by intervention.",
            args=arguments,
            config=(tyro.conf.UseAppendAction,),  # an option takes one value and may be repeated
            registry=counts(),
            sort_subcommands=False,
        )
    except InputError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except CheckFailedError as error:
        errors.print(f"[red]check failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
