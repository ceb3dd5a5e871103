"""Who makes labels and judges them: a language model behind an address, or one of transformers on this machine."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transcoders.errors import InputError
from transcoders.hub import first_line

Messages = Sequence[Mapping[str, str]]
"""What is asked, in OpenAI's form: `role` and `content` of each."""
KEY = "OPENAI_API_KEY"
"""The environment variable that holds the key of an address, unless another is named."""
_LATER = (408, 409, 425, 429)
_LONGEST_WAIT = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and what it is charged for."""

    text: str
    tokens_in: int
    tokens_out: int


@runtime_checkable
class Explainer(Protocol):
    """A language model that answers messages with text, always the same where it can."""

    @property
    def name(self) -> str:
        """Which model it is: the source of the labels that it makes."""
        ...

    @property
    def at_once(self) -> int:
        """How many questions it may be asked at the same time."""
        ...

    def answer(self, messages: Messages, most: int) -> Answer:
        """The answer, of at most so many tokens. Raises `InputError` where there is none to be had."""
        ...


class Address:
    """A model behind any address that speaks OpenAI's chat completions: a service, vLLM, llama.cpp, Ollama, TGI.

    `key` is sent to that address and kept nowhere. What may pass (no connection, a timeout, HTTP 408, 429 and 5xx) is
    tried `tries` times, after `wait`, 2·`wait`, 4·`wait` … seconds, or later where the server says when.
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        key: str | None = None,
        timeout: float = 120.0,
        tries: int = 5,
        wait: float = 1.0,
        at_once: int = 8,
    ) -> None:
        if not address.startswith(("http://", "https://")):
            raise InputError(f"{address!r} is no address; expected one such as https://api.openai.com/v1.")
        if not model.strip():
            raise InputError(f"Which model should {address} answer with? Give its name there, such as gpt-4o-mini.")
        if tries < 1 or at_once < 1:
            raise InputError(f"tries={tries} and at_once={at_once} must be 1 or more.")
        from huggingface_hub import InferenceClient

        self.address, self.model, self.tries, self.wait, self.at_once = address, model, tries, wait, at_once
        self._key = key
        # Without a key of its own the client would send the hub's token, which is none of this address's business.
        self._client: Any = InferenceClient(base_url=address, api_key=key or "none", timeout=timeout)
        self._sizes, self._choosing = {"max_tokens": True, "temperature": True}, threading.Lock()

    @classmethod
    def with_key_of(cls, variable: str, address: str, model: str, **how: Any) -> "Address":
        """With the key that an environment variable holds; without a key where it is not set."""
        return cls(address, model, key=os.environ.get(variable) or None, **how)

    @property
    def name(self) -> str:
        return self.model

    def answer(self, messages: Messages, most: int) -> Answer:
        for attempt in range(self.tries):
            try:
                return self._read(self._asked(messages, most))
            except InputError:
                raise
            except Exception as error:  # of whichever HTTP library the client uses
                status, last = _status(error), attempt + 1 == self.tries
                if status is not None and status < 500 and status not in _LATER:
                    raise InputError(self._said(error, status)) from None
                if last:
                    raise InputError(self._said(error, status, f" after {self.tries} tries")) from None
                time.sleep(max(self.wait * 2**attempt, _later(error)))
        raise AssertionError("unreachable")

    def _asked(self, messages: Messages, most: int) -> Any:
        asked: dict[str, Any] = {"messages": list(messages), "model": self.model}
        for _ in range(3):
            limit = {"max_tokens": most} if self._sizes["max_tokens"] else {}
            cool = {"temperature": 0.0, "seed": 0} if self._sizes["temperature"] else {}
            more = {} if limit else {"extra_body": {"max_completion_tokens": most}}
            try:
                return self._client.chat_completion(**asked, **limit, **cool, **more)
            except Exception as error:
                if _status(error) != 400 or not self._without(str(error)):
                    raise
        raise InputError(f"{self.address} refuses both ways to say how long an answer may be; try another model.")

    def _without(self, refusal: str) -> bool:
        """Leave out what a model refuses to be told: those that think first take neither of the two."""
        with self._choosing:
            told = [name for name in ("max_tokens", "temperature") if self._sizes[name] and name in refusal]
            for name in told:
                self._sizes[name] = False
            return bool(told)

    def _read(self, found: Any) -> Answer:
        try:
            text, usage = found.choices[0].message.content or "", found.usage
            return Answer(str(text), int(usage.prompt_tokens), int(usage.completion_tokens))
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.address} answered something that is no chat completion ({first_line(error)}); expected "
                "choices and usage as in OpenAI's interface."
            ) from None

    def _said(self, error: Exception, status: int | None, when: str = "") -> str:
        """One sentence, without the key, which servers like to repeat."""
        said = first_line(error) if status is None else f"HTTP {status}: {_body(error)}"
        said = said.replace(self._key, "…") if self._key else said
        hint = {401: "check the key", 403: "check the key", 404: "check the address and the model's name"}
        do = hint.get(status or 0, "try again later; the answers that came are kept")
        return f"{self.address} gives no answer{when} ({said[:200]}); {do}."


class Local:
    """A causal model of transformers on this machine, by hub name or folder; it answers greedily."""

    at_once = 1

    def __init__(self, source: str, *, device: str = "auto", dtype: str = "auto") -> None:
        from transcoders.hf_models import Chat
        from transcoders.hub import model_source

        self._chat = Chat(model_source(source), device=device, dtype=dtype)
        self.name = Path(source).name if Path(source).exists() else source

    def answer(self, messages: Messages, most: int) -> Answer:
        return Answer(*self._chat.answer(messages, most))


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _body(error: Exception) -> str:
    """What a server says of its refusal, in one line."""
    try:
        return " ".join(str(error.response.text).split()) or "nothing more"  # pyright: ignore[reportAttributeAccessIssue]
    except Exception:  # a stream that was not read
        return first_line(error)


def _later(error: Exception) -> float:
    """After how many seconds a server wants to be asked again."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return min(max(float(headers.get("retry-after", 0)), 0.0), _LONGEST_WAIT)
    except ValueError:  # a date
        return 0.0
