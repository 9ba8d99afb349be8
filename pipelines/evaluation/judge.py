"""Ask a judge model behind an OpenAI-compatible endpoint; replies are kept, so that none is paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from pipelines.errors import RunError
from pipelines.monitoring.progress import Progress
from pipelines.storage import store

KEY_VARIABLE = "OPENAI_API_KEY"
_TIMEOUT_S = 120
_CHECK_S = 20
_AT_ONCE = 8
_SAVE_EVERY = 64  # replies
_MAX_REPLY_TOKENS = 256
_BUSY = (408, 429, 500, 502, 503, 504)
_REFUSED = (400, 413, 422)  # of one prompt: the content, or its length


@dataclass(frozen=True)
class JudgeEndpoint:
    """Where a judge answers, and what it costs.

    url: up to and including /v1. price: US dollars per million tokens of prompts and of replies, None if unknown.
    """

    url: str
    model: str
    price: tuple[float, float] | None = None


@dataclass(frozen=True)
class Reply:
    """The judge's words, "" if it refused the prompt, and the tokens that they cost."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Judge:
    """Asks one model, with retries, and keeps its replies in the file `cache`."""

    def __init__(self, endpoint: JudgeEndpoint, cache: str) -> None:
        self.endpoint, self._cache = endpoint, cache
        stored = json.loads(store.read_bytes(cache)) if store.find_file(cache) else {}
        self._replies = {key: Reply(**reply) for key, reply in stored.items()}
        self._session = _open_session()

    def ask(self, prompts: Mapping[str, str]) -> dict[str, Reply]:
        """Return the reply to each prompt, under its key. Raise RunError if the endpoint does not answer."""
        keys = {name: self._make_key(prompt) for name, prompt in prompts.items()}
        missing = {key: prompts[name] for name, key in keys.items() if key not in self._replies}
        try:
            self._ask_missing(missing)
        finally:
            self._save()
        return {name: self._replies[key] for name, key in keys.items()}

    def compute_cost(self, replies: Iterable[Reply]) -> dict[str, float]:
        """Return the tokens of these replies, and their price in US dollars if it is known."""
        known = list({id(reply): reply for reply in replies}.values())  # equal prompts share a reply
        tokens = [sum(reply.prompt_tokens for reply in known), sum(reply.completion_tokens for reply in known)]
        cost: dict[str, float] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
        if self.endpoint.price is not None:
            price = self.endpoint.price
            cost["usd"] = round(sum(count * usd for count, usd in zip(tokens, price, strict=True)) / 1e6, 4)
        return cost

    def _ask_missing(self, prompts: Mapping[str, str]) -> None:
        if not prompts:
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool, Progress("answers judged", len(prompts)) as bar:
            try:
                for key, reply in zip(prompts, pool.map(self._post, prompts.values()), strict=True):
                    self._replies[key] = reply
                    bar.advance(1)
                    if bar.num_new % _SAVE_EVERY == 0:
                        self._save()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _make_key(self, prompt: str) -> str:
        return hashlib.sha256(f"{self.endpoint.model}\n{prompt}".encode()).hexdigest()

    def _post(self, prompt: str) -> Reply:
        body: Any = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": _MAX_REPLY_TOKENS,
        }
        url = f"{self.endpoint.url.rstrip('/')}/chat/completions"
        try:
            response = self._session.post(url, json=body, timeout=_TIMEOUT_S)
            if response.status_code in _REFUSED:
                return Reply("")
            response.raise_for_status()
            return _read_reply(response.json())
        except (requests.RequestException, KeyError, IndexError, TypeError, ValueError) as error:
            raise RunError(_describe(error, self.endpoint.url)) from error

    def _save(self) -> None:
        content = {key: vars(reply) for key, reply in self._replies.items()}
        store.write_bytes(self._cache, json.dumps(content).encode())


def check_endpoint(endpoint: JudgeEndpoint) -> None:
    """Raise RunError if nothing responds at the judge's URL; costs no tokens."""
    try:
        requests.get(endpoint.url, timeout=_CHECK_S)
    except requests.RequestException as error:
        raise RunError(_describe(error, endpoint.url)) from error


def _open_session() -> requests.Session:
    """Return a session that tries again when the endpoint is busy, and waits as long as it asks for."""
    session = requests.Session()
    retries = Retry(total=6, backoff_factor=1, status_forcelist=_BUSY, allowed_methods=None, raise_on_status=False)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries, pool_maxsize=_AT_ONCE))
    if key := os.environ.get(KEY_VARIABLE):
        session.headers["Authorization"] = f"Bearer {key}"
    return session


def _read_reply(content: Any) -> Reply:
    usage = content.get("usage") or {}
    text = content["choices"][0]["message"]["content"] or ""
    return Reply(str(text), usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))


def _describe(error: Exception, url: str) -> str:
    """Return what to tell about an endpoint that does not answer; the key is in no message."""
    response = getattr(error, "response", None)
    if response is None:
        return f"the judge at {url} does not answer as an OpenAI endpoint does ({type(error).__name__}); check --judge"
    hint = f"; set {KEY_VARIABLE}" if response.status_code in (401, 403) else "; check --judge and --judge-model"
    return f"the judge at {url} answers with HTTP {response.status_code}{hint}"
