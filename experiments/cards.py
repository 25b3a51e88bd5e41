"""Cards for the hub, which say what a coreset or a model is, how it was made and how it performed; and uploads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from staff.data.files import files_of
from staff.errors import UserError, in_one_line

HOW_TO_READ = {
    "jsonl": '`datasets.load_dataset("json", data_files="train.jsonl")`',
    "parquet": '`datasets.load_dataset("parquet", data_files="train.parquet")`',
    "datasets": "`datasets.load_from_disk(FOLDER)`",
    "rows": "whatever read the data that it comes from",
    "trl": '`datasets.load_dataset("json", data_files="train.jsonl")`, for `trl.SFTTrainer`',
    "ids": "`staff method=precomputed method.path=ids.json`, with the same task",
}


def coreset_card(record: Mapping[str, Any], form: str) -> str:
    """The card of a coreset exported in this format, a key of `HOW_TO_READ`, as Markdown."""
    about, counts, task = record["run"], record["counts"], record["config"]["task"]["name"]
    facts = {
        **_facts_of_coreset(record),
        "fine-tuned on it": _measured(record),
        "run": f"{about['name']}, fingerprint {about['fingerprint']}",
        "training split": f"SHA-256 {record['identity']['data']['train']}",
        "code": f"commit {record['provenance']['git_commit']}",
    }
    notes = "".join(f"- {note}\n" for note in record["coreset"]["notes"])
    return f"""# {counts["selected"]:,} samples of {task}, chosen by {facts["method"]}

Read it with {HOW_TO_READ[form]}. Prompt and completion are tokenised apart and joined as they are; the run gave \
them to the models in the prompt format `{record["config"]["family"]["prompt_format"]}`.

{_table(facts)}

The method's settings:

```yaml
{_settings(record["config"]["method"])}
```

{notes}
{_licence(record)}
"""


def model_card(record: Mapping[str, Any], base: str, on_hub: bool, form: str, load: str) -> str:
    """The card of an exported model, as Markdown with the hub's metadata.

    Args:
        base: name of the model that was fine-tuned.
        on_hub: whether that is its name on the hub.
        form: "adapter" or "merged".
        load: Python code that loads the model and its tokenizer.
    """
    config, about, task = record["config"], record["run"], record["config"]["task"]
    metrics = {name: f"{value:.4g}" for name, value in record["metrics"].items() if value is not None}
    return f"""---
{_metadata(config, base if on_hub else None, form)}
---

# {base.rstrip("/").rsplit("/", 1)[-1]} fine-tuned on {record["counts"]["selected"]:,} samples of {task["name"]}

{"A LoRA adapter" if form == "adapter" else "The whole model"}, fine-tuned on a coreset chosen by {about["method"]}.

```python
{load.strip()}
```

{_prompts(config)} The answers that were measured are greedy, of at most {task["max_new_tokens"]} tokens.

## Metrics

On {record["counts"]["test"]:,} test samples of {task["name"]}:

{_table(metrics)}

## Recipe

{_table(_recipe(record))}

```yaml
{_settings({"method": config["method"], "finetune": config["finetune"]})}
```

{_licence(record)} The base model has a licence of its own.
"""


def _prompts(config: Mapping[str, Any]) -> str:
    """How prompts are made and read, in a sentence."""
    task, family = config["task"], config["family"]
    template = "the columns of the data" if task.get("prompt") is None else f"`{json.dumps(task['prompt'])}`"
    how = "as plain text, behind the tokenizer's begin token if it has one"
    if family["prompt_format"] == "chat":
        how = f"in the chat template of the tokenizer, on {family['date']}"
    return f"Prompts are made by {template} and read {how}."


def _metadata(config: Mapping[str, Any], base: str | None, form: str) -> str:
    """The hub's metadata as YAML; `base` is the base model's name on the hub."""
    metadata = {
        **({} if base is None else {"base_model": base}),
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["coreset", *(["lora"] if config["finetune"]["kind"] == "lora" else [])],
    }
    return OmegaConf.to_yaml(metadata).strip()


def _recipe(record: Mapping[str, Any]) -> dict[str, Any]:
    """How the model was made."""
    return {
        **_facts_of_coreset(record),
        "coreset tokens": f"{record['counts']['selected_tokens']:,} of {record['counts']['pool_tokens']:,}"
        if "selected_tokens" in record["counts"]
        else "-",
        "fine-tuning took": f"{record['finetuning']['seconds']:,.1f} s, {record['finetuning']['flops']:.3g} FLOPs",
        "fine-tuning seed": record["run"]["finetune_seed"],
        "run": f"{record['run']['name']}, fingerprint {record['run']['fingerprint']}",
        "code": f"commit {record['provenance']['git_commit']}",
    }


def _facts_of_coreset(record: Mapping[str, Any]) -> dict[str, Any]:
    about, counts, overhead = (record[part] for part in ("run", "counts", "overhead"))
    return {
        "samples": f"{counts['selected']:,} of {counts['pool']:,}, pruning rate {about['pruning_rate']:g}",
        "task": f"{record['config']['task']['name']}, from {_origin(record)}",
        "method": about["method"] or record["config"]["method"]["_target_"],
        "models that selected": about["selection_family"] or "custom",
        "selection seed": about["selection_seed"],
        "selection took": f"{overhead['seconds']:,.1f} s, {overhead['flops']:.3g} FLOPs",
        "on": overhead["device"] or "-",
        "coreset": f"fingerprint {record['coreset']['fingerprint']}",
    }


def _table(facts: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _settings(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, without classes and without local paths."""

    def plain(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: plain(part) for name, part in value.items() if name not in ("_target_", "path")}

    return OmegaConf.to_yaml(plain(settings)).strip()


def _licence(record: Mapping[str, Any]) -> str:
    return (
        f"**Licence**: the texts come from {_origin(record)} and stay under its licence; look it up, and name it "
        "here, before passing them on."
    )


def _origin(record: Mapping[str, Any]) -> str:
    """Where the texts come from, without local folders."""
    if source := record["identity"]["data"]["source"]:
        return f"{source['hub']} (commit {source['commit']})"
    data = record["config"]["task"]
    if "train_file" not in data:
        return f"generated rows of {data['name']}"
    files = files_of("train", data["train_file"], data["data_dir"])
    return f"{files[0].name if len(files) == 1 else f'{len(files)} files'} of {data['name']}"


def _measured(record: Mapping[str, Any]) -> str:
    metric = record["run"]["metric"]
    value = record["metrics"].get(metric)
    return "-" if value is None else f"{metric} {value:.2f} ({record['run']['family']})"


def check_token() -> None:
    """Refuse an upload without a token, before anything is written.

    Raises:
        UserError: there is none, or the hub is switched off.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "--push-to-hub needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave the option out."
        )
    if get_token() is None:
        raise UserError("--push-to-hub needs a token that may write: log in with `hf auth login`, or set HF_TOKEN.")


def push(folder: Path, form: str, name: str) -> None:
    """Upload an exported folder as the repository `name`, which is private if it is new.

    Args:
        form: "datasets", "adapter" or "merged".

    Raises:
        UserError: the upload failed.
    """
    try:
        _push_dataset(folder, name) if form == "datasets" else _push_model(folder, form, name)
    except Exception as error:  # whatever the hub, the network or the libraries say
        raise UserError(
            f"{folder} is written, and could not be pushed to {name} ({in_one_line(error)}): export it again, to "
            "another --output."
        ) from error


def _push_dataset(folder: Path, name: str) -> None:
    from datasets import load_from_disk
    from huggingface_hub import DatasetCard, create_repo

    create_repo(name, repo_type="dataset", private=True, exist_ok=True)
    # The card first: the data set adds what it says of its files to the card that is there.
    DatasetCard((folder / "README.md").read_text("utf-8")).push_to_hub(name)
    data: Any = load_from_disk(folder)
    data.push_to_hub(name, private=True)


def _push_model(folder: Path, form: str, name: str) -> None:
    from huggingface_hub import ModelCard
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind: Any = AutoPeftModelForCausalLM if form == "adapter" else AutoModelForCausalLM
    kind.from_pretrained(folder, dtype="auto").push_to_hub(name, private=True)
    AutoTokenizer.from_pretrained(folder).push_to_hub(name, private=True)
    # Last: the model brings a card of its own, which says less.
    ModelCard((folder / "README.md").read_text("utf-8")).push_to_hub(name)
