"""The report and the page of samples in a real browser: Chromium, driven by its protocol through two pipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from experiments.recorded import recorded_runs
from experiments.report.__main__ import write
from experiments.report.browse import browse
from experiments.report.records import collect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither Chromium nor Chrome is installed")
WIDTHS, SCHEMES = (1280, 600), ("light", "dark")


class Browser:
    """A page of a headless browser.

    Attributes:
        errors: what the console and the log of the browser have said of the page.
    """

    def __init__(self, profile: Path):
        (ours, self._write), (self._read, theirs) = os.pipe(), os.pipe()

        def as_three_and_four() -> None:  # where the browser looks for its pipes
            first, second = os.dup(ours), os.dup(theirs)
            os.dup2(first, 3)
            os.dup2(second, 4)

        how = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        self.process = subprocess.Popen(
            [str(CHROMIUM), *how, "about:blank"],
            preexec_fn=as_three_and_four,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours)
        os.close(theirs)
        self.errors: list[str] = []
        self._number, self._session, self._rest = 0, "", b""
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, told
                return told["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        told = json.loads(message)
        event = told.get("method")
        if event in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.errors.append(json.dumps(told["params"]))
        return told

    def open(self, file: Path, width: int, scheme: str) -> None:
        """Show a file in a window of this width, and wait until it is loaded."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=file.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript comes to, once its promise is kept."""
        told = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._write)
        os.close(self._read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both pages of the committed slice."""
    results = tmp_path_factory.mktemp("pages") / "slice"
    shutil.copytree(ROOT / "results/slice", results)
    (staff,) = (name for name in recorded_runs(results) if "-staff-" in name)
    return {"report": write(results, collect(results)), "samples": browse(results / "runs" / staff)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "samples"])
def test_a_page_fits_its_window_without_an_error_by_day_and_by_night(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
):
    browser.errors.clear()
    browser.open(pages[name], width, scheme)
    assert browser.value("document.body.scrollWidth <= document.documentElement.clientWidth")
    assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    back = browser.value("getComputedStyle(document.documentElement).backgroundColor")
    assert browser.value("getComputedStyle(document.body).color") != back, "text can be read"
    assert browser.errors == []


def test_what_is_searched_for_filters_the_samples(browser: Browser, pages: dict[str, Path]):
    browser.open(pages["samples"], 1280, "light")
    count = "document.getElementById('count').textContent"
    assert browser.value(count) == "48 of 48 samples"
    data = browser.value("JSON.parse(document.getElementById('data').textContent)")
    id = data["rows"][3][[column["name"] for column in data["columns"]].index("id")]
    holding = sum(id in json.dumps(row) for row in data["rows"])
    browser.value(
        f"new Promise(kept => {{ const find = document.getElementById('find'); find.value = {id!r};"
        "find.dispatchEvent(new Event('input')); setTimeout(kept, 500); })"
    )
    assert browser.value(count) == f"{holding} of 48 samples" and 0 < holding < 48
    shown = browser.value("[...document.querySelectorAll('#space .row')].map(row => row.textContent)")
    assert len(shown) == holding and all(id in row for row in shown)
    assert browser.errors == []
