"""Upload recorded runs to Weights & Biases later, when there is a network: `staff-replay [FOLDER ...]`.

A run has the same page each time, found by its fingerprint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments import command
from staff.runtime.files import local_path
from staff.tracking.mirror import log_to_wandb


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="staff-replay", description=__doc__)
    parser.add_argument(
        "folders", type=local_path, nargs="*", help="folders of runs (default: all under --results)"
    )
    parser.add_argument(
        "--results", type=local_path, default=Path("results"), help="folder with runs/ (default: results)"
    )
    arguments = parser.parse_args()
    folders = arguments.folders or sorted(arguments.results.glob("runs/*/"))
    recorded = [folder for folder in folders if (folder / "metrics.json").is_file()]
    if not recorded:
        sys.exit(f"no folder with a metrics.json among {len(folders)} under {arguments.results}/runs: name others.")
    failed = [folder for folder in recorded if not log_to_wandb(folder, "online", fall_back=False)]
    print(f"{len(recorded) - len(failed)} of {len(recorded)} runs are online")
    if failed:
        sys.exit(f"not sent: {', '.join(folder.name for folder in failed)}; the same command tries again.")


if __name__ == "__main__":
    main()
