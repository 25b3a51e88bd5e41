"""What was exported, uploaded to the Hugging Face hub by the libraries' own `push_to_hub`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from staff.errors import UserError


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
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{folder} is written, and could not be pushed to {name} ({said}): export it again, to "
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
