"""One change to the source for each promise of tests/README.md, and the test that has to notice it.

    python -m tests.mutations            # all, minutes
    python -m tests.mutations NAME ...   # some

Each runs in a copy of the tree: the test passes as the source stands, then the change is made, and the test has to
fail. The exit status is not zero where one does not.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    *("staff", "baselines", "experiments", "hydra_plugins", "conf", "tests"),
    *("pyproject.toml", "README.md"),
)


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands once in `file`, becomes `new`; `test` (file::function, all its cases) has to fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "published in pieces",
        "staff/store/store.py",
        "                    os.rename(draft, folder)\n                shutil.rmtree(self.checkpoints",
        "                    shutil.copytree(draft, folder)\n                shutil.rmtree(self.checkpoints",
        "tests/test_artifacts.py::test_publication_is_one_rename_of_a_complete_folder",
    ),
    Mutation(
        "drafts of the dead stay",
        "staff/store/store.py",
        "with suppress(OSError, Timeout), lock:  # a live process, or a store that is only read\n"
        "                shutil.rmtree(draft)",
        "with suppress(OSError, Timeout), lock:\n                pass",
        "tests/test_store_failures.py::"
        "test_what_a_killed_process_was_writing_is_removed_by_the_next_run_whatever_that_makes",
    ),
    Mutation(
        "another order after a kill",
        "staff/training/checkpoints.py",
        "torch.set_rng_state(self._epoch_began)",
        "torch.manual_seed(7)",
        "tests/test_checkpoints.py::test_killed_twice_it_ends_with_the_same_weights_log_and_scores",
    ),
    Mutation(
        "killed attempts forgotten",
        "staff/store/attempts.py",
        "        yield earlier\n",
        "        yield []\n",
        "tests/test_store_failures.py::test_attempts_that_led_to_nothing_are_recorded_apart_from_the_cost",
    ),
    Mutation(
        "a lock that locks nobody out",
        "staff/store/store.py",
        'lock = FileLock(locks / f"{fingerprint[:32]}.lock")',
        'lock = FileLock(locks / f"{uuid.uuid4()}.lock")',
        "tests/test_store_failures.py::test_two_processes_that_want_the_same_artefact_compute_it_once",
    ),
    Mutation(
        "damage is read",
        "staff/store/store.py",
        '_check_contents_once(folder, (folder / "manifest.json").stat().st_mtime_ns)',
        "pass",
        "tests/test_store_failures.py::test_a_damaged_artefact_is_refused_by_name_with_a_mend_that_works",
    ),
    Mutation(
        "a full disk is a stack",
        "staff/store/store.py",
        "errno.EDQUOT, errno.EFBIG, ",
        "errno.EDQUOT, ",
        "tests/test_store_failures.py::test_a_disk_that_takes_no_more_is_one_sentence_and_publishes_nothing",
    ),
    Mutation(
        "results of old code are read",
        "staff/store/stage.py",
        '"version": version, "key"',
        '"version": 1, "key"',
        "tests/test_store_failures.py::"
        "test_what_an_older_version_of_a_stage_made_is_not_read_and_a_sentence_says_so",
    ),
    Mutation(
        "other numbers under an old version",
        "staff/signals/el2n.py",
        "(1 + shares.square().sum(-1)).sqrt()",
        "(1.1 + shares.square().sum(-1)).sqrt()",
        "tests/test_stage_numbers.py::test_other_numbers_have_a_new_version_and_a_new_version_other_numbers",
    ),
    Mutation(
        "prune does not wait for yes",
        "experiments/store.py",
        "prune(store, results, arguments.yes)",
        "prune(store, results, True)",
        "tests/test_store.py::test_prune_removes_what_no_record_needs_and_only_after_saying_so",
    ),
    Mutation(
        "what was read is free",
        "staff/store/store.py",
        "frames[-1].inputs.update(artifact.charged())",
        "pass",
        "tests/test_artifacts.py::test_inputs_are_recorded_transitively_and_each_is_charged_once",
    ),
    Mutation(
        "an id that comes twice",
        "staff/data/task.py",
        "the id {shortened(sample.id)!r} comes twice",
        "the id {shortened(sample.id)!r} is odd",
        "tests/test_bad_data.py::test_a_bad_line_or_template_gives_its_sentence",
    ),
    Mutation(
        "a score that is not finite",
        "staff/scoring/passes.py",
        "if not np.isfinite(value).all():",
        "if False:",
        "tests/test_bad_data.py::test_a_score_that_is_not_finite_names_its_sample",
    ),
    Mutation(
        "a loss that is not finite",
        "staff/training/trainer.py",
        "if not torch.isfinite(total):",
        "if False:",
        "tests/test_bad_data.py::test_a_loss_that_is_not_finite_names_its_sample_in_training",
    ),
    Mutation(
        "draws by place, not by id",
        "staff/selection.py",
        'digest = b"".join(hashlib.blake2b(id.encode(), digest_size=8).digest() for id in ids)',
        'digest = b"".join(i.to_bytes(8, "little") for i, _ in enumerate(ids))',
        "tests/test_baselines.py::test_every_method_selects_by_seed_and_id_and_not_by_the_order_of_the_pool",
    ),
    Mutation(
        "a seed that reaches nothing",
        "staff/training/stage.py",
        "            data_seed=self.seed,\n",
        "            data_seed=0,\n",
        "tests/test_same_twice.py::test_each_seed_reaches_all_that_is_random_on_its_side",
    ),
    Mutation(
        "scores in the order of the batches",
        "staff/scoring/passes.py",
        "values[name][rows] = value",
        "values[name][np.sort(rows)] = value",
        "tests/test_scoring.py::test_scores_do_not_depend_on_batch_size_padding_or_order",
    ),
    Mutation(
        "each process its own mean",
        "staff/training/trainer.py",
        "tokens = tokens / processes.world_size()",
        "tokens = len(positions.targets)",
        "tests/test_distributed.py::test_two_processes_fine_tune_to_the_weights_of_one",
    ),
    Mutation(
        "digits lost in packing",
        "experiments/campaign.py",
        "values.astype(np.float64)]",
        "values.astype(np.float32).astype(np.float64)]",
        "tests/test_campaign.py::test_packed_runs_are_read_as_they_were_from_their_folders",
    ),
    Mutation(
        "weights beside the folder",
        "staff/models/weights.py",
        'if not str(name).endswith(".safetensors") or len(Path(name).parts) > 1:',
        "if False:",
        "tests/test_untrusted_inputs.py::test_a_model_with_a_pickle_an_adapter_or_code_is_refused_in_a_sentence",
    ),
    Mutation(
        "secrets in the record",
        "staff/tracking.py",
        '"cpu_count": os.cpu_count(),',
        '"cpu_count": dict(os.environ),',
        "tests/test_untrusted_inputs.py::test_secrets_are_used_and_never_written_down",
    ),
    Mutation(
        "markup of samples on the page",
        "experiments/report/page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/test_untrusted_inputs.py::test_names_and_text_of_samples_never_leave_their_folder_or_become_markup",
    ),
    Mutation(
        "lack of memory is a stack",
        "experiments/sweep.py",
        " or _NO_MEMORY in str(error):\n",
        ":\n",
        "tests/test_honest_failure.py::test_lack_of_memory_ends_its_job_alone_and_the_same_command_resumes",
    ),
    Mutation(
        "failure ends well",
        "experiments/run.py",
        "sys.exit(1 if failed else 0)",
        "sys.exit(0)",
        "tests/test_run.py::test_a_sweep_by_submitit_goes_on_past_a_failing_job_names_it_and_exits_with_an_error",
    ),
    Mutation(
        "the hub's own words",
        "experiments/run.py",
        'os.environ.setdefault("HF_HUB_VERBOSITY", "error")',
        "pass",
        "tests/test_honest_failure.py::test_a_hub_that_cannot_be_reached_is_one_line_and_the_same_command_resumes",
    ),
    Mutation(
        "a dead worker ends the sweep",
        "hydra_plugins/staff_launcher.py",
        "            result = self._failure()\n",
        "            raise ChildProcessError\n",
        "tests/test_launcher.py::test_a_job_whose_worker_dies_fails_alone_and_says_how",
    ),
    Mutation(
        "workers outlive their sweep",
        "hydra_plugins/staff_launcher.py",
        "    threading.Thread(target=_end_with_parent, daemon=True).start()\n",
        "",
        "tests/test_launcher.py::test_workers_end_with_their_sweep",
    ),
    Mutation(
        "a failed job ends the sweep",
        "experiments/sweep.py",
        "job_return.return_value, job_return.status = None, JobStatus.COMPLETED",
        "pass",
        "tests/test_sweep.py::test_a_job_that_is_killed_or_raises_fails_alone_and_the_same_command_resumes",
    ),
    Mutation(
        "a W&B that does not answer",
        "staff/tracking.py",
        '    return wandb.init(mode="offline", **start)\n',
        '    raise RuntimeError("no server")\n',
        "tests/test_tracking.py::test_an_unreachable_server_leaves_an_offline_run_and_one_line",
    ),
    Mutation(
        "long work is silent",
        "staff/runtime/progress.py",
        'log.info("%s", str(self))',
        "pass",
        "tests/test_progress.py::test_a_log_gets_a_line_now_and_then_of_what_takes_long_and_none_of_what_does_not",
    ),
)


def passes(tree: Path, test: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"{test} could not be run:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def survives(mutation: Mutation, tree: Path) -> str:
    """What happened; "noticed" is as it should be."""
    if not passes(tree, mutation.test):
        return "FAILS ALREADY"
    file = tree / mutation.file
    source = file.read_text("utf-8")
    file.write_text(source.replace(mutation.old, mutation.new), "utf-8")
    try:
        return "SURVIVES" if passes(tree, mutation.test) else "noticed"
    finally:
        file.write_text(source, "utf-8")


def main() -> None:
    wanted = sys.argv[1:] or [mutation.name for mutation in MUTATIONS]
    if unknown := set(wanted) - {mutation.name for mutation in MUTATIONS}:
        sys.exit(f"no mutation is called {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            (tree / part).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / part, tree / part)
        bad = 0
        for mutation in MUTATIONS:
            if mutation.name in wanted:
                found = survives(mutation, tree)
                bad += found != "noticed"
                print(f"{found:14} {mutation.name:36} {mutation.test}", flush=True)
    sys.exit(f"{bad} not noticed" if bad else 0)


if __name__ == "__main__":
    main()
