"""`circuitsae serve`: a graph's page with its model behind it."""

import secrets
import socket
import webbrowser
from contextlib import suppress
from pathlib import Path

import tyro

from circuitsae.commands.shared import (
    ChoiceOptions,
    Choices,
    WeightOptions,
    Weights,
    loader_for,
    page_parts,
    say,
    say_next,
)
from circuitsae.tables import open_console
from transcoders.errors import InputError

HOST = "127.0.0.1"


def serve(
    graph: tyro.conf.Positional[Path],
    /,
    *,
    port: int = 0,
    open: bool = True,
    model: str | None = None,
    dictionaries: str | None = None,
    device: str = "auto",
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Open a graph's page with its model behind it: remove, scale and swap nodes, test edges, keep labels and groups.

    Only this machine is served, under an address that nobody can guess; Ctrl-C ends it. Labels, pins, groups and notes
    are written to the graph's folder, and nothing anywhere else.

    Args:
        graph: The folder that `trace` wrote.
        port: Of the address; 0: any that is free.
        open: Open the page in a browser.
        model: The model the graph was made with; default, the one that the graph names.
        dictionaries: The dictionaries it was made with; the pocket model has its own.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model; default, those that the graph names.
        choices: Which of the dictionaries that the name offers; default, those that the graph names.
    """
    import uvicorn

    from circuitsae.graph import load_graph
    from circuitsae.serving.app import Served, make_app
    from circuitsae.serving.runs import Runs

    console, loaded = open_console(False), load_graph(graph)
    load = loader_for(loaded, model, dictionaries, device, weights, choices)
    with _listen(port) as listening:
        served = Served(graph, Runs(loaded, load), **page_parts(loaded))
        token, number = secrets.token_urlsafe(24), listening.getsockname()[1]
        address = f"http://{HOST}:{number}/{token}/"
        say(console, f"Page:  {address}", "Ctrl-C ends it; whoever has this address, on this machine, can use it.")
        console.file.flush()  # whoever reads it through a pipe waits for it
        if open:
            webbrowser.open(address)
        app = make_app(served, token=token, hosts=[f"{HOST}:{number}", f"localhost:{number}"])
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])
    say_next(console, f"circuitsae show {graph}")


def _listen(port: int) -> socket.socket:
    """A socket of this machine alone. Raises `InputError` where the port cannot be had."""
    if not 0 <= port < 2**16:
        raise InputError(f"--port {port} is no port; give a number from 1024 to 65535, or 0 for any that is free.")
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise InputError(f"--port {port} cannot be had ({error.strerror}); give another, or 0 for any.") from error
    return listening
