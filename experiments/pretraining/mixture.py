"""What the tiny family is pretrained on, its tokenizer, and the excerpt of DialogSum that the package carries.

The pools are reserved: neither model nor tokenizer sees the first 4,000 training dialogues, the first 3,000
training questions, or any validation or test sample. The models learn from a mixture of instructions over the other
samples, drawn again in every epoch. Few of these are summaries in the format of the task, so that fine-tuning on
the pool still has something to teach.
"""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

RESERVED = {"dialogsum": 4_000, "gsm8k": 3_000}
EXCERPT = {"train": 1_200, "test": 150}
FIELDS = {
    "train": ("fname", "dialogue", "summary", "topic"),
    "test": ("fname", "dialogue", "summary1", "summary2", "summary3"),
}
MAX_TOKENS = 512
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
SPEAKER = r" ?#Person\d+#"
PIECES = SPEAKER + r"|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}#]+| ?#|\s+(?!\S)|\s+"

Rows = list[dict]
Sample = tuple[str, str]
"""Prompt and answer."""


def summary_sample(row: dict) -> Sample:
    """As the task dialogsum renders it."""
    return f"Summarize the following dialogue.\n\n{row['dialogue']}\n\nSummary:", f" {row['summary']}"


def problem_sample(row: dict) -> Sample:
    """As the task gsm8k renders it."""
    prompt = f"Solve the following problem step by step.\n\n{row['question']}\n\nAnswer:"
    return prompt, f" {row['answer']}"


def topic_sample(row: dict, rng: random.Random) -> Sample:
    return f"Name the topic of the following dialogue.\n\n{row['dialogue']}\n\nTopic:", f" {row['topic']}"


def dialogue_sample(row: dict, rng: random.Random) -> Sample:
    return f"Write a dialogue about the following event.\n\n{row['summary']}\n\nDialogue:\n", row["dialogue"]


def continuation_sample(row: dict, rng: random.Random) -> Sample:
    turns = row["dialogue"].split("\n")
    cut = rng.randrange(1, max(2, len(turns)))
    prompt = "Continue the following dialogue.\n\n" + "\n".join(turns[:cut]) + "\n\nContinuation:\n"
    return prompt, "\n".join(turns[cut:])


def turn_sample(row: dict, rng: random.Random) -> Sample:
    """Find a turn by its first words and repeat it."""
    turn = rng.choice(row["dialogue"].split("\n"))
    start = " ".join(turn.split(" ")[:4])
    return f"Find a turn in the following dialogue.\n\n{row['dialogue']}\n\nStart: {start}\nTurn:", f" {turn}"


def opening(dialogues: Rows, problems: Rows, rng: random.Random) -> list[Sample]:
    """One epoch of other tasks: every dialogue in one of four forms, and a third of the problems."""
    forms = (topic_sample, dialogue_sample, continuation_sample, turn_sample)
    samples = [rng.choice(forms)(row, rng) for row in dialogues]
    return samples + [problem_sample(row) for row in rng.sample(problems, len(problems) // 3)]


def closing(dialogues: Rows, problems: Rows, summaries: int, rng: random.Random) -> list[Sample]:
    """The first `summaries` dialogues in the format of the task, among three times as many other samples."""
    others = opening(dialogues, problems, rng)
    return [summary_sample(row) for row in dialogues[:summaries]] + rng.sample(others, 3 * summaries)


def read_jsonl(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def unreserved(data_dir: Path) -> tuple[Rows, Rows]:
    """The dialogues and the problems that pretraining may see."""
    dialogsum = {split: read_jsonl(data_dir / "dialogsum" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    held_out = dialogsum["train"][: RESERVED["dialogsum"]] + dialogsum["dev"] + dialogsum["test"]
    seen = {row["dialogue"].strip() for row in held_out}
    rest = dialogsum["train"][RESERVED["dialogsum"] :]
    problems = read_jsonl(data_dir / "gsm8k" / "train.jsonl")[RESERVED["gsm8k"] :]
    return [row for row in rest if row["dialogue"].strip() not in seen], problems


def make_tokenizer(dialogues: Rows, problems: Rows, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; a speaker such as #Person1# stays whole, digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    samples = [sample for row in dialogues for sample in (summary_sample(row), topic_sample(row, rng))]
    samples += [problem_sample(row) for row in problems]
    tokenizer.train_from_iterator((prompt + answer for prompt, answer in samples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=1024, clean_up_tokenization_spaces=False, **SPECIAL
    )


def encode(tokenizer, samples: list[Sample]) -> list[list[int]]:
    """Token ids with begin and end; prompt and answer are tokenised apart."""
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    prompts, answers = (
        tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in zip(*samples, strict=True)
    )
    return [bos + p + a + eos for p, a in zip(prompts, answers, strict=True)]


def draw_excerpt(data_dir: Path, tokenizer, seed: int) -> dict[str, Rows]:
    """The pool and the test samples of the package: from the reserved dialogues and the official test split."""
    train = read_jsonl(data_dir / "dialogsum" / "train.jsonl")
    test = read_jsonl(data_dir / "dialogsum" / "test.jsonl")
    known = {row["dialogue"].strip() for row in train}
    test = [row for row in test if row["dialogue"].strip() not in known]
    pool = train[: RESERVED["dialogsum"]]
    encoded = encode(tokenizer, [summary_sample(row) for row in pool])
    pool = [row for row, ids in zip(pool, encoded, strict=True) if len(ids) <= MAX_TOKENS]
    rng = random.Random(seed)
    chosen = {}
    for split, rows in (("train", pool), ("test", test)):
        positions = sorted(rng.sample(range(len(rows)), EXCERPT[split]))
        chosen[split] = [{field: rows[position][field] for field in FIELDS[split]} for position in positions]
    return chosen
