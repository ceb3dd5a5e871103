"""A language model of which every answer is known: a server on this machine that speaks OpenAI's chat completions."""

import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

Asked = Sequence[dict[str, str]]


class ChatServer:
    """Answers by `rule`, unless `before` has something else left to do: a status, a body, or seconds of silence."""

    def __init__(self, rule: Callable[[Asked], str]) -> None:
        self.rule, self.before = rule, list[Any]()
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Answers(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.headers.append(dict(self.headers))
                server.answer(self, body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"

    def answer(self, request: http.server.BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        self.asked.append(body)
        match self.before.pop(0) if self.before else None:
            case (int(status), str(said)):
                return _send(request, status, said.encode())
            case int(status):
                return _send(request, status, json.dumps({"error": {"message": "no luck"}}).encode())
            case float(seconds):
                time.sleep(seconds)
            case bytes(content):
                return _send(request, 200, content)
            case str(text):
                return _send(request, 200, completion(text))
        return _send(request, 200, completion(self.rule(body["messages"])))

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(text: str) -> bytes:
    message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "system_fingerprint": "", "usage": usage,
         "choices": [message]}
    ).encode()  # fmt: skip


def by_token(messages: Asked) -> str:
    """Labels a feature with the token that it fires on most strongly, and judges by whether that token is there."""
    said = messages[1]["content"]
    if "LABEL:" in messages[0]["content"]:
        found = re.search(r"<<([^<>]*)>>\(10\)", said)
        assert found is not None
        return f"It is always the same.\nLABEL: {found[1].strip()}"
    first, *texts = said.split("\n")
    token = first.removeprefix("The feature is said to fire on: ")
    if "<<" in messages[0]["content"]:
        marks = [re.findall(r"<<(.*?)>>", text) for text in texts]
        return json.dumps([int(all(mark.strip() == token for mark in own)) for own in marks])
    return json.dumps([int(token in text.partition(": ")[2].split()) for text in texts])


def _send(request: http.server.BaseHTTPRequestHandler, status: int, content: bytes) -> None:
    try:
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
    except OSError:  # whoever asked has gone
        pass
