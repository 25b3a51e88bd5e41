"""The target that a run fine-tuned, as a folder that transformers or PEFT loads without this project."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.cards import model_card
from experiments.recorded import RecordedRun
from staff.data.chat import ChatTemplate
from staff.errors import UserError
from staff.models.adapters import load_trained
from staff.models.family import Family
from staff.models.prepare import prepare
from staff.models.spec import ModelSpec
from staff.runtime.files import local_path
from staff.store.manifest import check_contents, check_sizes, read_manifest
from staff.store.store import Store

FORMS = ("adapter", "merged")


@dataclass(frozen=True)
class TunedTarget:
    """What a run fine-tuned.

    Attributes:
        record: of the run.
        family: its target is ready to load, in the precision that it was fine-tuned and evaluated in.
        folder: the artefact of the fine-tuning.
    """

    record: Mapping[str, Any]
    family: Family
    folder: Path

    @property
    def spec(self) -> ModelSpec:
        return self.family.target

    @property
    def base(self) -> str:
        """What loads the model that was fine-tuned: a name on the hub, or an absolute folder."""
        return self.spec.path if self.spec.local is None else str(self.spec.local.resolve())


def tuned_target(run: RecordedRun, form: str, store: Path | None) -> TunedTarget:
    """The target of a recorded run.

    Args:
        form: one of `FORMS`.
        store: the store that holds it; None: the one of the run.

    Raises:
        UserError: nothing was fine-tuned, it is not in the store, the base model has changed, or the fine-tuning
            has no such form.
    """
    record = run.record()
    finetuning, config = record["finetuning"], record["config"]
    if finetuning is None:
        raise UserError(f"{run.name} fine-tuned no target: export a run with an evaluation and a coreset.")
    kind, quantization = config["finetune"]["kind"], config["finetune"].get("quantization")
    if form == "adapter" and kind != "lora":
        raise UserError(f"finetune.kind={kind} trains all weights and leaves no adapter: choose --format merged.")
    if form == "merged" and quantization:
        raise UserError(
            f"an adapter of {quantization} weights cannot be merged into them without rounding: choose --format "
            "adapter."
        )
    places = [store] if store else [local_path(str(config["store_dir"])), *_beside(run)]
    folders = [place / "finetune" / finetuning["fingerprint"][:32] for place in places]
    folder = next((folder for folder in folders if (folder / "manifest.json").is_file()), None)
    if folder is None:
        raise UserError(
            f"the fine-tuned target of {run.name} is not in {' or '.join(map(str, places))}: name the store with "
            "--store, or carry out the run again."
        )
    manifest, _ = read_manifest(folder)
    check_sizes(folder, manifest)
    check_contents(folder, manifest)
    family: Family = instantiate(OmegaConf.create(config["family"]), _convert_="all")
    target_alone = replace(family, small=family.target)
    family = prepare(target_alone, Store(folder.parent.parent)).with_loading(quantization, False)
    if family.target.identity() != record["identity"]["models"]["target"]:
        raise UserError(
            f"the model {family.target.path} is no longer the one that {run.name} fine-tuned: restore it, or carry "
            "out the run again."
        )
    return TunedTarget(record, family, folder)


def check_base(tuned: TunedTarget, form: str) -> None:
    """Refuse to upload an adapter whose base model is not on the hub."""
    if form == "adapter" and tuned.spec.local is not None:
        raise UserError(
            f"the model {tuned.spec.name} is not on the hub, where its adapter would lack it: push --format merged."
        )


def _beside(run: RecordedRun) -> list[Path]:
    """The store in the results folder that a run lies in, wherever that was moved to."""
    folder = getattr(run, "folder", None)
    return [] if folder is None else [folder.resolve().parent.parent / "artifacts"]


def write(tuned: TunedTarget, form: str, folder: Path) -> None:
    """Write the model with its tokenizer, chat template and card to an empty folder.

    Args:
        form: "adapter", which names its base model by an absolute path or by name and commit on the hub; or
            "merged", all weights, which need nothing else.
    """
    tokenizer = tuned.spec.tokenizer()
    if tuned.family.prompt_format == "plain":
        _begin_as_trained(tokenizer)
    tokenizer.save_pretrained(folder)
    (_write_adapter if form == "adapter" else _write_merged)(tuned, folder, tokenizer)
    on_hub = tuned.spec.local is None
    base = tuned.spec.path if on_hub else tuned.spec.name
    card = model_card(tuned.record, base, on_hub, form, _how_to_load(tuned, form))
    (folder / "README.md").write_text(card, "utf-8")


def _begin_as_trained(tokenizer: Any) -> None:
    """Let a tokenizer that does not do so put its begin token before a text, as samples were trained."""
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True


def _write_adapter(tuned: TunedTarget, folder: Path, tokenizer: Any) -> None:
    shutil.copy(tuned.folder / "adapter_model.safetensors", folder)
    config = json.loads((tuned.folder / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = tuned.base
    config["revision"] = tuned.spec.pinned().revision if tuned.spec.local is None else None
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), "utf-8")


def _write_merged(tuned: TunedTarget, folder: Path, tokenizer: Any) -> None:
    model = load_trained(tuned.spec, tuned.folder)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    # Generation ends where the run's did: at the end of turn of a chat template too.
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, _end_of_turn(tuned, tokenizer)}
    model.generation_config.eos_token_id = sorted(ends - {None})
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


def _end_of_turn(tuned: TunedTarget, tokenizer: Any) -> int | None:
    family = tuned.family
    if family.prompt_format == "plain":
        return tokenizer.eos_token_id
    return ChatTemplate(tokenizer, family.date, family.template_options).end


def _how_to_load(tuned: TunedTarget, form: str) -> str:
    name, library = {
        "adapter": ("AutoPeftModelForCausalLM", "peft"),
        "merged": ("AutoModelForCausalLM", "transformers"),
    }[form]
    load = f'model = {name}.from_pretrained(FOLDER, dtype="{tuned.spec.dtype}")'
    imports = f"from {library} import {name}\nfrom transformers import AutoTokenizer"
    if form == "merged":
        imports = f"from transformers import {name}, AutoTokenizer"
    return f"{imports}\n\n{load}\ntokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
