"""A run's page on Weights & Biases, which mirrors what happens in the run and, at its end, what it recorded.

Curves are `finetune/target/loss` and others by stage and model, each over its own `step`; stages are `stage/label`
and `stage/event`. No error of W&B ends a run: it costs one line in the log.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from staff.errors import UserError
from staff.runtime import processes
from staff.store.stage import Event, Stage, StageEnded, StageStarted, TrainingLogged
from staff.tracking import pages

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
LOST = "metrics.json is still the record, and `staff-replay` uploads it later"
SETTINGS = ("mode", "project", "entity", "group", "tags")
KEPT = ("loss", "learning_rate", "grad_norm", "epoch", "tokens_per_second", "memory_gb")
"""What a curve holds."""
TAG = 64
"""Characters of a tag, at most."""


def check(tracking: Mapping[str, Any]) -> None:
    """Refuse settings of the group `tracking` that W&B would refuse.

    Raises:
        UserError: an unknown setting or mode, or a tag that is no text of 1 to 64 characters.
    """
    mode, tags = tracking["mode"], tracking.get("tags") or []
    if unknown := sorted(set(tracking) - set(SETTINGS)):
        raise UserError(f"tracking.{unknown[0]} is not a setting: choose from {', '.join(SETTINGS)}.")
    if mode not in MODES:
        raise UserError(f"tracking.mode={mode!r} is unknown: choose from {', '.join(MODES)}.")
    listed = isinstance(tags, Sequence) and not isinstance(tags, str)
    if not listed or not all(0 < len(str(tag)) <= TAG for tag in tags):
        raise UserError(f"tracking.tags={tags!r} must be a list of tags of 1 to {TAG} characters, such as [pilot].")


@dataclass(frozen=True)
class About:
    """What a page shows of its run from the start.

    Attributes:
        folder: of the run; W&B's files go to `folder`/wandb.
        config: the configuration, grouped as in YAML. Its `tracking` names project, entity, tags and group.
        facts: of the record, under "run": name, fingerprint, the choices of the configuration, rate and seeds.
        curves: the name of a fine-tuning's curves, such as finetune/target.
    """

    folder: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    curves: Callable[[Stage], str] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The arguments of `wandb.init`. The id is from the fingerprint, so that a run finds its page again."""
        tracking, facts = self.config["tracking"], self.facts
        return {
            "dir": self.folder,
            "project": tracking.get("project"),
            "entity": tracking.get("entity"),
            "group": tracking.get("group") or facts.get("experiment") or facts.get("sweep"),
            "job_type": facts.get("method") or "custom",
            "id": facts["fingerprint"][:16],
            "name": facts["name"],
            "tags": self.tags,
            "config": {**self.config, "run": dict(facts)},
        }

    @property
    def tags(self) -> list[str]:
        """Family, task, method, pruning rate and seed of the run, then the user's own."""
        named = [self.facts.get(group) or "custom" for group in ("family", "task", "method")]
        numbers = [f"{name}={self.facts[name]}" for name in ("pruning_rate", "seed") if name in self.facts]
        own = self.config["tracking"].get("tags") or []
        return list(dict.fromkeys(str(tag)[:TAG] for tag in (*named, *numbers, *own)))


class Mirror:
    """A listener to the events of a run (`staff.store.stage`) that shows them on a page.

    Events before `open` wait for it. In a run of several processes the main one alone has a mirror that shows.
    """

    def __init__(self) -> None:
        self._page: Any = None
        self._curves: Callable[[Stage], str] | None = None
        self._shut = not processes.is_main_process()
        self._waiting: list[dict[str, Any]] = []
        self._running: list[Stage] = []
        self._ended: set[str] = set()
        self._shown: dict[str, int] = {}
        """The last step that is shown, by curve, in earlier attempts too."""
        self._lines = _Lines(self)

    def open(self, about: About, mode: str, fall_back: bool = True) -> None:
        """Start the page, or go on with the one that the same run had before.

        Args:
            mode: one of `MODES`. "auto" is WANDB_MODE; if that is not set, online if the user is logged in,
                otherwise offline. If the server does not answer within 10 s (WANDB_INIT_TIMEOUT), the page is
                written to a file, which `wandb sync` uploads.
            fall_back: whether to write such a file if the server does not answer.
        """
        mode = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
        self._shut = self._shut or mode == "disabled"
        if self._shut:
            return
        self._curves, self._folder = about.curves, about.folder
        with self._tolerantly():
            self._page = pages.start(mode, fall_back, **about.identity)
            self._page.summary["status"] = "running"
            logging.getLogger().addHandler(self._lines)
            for values in self._waiting:
                self._page.log(values)

    @property
    def shows(self) -> bool:
        """Whether the page is open, and nothing went wrong so far."""
        return self._page is not None

    def __call__(self, event: Event) -> None:
        match event:
            case StageStarted(stage):
                self._running.append(stage)
                self._log({"stage/label": stage.label, "stage/event": "started"})
            case StageEnded(stage, artifact):
                if self._running and self._running[-1] is stage:
                    self._running.pop()
                elif stage.fingerprint in self._ended:  # a result that is read again
                    return
                self._ended.add(stage.fingerprint)
                how = "failed" if artifact is None else "computed" if artifact.computed else "read"
                seconds = {} if artifact is None else {"stage/seconds": artifact.cost.seconds}
                self._log({"stage/label": stage.label, "stage/event": how, **seconds})
            case TrainingLogged(step, values) if self._running and self._curves:
                self.point(self._curves(self._running[-1]), step, values)

    def point(self, curve: str, step: int, values: Mapping[str, float]) -> None:
        """Show a point of a curve, unless it is shown already."""
        if not self.shows:
            return
        with self._tolerantly():
            if curve not in self._shown:
                self._shown[curve] = pages.last_step(self._page, curve)
                self._page.define_metric(f"{curve}/*", step_metric=f"{curve}/step")
            if step > self._shown[curve]:
                self._shown[curve] = step
                kept = {f"{curve}/{name}": values[name] for name in KEPT if name in values}
                self._page.log({**kept, f"{curve}/step": step})
                pages.note_step(self._page, curve, step)

    def line(self, text: str) -> None:
        """Show a line of the run's log."""
        if self.shows:
            with self._tolerantly():
                self._page.write_logs(text)

    def finish(self, tables: Callable[[], Mapping[str, pd.DataFrame]] = dict) -> bool:
        """Show what the run's folder holds, end the page as finished, and return whether all that went well.

        Files that are missing are skipped.

        Args:
            tables: makes tables by name that are shown in place of the folder's.
        """
        if self.shows:
            with self._tolerantly():
                self._show_record(tables())
        return self._end("finished", 0)

    def fail(self, reason: str) -> None:
        """End the page as failed, with the reason in a sentence."""
        self._end(f"failed: {reason}", 1)

    def pause(self) -> None:
        """End the page for now: the same run goes on with it."""
        self._end("waiting", 0)

    def _show_record(self, tables: Mapping[str, pd.DataFrame]) -> None:
        record = json.loads((self._folder / "metrics.json").read_text(encoding="utf-8"))
        if (self._folder / "training.csv").is_file():
            for curve, points in pages.curves(pd.read_csv(self._folder / "training.csv")):
                for values in points.to_dict("records"):
                    self.point(curve, int(values["step"]), values)
        self._page.log(pages.media(self._folder, record["overhead"], tables))
        self._page.summary.update({"metrics": record["metrics"]})
        # "coreset" is the table, which a panel finds by the summary.
        facts = {"selection" if key == "coreset" else key: value for key, value in record.items()}
        left_out = ("metrics", "config", "artifacts")
        self._page.summary.update({key: value for key, value in facts.items() if key not in left_out})

    def _log(self, values: dict[str, Any]) -> None:
        if self.shows:
            with self._tolerantly():
                self._page.log(values)
        elif not self._shut:
            self._waiting.append(values)

    def _end(self, status: str, code: int) -> bool:
        if not self.shows:
            return False
        with self._tolerantly():
            self._page.summary["status"] = status
            pages.finish(self._leave(), code)
            return True
        return False

    def _leave(self) -> Any:
        """The page, on which nothing more is shown."""
        logging.getLogger().removeHandler(self._lines)
        page, self._page, self._shut = self._page, None, True
        return page

    @contextmanager
    def _tolerantly(self) -> Iterator[None]:
        """Turn an error of W&B into one line, and show nothing more."""
        try:
            yield
        except Exception as error:
            page = self._leave()
            log.warning("Weights & Biases: %s; %s", pages.sentence(error), LOST)
            if page is not None:  # or the next run of this process would find it open
                with suppress(Exception):
                    pages.finish(page, 1)


class _Lines(logging.Handler):
    """Sends the log to a page's own log."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__()
        self._mirror = mirror
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self._mirror.line(self.format(record))


def log_to_wandb(folder: Path, mode: str, fall_back: bool = True) -> bool:
    """Show the record in `folder` on its page. Errors become warnings.

    Returns:
        Whether the record is on the server, or in a file that `wandb sync` uploads.
    """
    record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    mirror = Mirror()
    mirror.open(About(folder, record["config"], record["run"]), mode, fall_back)
    return mirror.finish()
