"""What making an artefact took before it succeeded, apart from its cost: attempts that were killed or failed.

An attempt writes its start to a file, and every few seconds for how long it has worked. One that is killed leaves
the file as it was last written, so it counts for up to `BEAT` seconds less than it took. What a checkpoint keeps of
it is not lost, and counts for the artefact that is made from there.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from staff.cost import Meter

BEAT = 5.0
"""Seconds."""


@contextmanager
def attempt(file: Path, meter: Meter) -> Iterator[list[dict[str, Any]]]:
    """Record the block in `file`, what `meter` would lose of it; forget it, and those before it, once it succeeds.

    Yields the attempts before it: when each started, seconds, and the error's name where it was not killed.
    """
    earlier = lost(file)
    this: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    done = threading.Event()

    def write() -> None:
        this["seconds"] = meter.lost
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps([*earlier, this]))
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
    except BaseException as error:
        this["error"] = type(error).__name__
        raise
    finally:
        done.set()
        heart.join()
        with suppress(OSError):
            write() if "error" in this else file.unlink()


def lost(file: Path) -> list[dict[str, Any]]:
    """The attempts in a file that led to nothing; none where there is no file."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads(file.read_text())
    return []
