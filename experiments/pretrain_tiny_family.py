"""Pretrain the embedded tiny family: an excerpt of DialogSum, a tokenizer, two small models and a target; and a
model of another family, with another architecture and a tokenizer of its own.

    python -m experiments.pretrain_tiny_family --data-dir DATA

DATA holds dialogsum/{train,dev,test}.jsonl and gsm8k/train.jsonl in the fields of the public data sets. The pools
are reserved: neither model nor tokenizer sees the first 4,000 training dialogues, the first 3,000 training
questions, or any validation or test sample. What the models learn instead is a mixture of instructions over the
other samples, drawn anew in every epoch; summaries in the format of the task are few on purpose, so that
fine-tuning on the pool has something left to teach.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

ASSETS = Path(__file__).parents[1] / "staff" / "assets"
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
SHAPES: dict[str, dict[str, Any]] = {
    "smaller": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2},
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    "target": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3},
    "other": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
}
TOKENS = {  # of the opening, of the closing
    "smaller": (900_000, 300_000),
    "small": (900_000, 300_000),
    "target": (3_600_000, 300_000),
    "other": (900_000, 300_000),
}

Sample = tuple[str, str]


def summary_sample(row: dict) -> Sample:
    """The task dialogsum: prompt and answer."""
    return f"Summarize the following dialogue.\n\n{row['dialogue']}\n\nSummary:", f" {row['summary']}"


def problem_sample(row: dict) -> Sample:
    """The task gsm8k: prompt and answer."""
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


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def unreserved(data_dir: Path) -> tuple[list[dict], list[dict]]:
    """The dialogues and the problems that pretraining may see."""
    dialogsum = {split: read_jsonl(data_dir / "dialogsum" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    held_out = dialogsum["train"][: RESERVED["dialogsum"]] + dialogsum["dev"] + dialogsum["test"]
    seen = {row["dialogue"].strip() for row in held_out}
    rest = dialogsum["train"][RESERVED["dialogsum"] :]
    problems = read_jsonl(data_dir / "gsm8k" / "train.jsonl")[RESERVED["gsm8k"] :]
    return [row for row in rest if row["dialogue"].strip() not in seen], problems


def make_tokenizer(dialogues: list[dict], problems: list[dict], vocab_size: int) -> PreTrainedTokenizerFast:
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


def encode(tokenizer, samples: list[Sample]) -> list[tuple[list[int], int]]:
    """Token ids with begin and end, prompt and answer tokenised apart, and where the answer begins."""
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    prompts, answers = (
        tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in zip(*samples, strict=True)
    )
    return [(bos + p + a + eos, 1 + len(p)) for p, a in zip(prompts, answers, strict=True)]


def draw_excerpt(data_dir: Path, tokenizer, seed: int) -> dict[str, list[dict]]:
    """The pool and the test samples that the package carries: from the reserved dialogues and the official test."""
    train = read_jsonl(data_dir / "dialogsum" / "train.jsonl")
    test = read_jsonl(data_dir / "dialogsum" / "test.jsonl")
    known = {row["dialogue"].strip() for row in train}
    test = [row for row in test if row["dialogue"].strip() not in known]
    pool = train[: RESERVED["dialogsum"]]
    encoded = encode(tokenizer, [summary_sample(row) for row in pool])
    pool = [row for row, (ids, _) in zip(pool, encoded, strict=True) if len(ids) <= MAX_TOKENS]
    rng = random.Random(seed)
    chosen = {}
    for split, rows in (("train", pool), ("test", test)):
        positions = sorted(rng.sample(range(len(rows)), EXCERPT[split]))
        chosen[split] = [{field: rows[position][field] for field in FIELDS[split]} for position in positions]
    return chosen


def opening(dialogues: list[dict], problems: list[dict], rng: random.Random) -> list[Sample]:
    """One epoch of other tasks: every dialogue in one of four forms, and a third of the problems."""
    forms = (topic_sample, dialogue_sample, continuation_sample, turn_sample)
    samples = [rng.choice(forms)(row, rng) for row in dialogues]
    return samples + [problem_sample(row) for row in rng.sample(problems, len(problems) // 3)]


def closing(dialogues: list[dict], problems: list[dict], met: int, rng: random.Random) -> list[Sample]:
    """The first `met` dialogues in the format of the task, among three times as many other samples."""
    others = opening(dialogues, problems, rng)
    return [summary_sample(row) for row in dialogues[:met]] + rng.sample(others, 3 * met)


def batches(encoded: list[list[int]], budget: int, pad: int, rng: random.Random):
    """Batches of about `budget` tokens, of samples of similar length, in random order: (ids, labels)."""
    order = sorted(range(len(encoded)), key=lambda position: (len(encoded[position]), rng.random()))
    groups, group = [], []
    for position in order:
        if group and (len(group) + 1) * len(encoded[position]) > budget:
            groups.append(group)
            group = []
        group.append(position)
    groups.append(group)
    rng.shuffle(groups)
    for group in groups:
        width = max(len(encoded[position]) for position in group)
        ids = torch.tensor([encoded[p] + [pad] * (width - len(encoded[p])) for p in group])
        labels = torch.tensor([encoded[p] + [-100] * (width - len(encoded[p])) for p in group])
        yield ids, labels


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al., 2024), in float32, scaled to the size of AdamW's."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for param in group["params"]:
                shapes.setdefault(param.shape, []).append(param)
            for shape, params in shapes.items():
                for param in params:
                    buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    buffer.lerp_(param.grad, 1 - group["momentum"])
                update = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params])
                update = orthogonalise(update) * (0.2 * math.sqrt(max(shape)))
                for param, delta in zip(params, update, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(delta, alpha=-group["lr"])


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrices of a stack."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def make_model(role: str, tokenizer, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    architecture = Qwen2Config if role == "other" else LlamaConfig
    config = architecture(
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[role],
    )
    return AutoModelForCausalLM.from_config(config)


def train(model, tokenizer, draw, tokens: int, falling: bool, args) -> list[dict]:
    """Train on epochs of `draw(rng)` for about `tokens` tokens, with the loss on every token; the loss curve."""
    hidden = [param for param in model.model.layers.parameters() if param.ndim == 2]
    others = [param for name, param in model.named_parameters() if "layers" not in name or param.ndim < 2]
    optimisers = [Muon(hidden, lr=0.0), torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)]
    rng = random.Random(args.seed)
    started, seen, curve, recent = time.time(), 0, [], []
    model.train()
    while seen < tokens:
        encoded = [ids[:MAX_TOKENS] for ids, _ in encode(tokenizer, draw(rng))]
        for ids, labels in batches(encoded, args.batch_tokens, tokenizer.pad_token_id, rng):
            rate = 1.0 - 0.98 * seen / tokens if falling else min(1.0, 0.05 + seen / args.warm_up_tokens)
            for group in [group for optimiser in optimisers for group in optimiser.param_groups]:
                group["lr"] = args.learning_rate * rate
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
            model.zero_grad()
            seen += int((labels >= 0).sum())
            recent.append(loss.item())
            if len(recent) == args.log_every:
                seconds = round(time.time() - started)
                curve.append({"tokens": seen, "seconds": seconds, "loss": round(sum(recent) / len(recent), 4)})
                print(json.dumps(curve[-1]), flush=True)
                recent.clear()
            if seen >= tokens:
                break
    model.eval()
    return curve


def pretrain(role: str, tokenizer, data: tuple[list[dict], list[dict]], args) -> tuple[PreTrainedModel, dict]:
    """Other tasks at a constant learning rate, then the task among them at a falling one."""
    begin, end = TOKENS[role]
    model = make_model(role, tokenizer, args.seed)
    first = train(model, tokenizer, lambda rng: opening(*data, rng), begin, False, args)
    second = train(model, tokenizer, lambda rng: closing(*data, args.met, rng), end, True, args)
    return model, {"parameters": model.num_parameters(), "opening": first, "closing": second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with dialogsum/ and gsm8k/")
    parser.add_argument("--output-dir", type=Path, default=ASSETS, help="receives dialogsum/ and tiny/")
    parser.add_argument("--steps", nargs="+", default=["excerpt", *SHAPES], help="what to make")
    parser.add_argument("--met", type=int, default=300, help="dialogues seen in the format of the task")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--warm-up-tokens", type=int, default=150_000)
    parser.add_argument("--batch-tokens", type=int, default=4_096)
    parser.add_argument("--vocab-size", type=int, default=4_096)
    parser.add_argument("--log-every", type=int, default=25, help="batches per point of the loss curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    data = unreserved(args.data_dir)
    tokenizer = make_tokenizer(*data, args.vocab_size)
    if "excerpt" in args.steps:
        for split, rows in draw_excerpt(args.data_dir, tokenizer, args.seed).items():
            write_jsonl(args.output_dir / "dialogsum" / f"{split}.jsonl", rows)
    log_path = args.output_dir / "tiny" / "training_log.json"
    log = json.loads(log_path.read_text()) if log_path.exists() else {}
    for role in [role for role in SHAPES if role in args.steps]:
        if role == "other":
            tokenizer = make_tokenizer(*data, args.vocab_size // 2)
        model, record = pretrain(role, tokenizer, data, args)
        folder = args.output_dir / "tiny" / role
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = {k: v for k, v in vars(args).items() if k not in ("data_dir", "output_dir", "steps")}
        log[role] = {"settings": settings, "shape": SHAPES[role], "tokens": TOKENS[role], **record}
        log_path.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
