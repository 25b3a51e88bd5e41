"""Parts of other libraries that are not public and that we rely on: each is noticed when it moves."""

from __future__ import annotations

from datetime import datetime

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus


def test_hydras_sweeper_splits_overrides_into_jobs_as_it_does_in_a_sweep():
    parsed = OverridesParser.create().parse_overrides(["method=a,b", "seed=0,1"])
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert [" ".join(job) for job in jobs] == [
        "method=a seed=0",
        "method=a seed=1",
        "method=b seed=0",
        "method=b seed=1",
    ]


def test_a_failed_job_of_hydras_keeps_its_error_where_it_can_be_read_without_raising():
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = ValueError("said")
    assert isinstance(failed._return_value, ValueError)
    with pytest.raises(ValueError, match="said"):
        _ = failed.return_value


def test_a_chat_template_reads_the_date_from_the_globals_of_its_compiled_form():
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    template = "{{ strftime_now('%Y') }}"
    _compile_jinja_template(template).globals["strftime_now"] = datetime(1999, 1, 1).strftime
    rendered, _ = render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=template)
    assert rendered == ["1999"]


def test_wandb_finds_credentials_without_asking(monkeypatch: pytest.MonkeyPatch):
    from wandb.sdk.lib import wbauth

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    found = wbauth.authenticate_session(
        host="http://localhost:1", source="test", prompt=False, update_session=False
    )
    assert found is None


def test_wandb_writes_offline_files_as_often_as_it_is_told():
    """The format of these files: test_mirror.py reads it."""
    import wandb

    assert wandb.Settings.model_fields["x_transaction_log_flush_interval"].default == 15.0


def test_a_mixture_of_experts_takes_its_implementation_from_the_configuration():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=50, num_local_experts=2, num_key_value_heads=2, **shape)
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert model.config._experts_implementation == "batched_mm"
