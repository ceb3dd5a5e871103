"""The server behind a graph's page: the page itself, runs of the model, and edits that are kept in the graph's folder.

    GET    /TOKEN/            the page
    POST   /TOKEN/runs        {"nodes", "operation", "value"} or {"edge"}: begins a run (`circuitsae.serving.asked`)
    GET    /TOKEN/runs/7      what run 7 is at, and what came of it
    DELETE /TOKEN/runs/7      cancels it
    PUT    /TOKEN/labels/2.713    {"text"}: the label of a feature of the graph
    PUT    /TOKEN/opened      {"pinned", "groups", "note", "notes"}: what the page opens with

No file is served, and what is asked for is not taken for a path. What went wrong is `{"error": one sentence}`.
"""

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from circuitsae.features.cards import FeatureCards
from circuitsae.features.ledger import Ledger, feature_id
from circuitsae.graph import Supernode
from circuitsae.graph.checking import Limits, MalformedError, parse_json
from circuitsae.report.cards import feature_keys, labels_data
from circuitsae.report.page import assemble, document
from circuitsae.serving.asked import parse_asked
from circuitsae.serving.edits import opened_in, own_labels, save_label, save_opened, with_own
from circuitsae.serving.guard import Guard, TooLargeError, body_of
from circuitsae.serving.runs import BusyError, Runs
from transcoders.errors import CircuitsaeError, InputError

_LIMITS = Limits(values=100_000)


@dataclass
class Served:
    """A graph in a folder, with what is known of its features."""

    folder: Path
    runs: Runs
    cards: FeatureCards | None = None
    ledger: Ledger | None = None
    """Labels of the dictionaries; those in the graph's own folder stand before them."""
    supernodes: list[Supernode] = field(default_factory=list)
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def page(self) -> str:
        """The page as it is now: with what was kept, and with the edges that were tested since."""
        graph = self.runs.graph
        data = document(
            graph, cards=self.cards, ledger=self._labels(), supernodes=self.supernodes, folder=self.folder,
            opened=opened_in(self.folder, graph.ids.tolist()),
        )  # fmt: skip
        data["serving"] = {"folder": str(self.folder)}
        return assemble(data, asks="'self'")

    def keep_label(self, feature: str, said: Any) -> dict[str, Any] | None:
        """Keep a feature's label; what the page shows of it, None where it has none now."""
        nodes, name = self.runs.graph.nodes_frame(), feature_id(feature)
        if name not in feature_keys(nodes):
            raise InputError(f"The graph has no feature {feature!r:.80}; label one of its own, written as LAYER.INDEX.")
        with self._writing:
            save_label(self.folder, name, said)
        return labels_data(self._labels(), nodes).get(name)

    def keep_opened(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keep pins, groups and notes."""
        with self._writing:
            return save_opened(self.folder, given, self.runs.graph.ids.tolist())

    def _labels(self) -> Ledger | None:
        return with_own(own_labels(self.folder), self.ledger)


def make_app(served: Served, *, token: str, hosts: Collection[str]) -> ASGIApp:
    """The server of a graph; `token` is the first part of every address, `hosts` its names (`127.0.0.1:8000`)."""

    async def page(_: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(served.page))

    async def begin(request: Request) -> Response:
        asked = parse_asked(await _sent(request), served.runs.graph)
        return JSONResponse(served.runs.start(asked).to_json(), status_code=202)

    async def look(request: Request) -> Response:
        return JSONResponse(served.runs[request.path_params["number"]].to_json())

    async def cancel(request: Request) -> Response:
        run = served.runs[request.path_params["number"]]
        run.cancelled.set()
        return JSONResponse(run.to_json())

    async def label(request: Request) -> Response:
        said = (await _sent(request)).get("text")
        found = await run_in_threadpool(served.keep_label, request.path_params["feature"], said)
        return JSONResponse({"label": found})

    async def opened(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(served.keep_opened, await _sent(request)))

    routes = [
        Route("/", page),
        Route("/runs", begin, methods=["POST"]),
        Route("/runs/{number:int}", look, methods=["GET"]),
        Route("/runs/{number:int}", cancel, methods=["DELETE"]),
        Route("/labels/{feature}", label, methods=["PUT"]),
        Route("/opened", opened, methods=["PUT"]),
    ]
    handlers = {CircuitsaeError: _refused, HTTPException: _not_there}
    app = Starlette(routes=[Mount(f"/{token}", routes=routes)], exception_handlers=handlers)  # pyright: ignore[reportArgumentType]
    return Guard(app, token=token, hosts=hosts)


async def _sent(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises `InputError` for anything else."""
    content = await body_of(request)
    try:
        return parse_json(content, _LIMITS)
    except MalformedError as error:
        raise _MalformedRequestError(f"The request cannot be read: {error}.") from error


class _MalformedRequestError(InputError):
    pass


_STATUS = ((TooLargeError, 413), (BusyError, 409), (_MalformedRequestError, 400))


async def _refused(_: Request, error: Exception) -> Response:
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 422)
    return JSONResponse({"error": str(error)}, status_code=status)


async def _not_there(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": f"There is nothing here ({error.detail})."}, status_code=error.status_code)
