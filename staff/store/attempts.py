"""Failed attempts at a stage: their time, which is not part of the stage's cost.

An attempt writes its start to a file, and every `BEAT` seconds the time it has taken. If it is killed, the file
remains as last written, so up to `BEAT` seconds are missing. Work before a checkpoint is not lost: its time is part
of the cost of the stage that resumes there.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from staff.store.cost import Meter
from staff.store.locks import Busy

BEAT = 5.0
"""Seconds between two updates of the file."""


@contextmanager
def attempt(file: Path, meter: Meter) -> Iterator[list[dict[str, Any]]]:
    """Record the block in `file`, with the seconds of `meter` since its last checkpoint.

    Once the block succeeds, its record and those of earlier attempts are removed.

    Yields:
        The earlier attempts, each with "started" and "seconds"; one that was not killed also has "error", the name
        of the exception.
    """
    earlier = failed_attempts(file)
    this: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    attempts = [*earlier, this]
    done = threading.Event()

    def write() -> None:
        this["seconds"] = meter.unsaved
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(attempts))
        os.replace(draft, file)

    def beat() -> None:
        while not done.wait(BEAT):
            with suppress(OSError):
                write()

    file.parent.mkdir(parents=True, exist_ok=True)
    write()
    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield earlier
    except Busy:  # not failed, and done again from its start
        attempts.remove(this)
        raise
    except BaseException as error:
        this["error"] = type(error).__name__
        raise
    else:
        attempts.clear()
    finally:
        done.set()
        heart.join()
        with suppress(OSError):
            write() if attempts else file.unlink()


def failed_attempts(file: Path) -> list[dict[str, Any]]:
    """The attempts recorded in a file; empty if there is no file."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads(file.read_text())
    return []
