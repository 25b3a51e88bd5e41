"""The Hydra application: one configuration in, one record out. `staff --help` lists what can be composed."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import sweep
from staff.errors import UserError

CONF = str(Path(__file__).resolve().parents[1] / "conf")
log = logging.getLogger("staff")


def run(cfg: DictConfig, choices: dict[str, Any]) -> Path:
    """Select, fine-tune, evaluate, record: the folder of the run. What is recorded already is not done again.

    Args:
        cfg: the composed configuration.
        choices: the option chosen for each group of the configuration.
    """
    from experiments.record import Run

    this = Run(cfg, choices)
    if this.recorded:
        log.info("%s: recorded already", this.name)
        return this.folder
    with this.failure_noted():
        log.info("%s: a coreset of %d from %d samples", this.name, this.budget, len(this.pool.ids))
        chosen, coreset = this.select()
        tuned = this.finetune(coreset)
        answered = this.evaluate(tuned)
        return this.record(chosen, coreset, tuned, answered)


@hydra.main(config_path=CONF, config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    choices: Any = OmegaConf.to_container(job.runtime.choices)
    if job.mode is None or job.mode.name != "MULTIRUN":
        print(sweep.table([run(cfg, choices)]))
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep cannot run under torchrun: start one configuration at a time, without -m.")
    result: Path | Exception
    try:
        result = run(cfg, choices)
    except Exception as error:  # one failing job must not stop the others
        result = error
    sweep.report_job(job.job.num, " ".join(job.overrides.task), result)


def main() -> None:
    """Entry point of the console script: errors in one sentence, and an honest exit status."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach us instead of being printed
    try:
        _job()
    except KeyboardInterrupt:
        sys.exit("interrupted: what is finished is kept, and the same command goes on from there")
    except Exception as error:
        sentence = sweep.sentence_of(error)
        if wants_traceback or sentence is None:
            traceback.print_exc()
        sys.exit(f"staff: {sentence or error!r}")
    sys.exit(sweep.exit_status())


if __name__ == "__main__":
    main()
