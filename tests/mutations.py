"""One change to the source for each promise of tests/README.md, and the test that has to notice it.

    python -m tests.mutations            # all, half an hour
    python -m tests.mutations NAME ...   # some
    python -m tests.mutations 2/4        # the second of four parts

Each runs in a copy of the tree. The test passes as the source stands; then the change is made, and the test has to
fail. The exit status is not zero if one does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

from support.mutating import Mutation, main

KILLED_JOB = (
    "test_sweep.py::test_a_job_that_is_killed_raises_or_exhausts_memory_fails_alone_and_says_why_in_one_line"
)
CLOCKS = "test_shared_store.py::test_clocks_that_differ_change_neither_what_is_read_nor_what_is_cleaned_up"
REQUEUED = "test_launcher.py::test_a_cluster_is_asked_for_a_signal_before_the_time_limit_and_requeues_the_same_job"
MUTATIONS = (
    # Killed at any moment
    Mutation(
        name="records of attempts stay",
        place="staff/store/cost.py:attempt",
        old="write() if attempts else file.unlink()",
        new="write()",
        test="test_sweep.py::"
        "test_a_sweep_that_is_killed_and_given_again_ends_with_the_records_of_an_undisturbed_one",
    ),
    Mutation(
        name="published in pieces",
        place="staff/store/store.py:Store._make",
        old="os.rename(draft, folder)",
        new="shutil.copytree(draft, folder)",
        test="test_artifacts.py::test_publication_is_one_rename_of_a_complete_folder",
    ),
    Mutation(
        name="drafts of the dead stay",
        place="staff/store/store.py:Store.remove_dead_drafts",
        new="pass",
        test="test_store_failures.py::"
        "test_what_a_killed_process_was_writing_is_removed_by_the_next_run_whatever_that_makes",
    ),
    Mutation(
        name="attempts at what is done stay",
        place="staff/store/store.py:Store.remove_dead_drafts",
        old="left.unlink()",
        new="None",
        test="test_store_failures.py::"
        "test_a_signal_at_any_line_leaves_an_artefact_whole_or_absent_and_the_next_process_goes_on",
    ),
    Mutation(
        name="another order after a kill",
        place="staff/training/checkpoints.py:Checkpoints.on_epoch_begin",
        old="torch.set_rng_state(self._epoch_began)",
        new="torch.manual_seed(7)",
        test="test_checkpoints.py::test_killed_twice_it_ends_with_the_same_weights_log_and_scores",
    ),
    Mutation(
        name="a signal is not heard",
        place="staff/runtime/preemption.py:deferred",
        old="arrived.append(number)",
        new="None",
        test="test_checkpoints.py::test_a_signal_in_the_last_step_loses_nothing",
    ),
    Mutation(
        name="a checkpoint is not read",
        place="staff/training/checkpoints.py:_last",
        new="return None",
        test="test_distributed.py::test_a_signal_to_one_process_stops_all_and_one_resumes_to_the_same_weights",
    ),
    Mutation(
        name="killed attempts forgotten",
        place="staff/store/cost.py:attempt",
        old="yield earlier",
        new="yield []",
        test="test_store_failures.py::test_attempts_that_led_to_nothing_are_recorded_apart_from_the_cost",
    ),
    Mutation(
        name="workers outlive their sweep",
        place="hydra_plugins/staff_launcher.py:_end_with_parent",
        new="pass",
        test="test_launcher.py::test_workers_end_with_their_sweep",
    ),
    # A cluster
    Mutation(
        name="a lost job ends the sweep",
        place="hydra_plugins/staff_cluster.py:result_of",
        old="return failed_job(context, config, number, said)",
        new="raise said",
        test="test_launcher.py::test_a_cluster_job_that_ends_without_a_result_fails_alone_and_says_how",
    ),
    Mutation(
        name="no account of SLURM is no state",
        place="hydra_plugins/staff_cluster.py:_watcher",
        old="if self.accounts or command is None:",
        new="if True:",
        test="test_launcher.py::test_states_are_read_from_the_queue_where_a_cluster_keeps_no_accounts",
    ),
    Mutation(
        name="too much memory is not named",
        place="hydra_plugins/staff_cluster.py:_description",
        old=' or "memory limit" in log_of_it',
        new="",
        test="test_launcher.py::test_a_cluster_job_that_ends_without_a_result_fails_alone_and_says_how",
    ),
    Mutation(
        name="no job is requeued",
        place="hydra_plugins/staff_cluster.py:ClusterLauncher.launch",
        old='slurm_max_num_timeout=settings.pop("slurm_max_num_timeout")',
        new='slurm_max_num_timeout=0 * settings.pop("slurm_max_num_timeout")',
        test=REQUEUED,
    ),
    Mutation(
        name="the launcher does not hear of a signal",
        place="staff/runtime/preemption.py:deferred",
        old="signal.raise_signal(arrived[-1])",
        new="raise Preempted",
        test="test_checkpoints.py::test_a_signal_in_the_last_step_loses_nothing",
    ),
    # Several processes
    Mutation(
        name="files stand for locks",
        place="staff/store/locks.py:file_lock",
        old="fallback_to_soft=False",
        new="fallback_to_soft=True",
        test="test_shared_store.py::test_a_file_system_without_any_locks_is_refused",
    ),
    Mutation(
        name="no lock is tried",
        place="staff/store/locks.py:check_locks_between_nodes",
        old="if double:",
        new="if False:",
        test="test_shared_store.py::test_a_file_system_without_locks_between_nodes_is_refused_before_any_work",
    ),
    Mutation(
        name="a lock that locks nobody out",
        place="staff/store/store.py:Store._lock",
        new="yield",
        test="test_store_failures.py::test_two_processes_that_want_the_same_artefact_compute_it_once",
    ),
    Mutation(
        name="what was read is free",
        place="staff/store/store.py:Store.get",
        old="frames[-1].inputs.update(artifact.charged())",
        new="pass",
        test="test_artifacts.py::test_inputs_are_recorded_transitively_and_each_is_charged_once",
    ),
    # Storage
    Mutation(
        name="damage is read",
        place="staff/store/store.py:Store._read",
        old="if contents:",
        new="if False:",
        test="test_store_failures.py::test_a_damaged_artefact_is_refused_by_name_with_a_mend_that_works",
    ),
    Mutation(
        name="a full disk is a stack",
        place="staff/store/store.py:Store._storage_errors",
        new="yield",
        test="test_store_failures.py::test_a_disk_that_takes_no_more_is_one_sentence_and_publishes_nothing",
    ),
    Mutation(
        name="drafts of failures stay",
        place="staff/store/store.py:Store._make",
        old="shutil.rmtree(draft, ignore_errors=True)",
        new="pass",
        test="test_store_failures.py::test_a_disk_that_takes_no_more_is_one_sentence_and_publishes_nothing",
    ),
    Mutation(
        name="a full quota is a stack",
        place="staff/runtime/files.py:storage_failure",
        old="if number in OF_STORAGE",
        new="if number in OF_STORAGE - {errno.EDQUOT}",
        test="test_shared_store.py::test_a_quota_that_is_used_up_is_named_in_the_words_of_the_system",
    ),
    Mutation(
        name="an artefact of the future has a negative age",
        place="experiments/store.py:_entry",
        old="max(0.0,",
        new="max(-1e9,",
        test=CLOCKS,
    ),
    Mutation(
        name="an old draft is a dead one",
        place="staff/store/store.py:Store.remove_dead_drafts",
        old="lock:",
        new="lock if draft.stat().st_mtime > self.root.stat().st_mtime - 3600 else nullcontext():",
        test=CLOCKS,
    ),
    Mutation(
        name="an older layout is read",
        place="staff/store/store.py:Store.folder",
        new='return next((self.root / stage.kind).glob("*"), self.root / stage.kind / stage.fingerprint[:32])',
        test="test_shared_store.py::test_a_store_of_an_older_layout_is_left_alone",
    ),
    Mutation(
        name="files of one owner",
        place="staff/store/manifest.py:write_manifest",
        old="file.chmod(mode)",
        new="pass",
        test="test_shared_store.py::test_files_have_the_permissions_that_the_umask_leaves",
    ),
    Mutation(
        name="a store must be written to",
        place="staff/store/locks.py:_acquired",
        old="return False",
        new="raise",
        test="test_shared_store.py::"
        "test_a_store_on_a_mount_that_is_only_read_is_read_by_one_process_and_by_several",
    ),
    Mutation(
        name="results of old code are read",
        place="staff/store/stage.py:Stage.fingerprint_of",
        old='"version": version',
        new='"version": 1',
        test="test_store_failures.py::"
        "test_what_an_older_version_of_a_stage_made_is_not_read_and_a_sentence_says_so",
    ),
    Mutation(
        name="other numbers under an old version",
        place="staff/signals/el2n.py:_error_norms",
        old="(1 + shares",
        new="(1.1 + shares",
        test="test_stage_numbers.py::test_other_numbers_have_a_new_version_and_a_new_version_other_numbers",
    ),
    Mutation(
        name="prune does not wait for yes",
        place="experiments/store.py:prune",
        old="if not really:",
        new="if False:",
        test="test_store.py::test_prune_removes_what_no_record_needs_and_only_after_saying_so",
    ),
    # Bad data
    Mutation(
        name="an id that comes twice",
        place="staff/data/task.py:Task.samples",
        old="if sample.id in samples:",
        new="if False:",
        test="test_bad_data.py::test_a_bad_line_or_template_gives_its_sentence",
    ),
    Mutation(
        name="the words of a library",
        place="staff/data/rows.py:readable",
        new="yield",
        test="test_data_files.py::test_a_damaged_file_is_one_true_sentence",
    ),
    Mutation(
        name="a score that is not finite",
        place="staff/scoring/passes.py:_check_finite",
        old="if not finite.all():",
        new="if False:",
        test="test_bad_data.py::test_a_score_that_is_not_finite_names_its_sample",
    ),
    Mutation(
        name="a loss that is not finite",
        place="staff/training/trainer.py:AnswerTrainer.compute_loss",
        old="if not torch.isfinite(total):",
        new="if False:",
        test="test_bad_data.py::test_a_loss_that_is_not_finite_names_its_sample_in_training",
    ),
    # Reproducibility
    Mutation(
        name="draws by place, not by id",
        place="staff/draws.py:_hashes",
        old="hashlib.blake2b(id.encode(), digest_size=8).digest() for id in ids",
        new='place.to_bytes(8, "little") for place, _ in enumerate(ids)',
        test="test_methods.py::test_every_method_selects_by_seed_and_id_and_not_by_the_order_of_the_pool",
    ),
    Mutation(
        name="a seed that reaches nothing",
        place="staff/training/stage.py:Finetune.training_arguments",
        old="data_seed=self.seed",
        new="data_seed=0",
        test="test_same_twice.py::test_each_seed_reaches_all_that_is_random_on_its_side",
    ),
    Mutation(
        name="draws by Python's own hash",
        place="staff/draws.py:_hashes",
        old="hashlib.blake2b(id.encode(), digest_size=8).digest()",
        new='hash(id).to_bytes(8, "little", signed=True)',
        test="test_same_twice.py::test_the_same_jobs_give_the_same_files_in_whatever_order_process_and_hash_seed",
    ),
    Mutation(
        name="other draws",
        place="staff/draws.py:Draws.choose",
        old="[:count]",
        new="[::-1][:count]",
        test="test_same_twice.py::test_the_committed_slice_comes_out_equal_on_the_same_kind_of_machine",
    ),
    Mutation(
        name="scores in the order of the batches",
        place="staff/scoring/passes.py:score_samples",
        old="values[name][rows] = value",
        new="values[name][np.sort(rows)] = value",
        test="test_scoring.py::test_scores_do_not_depend_on_batch_size_padding_or_order",
    ),
    Mutation(
        name="each process its own mean",
        place="staff/training/trainer.py:AnswerTrainer.compute_loss",
        old="if processes.world_size() > 1:",
        new="if False:",
        test="test_distributed.py::test_two_processes_fine_tune_to_the_weights_of_one",
    ),
    Mutation(
        name="digits lost in packing",
        place="experiments/campaign.py:_vectors",
        old="values.astype(np.float64)",
        new="values.astype(np.float32).astype(np.float64)",
        test="test_campaign.py::test_packed_runs_are_read_as_they_were_from_their_folders",
    ),
    # Untrusted inputs
    Mutation(
        name="weights beside the folder",
        place="staff/models/weights.py:weight_files",
        old='if not str(name).endswith(".safetensors") or len(Path(name).parts) > 1:',
        new="if False:",
        test="test_untrusted_inputs.py::test_a_model_with_a_pickle_an_adapter_or_code_is_refused_in_a_sentence",
    ),
    Mutation(
        name="text is run as code",
        place="staff/runtime/files.py:original",
        new="return eval(text)",
        test="test_untrusted_inputs.py::test_the_sources_read_no_pickle_and_run_no_text_as_code",
    ),
    Mutation(
        name="formulas in CSV",
        place="staff/runtime/files.py:inert",
        new="return text",
        test="test_untrusted_inputs.py::test_what_fuzzing_found_stays_mended",
    ),
    Mutation(
        name="secrets in the record",
        place="staff/tracking/__init__.py:environment",
        old="os.cpu_count()",
        new="dict(os.environ)",
        test="test_untrusted_inputs.py::test_secrets_are_used_and_never_written_down",
    ),
    Mutation(
        name="markup of samples on the page",
        place="experiments/report/page.py:write",
        old="autoescape=True",
        new="autoescape=False",
        test="test_untrusted_inputs.py::test_names_and_text_of_samples_never_leave_their_folder_or_become_markup",
    ),
    # Failures
    Mutation(
        name="lack of memory is a stack",
        place="experiments/sweep.py:sentence_of",
        old=" or _NO_MEMORY in str(error)",
        new="",
        test=KILLED_JOB,
    ),
    Mutation(
        name="a dead worker ends the sweep",
        place="hydra_plugins/staff_launcher.py:_Worker._failure",
        new="raise ChildProcessError",
        test="test_launcher.py::test_a_job_whose_worker_dies_fails_alone_and_says_how",
    ),
    Mutation(
        name="a failed job ends the sweep",
        place="experiments/sweep.py:Sweep.on_job_end",
        old="job_return.return_value, job_return.status = None, JobStatus.COMPLETED",
        new="pass",
        test=KILLED_JOB,
    ),
    Mutation(
        name="a folder is a record",
        place="experiments/single.py:Run.recorded",
        old="if not file.is_file():",
        new="if not self.folder.is_dir():",
        test="test_sweep.py::test_the_same_command_runs_the_jobs_that_failed_and_no_other",
    ),
    Mutation(
        name="a hub's error in the words of its client",
        place="staff/runtime/hub.py:_refusal",
        new="return UserError(str(error))",
        test="test_sweep.py::test_a_hub_that_cannot_be_reached_is_one_line_and_the_same_command_resumes",
    ),
    Mutation(
        name="every process reports an error",
        place="staff/runtime/processes.py:claims_error_report",
        old='_group.store.add("failures", 1) == 1',
        new='_group.store.add("failures", 1) >= 1',
        test="test_distributed.py::test_what_fails_in_one_process_ends_them_all_and_is_said_once",
    ),
    Mutation(
        name="failure ends well",
        place="experiments/run.py:main",
        old="sys.exit(1 if failed else 0)",
        new="sys.exit(0)",
        test=KILLED_JOB,
    ),
    Mutation(
        name="a damaged download",
        place="staff/runtime/hub.py:_verify",
        old="if digest.hexdigest() != blob.name:",
        new="if False:",
        test="test_hub.py::test_a_failing_hub_is_a_sentence_and_the_same_command_goes_on",
    ),
    Mutation(
        name="a download that stalls is waited for",
        place="staff/runtime/patience.py:Patience._check_cuts",
        old="if self._opened[at] > CUTS:",
        new="if False:",
        test="test_hub.py::test_a_failing_hub_is_a_sentence_and_the_same_command_goes_on",
    ),
    Mutation(
        name="a hub that is waited for",
        place="staff/runtime/hub.py:_download",
        old="IMPATIENCE, repeat",
        new="PATIENCE, repeat",
        test="test_hub.py::test_a_hub_that_is_away_or_slow_is_replaced_by_the_cache_at_once",
    ),
    Mutation(
        name="the hub's own words",
        place="staff/runtime/patience.py:Patience.kept",
        old="logger.setLevel(logging.CRITICAL)",
        new="pass",
        test="test_hub.py::test_a_fault_that_passes_costs_a_line_and_a_download_goes_on_where_it_was_cut",
    ),
    Mutation(
        name="a W&B that does not answer",
        place="staff/tracking/pages.py:start",
        old='return wandb.init(mode="offline", **start)',
        new='raise RuntimeError("no server")',
        test="test_mirror.py::test_an_unreachable_server_leaves_an_offline_run_and_one_line",
    ),
    # Large and long work
    Mutation(
        name="long work is silent",
        place="staff/runtime/progress.py:_Lines.display",
        new="pass",
        test="test_runtime.py::test_a_log_gets_a_line_now_and_then_of_what_takes_long_and_none_of_what_does_not",
    ),
)


if __name__ == "__main__":
    main(MUTATIONS)
