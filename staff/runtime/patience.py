"""The hub's client: how long it keeps trying, by which protocol, and what the log says meanwhile.

By itself it tries for minutes without a word, and its retries cannot be set. Here a request is repeated with a line
in the log, until the hub has been silent for too long.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from staff.runtime.progress import EVERY

log = logging.getLogger(__name__)

REPEATED = (408, 429, 500, 502, 503, 504)
"""HTTP states that may pass."""
QUIET = 5.0
"""Seconds of downloading after which the log has a line."""
CUTS = 2
"""A download that breaks off so often at the same byte has failed."""
SILENCE = 7.0
"""Seconds without a byte after which a request has failed."""


CLIENTS = ("huggingface_hub", "httpx", "httpx2", "filelock")
"""Libraries that log every request, retry or lock."""


class Unanswered(Exception):
    """The hub was given up. No kind of error that the client knows, so that it does not try again."""


class Patience:
    """The patience with the requests for one name; several threads share it.

    Args:
        name: of the model or data set, for the log.
        seconds: without any answer after which to give up.
        repeat: False: give up at the first failure.

    Attributes:
        refused: the HTTP state of a refusal, which another request cannot change; None: there was none.
    """

    def __init__(self, name: str, seconds: float, repeat: bool = True) -> None:
        self.name, self.seconds, self.repeat = name, seconds, repeat
        self.refused: int | None = None
        self._lost: str | None = None
        self._said: set[str] = set()
        self._opened: Counter[tuple[str, str | None]] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block, the hub's client asks with this patience, and logs nothing itself."""
        from huggingface_hub import get_session

        client: Any = get_session()
        client.send = partial(self._send, client.send)
        levels = {logger: logger.level for logger in map(logging.getLogger, CLIENTS)}
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            del client.send  # the method of the class again
            for logger, level in levels.items():
                logger.setLevel(level)

    def _send(self, send: Callable[..., Any], request: Any, **options: Any) -> Any:
        """The answer to a request: of success, or of a failure that lasts.

        Raises:
            Unanswered: no answer in time, or downloads that break off again and again.
        """
        limit = min(SILENCE, self.seconds)
        given = request.extensions.get("timeout") or {}
        timeout = {part: min(given.get(part) or limit, limit) for part in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": timeout}
        if re.search("/api/(?!models/|datasets/)", request.url.path):  # the client's own business
            return send(request, **options)
        started, tries = time.monotonic(), 0
        while True:
            if self._lost:
                raise Unanswered(self._lost)
            problem, pause, response = self._ask(send, request, options)
            if problem is None:
                return response
            pause = pause or 2.0**tries
            tries += 1
            with self._lock:
                if not self.repeat or time.monotonic() + pause - started > self.seconds:
                    self._lost = self._lost or problem
                    raise Unanswered(self._lost)
                news = problem not in self._said
                self._said.add(problem)
            if news:
                log.info("%s: %s; asking again for up to %g s", self.name, problem, self.seconds)
            time.sleep(pause)

    def _ask(self, send: Callable[..., Any], request: Any, options: dict) -> tuple[str | None, float | None, Any]:
        """A problem that may pass and seconds to wait, or the answer."""
        try:
            response = send(request, **options)
        except Exception as error:
            if not any(kind.__name__ == "TransportError" for kind in type(error).__mro__):  # of httpx or httpx2
                raise
            said = " ".join(str(error).split())
            return f"the hub does not answer, {type(error).__name__}{said and f': {said}'}", None, None
        if response.status_code in REPEATED:
            response.close()
            pause = _asked_pause(response.headers)
            wish = f" and asks to wait {pause:g} s" if pause else ""
            return f"the hub answers HTTP {response.status_code}{wish}", pause, None
        with self._lock:
            if response.status_code in (401, 403, 404):
                self.refused = response.status_code
            if request.method == "GET" and options.get("stream"):
                self._check_cuts(request, response)
        return None, None, response

    def _check_cuts(self, request: Any, response: Any) -> None:
        """Give up a file that breaks off again and again without a byte more."""
        at = (str(request.url), request.headers.get("Range"))
        file = request.url.path.rsplit("/", 1)[-1]
        self._opened[at] += 1
        if self._opened[at] > CUTS:
            response.close()
            self._lost = f"the download of {file} breaks off"
            raise Unanswered(self._lost)
        if at[1] or self._opened[at] > 1:
            log.info("%s: the download of %s broke off; it goes on", self.name, file)


def _asked_pause(headers: Any) -> float | None:
    """Seconds that the hub asks to wait, by Retry-After or by its rate limit."""
    after = headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


@contextmanager
def over_http() -> Iterator[None]:
    """Within the block, files in the Xet store come over HTTP, unless the user has set HF_HUB_DISABLE_XET."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = before or "HF_HUB_DISABLE_XET" not in os.environ
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def progress_logged(name: str, downloading: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Within the block, a line in the log after some seconds of downloading, and then now and again.

    Args:
        name: of the model or data set.
        downloading: gives the files that are being written.
    """
    done = threading.Event()

    def tell() -> None:
        pause = QUIET
        while not done.wait(pause):
            size = 0
            for blob in downloading():
                with suppress(OSError):  # moved or removed meanwhile
                    size += blob.stat().st_size
            log.info("waiting for %s of the hub: %.1f MB so far", name, size / 1e6)
            pause = EVERY

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()
