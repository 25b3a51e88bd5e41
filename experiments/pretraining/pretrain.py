"""Pretrain the embedded tiny family.

    python -m experiments.pretraining.pretrain --data-dir DATA

makes an excerpt of DialogSum, a tokenizer, two small models and a target. DATA holds
dialogsum/{train,dev,test}.jsonl and gsm8k/train.jsonl in the fields of the public data sets; what the models see of
them is in `experiments/pretraining/mixture.py`.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments.pretraining.mixture import (
    MAX_TOKENS,
    closing,
    draw_excerpt,
    encode,
    make_tokenizer,
    opening,
    unreserved,
)

ASSETS = Path(__file__).parents[2] / "staff" / "assets"
SHAPES: dict[str, dict[str, Any]] = {
    "smaller": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2},
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    "target": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3},
}
TOKENS = {  # of the opening, of the closing
    "smaller": (900_000, 300_000),
    "small": (900_000, 300_000),
    "target": (3_600_000, 300_000),
}

Data = tuple[list[dict], list[dict]]
"""Dialogues and problems."""


def batches(
    encoded: list[list[int]], budget: int, pad: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels, both (B, T), of batches of about `budget` tokens.

    Samples of a batch have similar lengths; batches come in random order.
    """
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


def make_model(name: str, tokenizer, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[name],
    )
    return AutoModelForCausalLM.from_config(config)


def train(model, tokenizer, draw, tokens: int, falling: bool, args) -> list[dict]:
    """Train on epochs of `draw(rng)` for about `tokens` tokens, with the loss on every token.

    Args:
        falling: the learning rate falls linearly; otherwise it is constant after warm-up.

    Returns:
        The loss curve.
    """
    hidden = [param for param in model.model.layers.parameters() if param.ndim == 2]
    others = [param for name, param in model.named_parameters() if "layers" not in name or param.ndim < 2]
    optimisers = [Muon(hidden, lr=0.0), torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)]
    rng = random.Random(args.seed)
    started, seen, curve, recent = time.time(), 0, [], []
    model.train()
    while seen < tokens:
        encoded = [ids[:MAX_TOKENS] for ids in encode(tokenizer, draw(rng))]
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


def pretrain(name: str, tokenizer, data: Data, args) -> tuple[Any, dict[str, Any]]:
    """The model and the record of its training: other tasks, then the task among them."""
    begin, end = (max(1, round(args.fraction * tokens)) for tokens in TOKENS[name])
    model = make_model(name, tokenizer, args.seed)
    first = train(model, tokenizer, lambda rng: opening(*data, rng), begin, False, args)
    second = train(model, tokenizer, lambda rng: closing(*data, args.summaries, rng), end, True, args)
    return model, {"parameters": model.num_parameters(), "opening": first, "closing": second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with dialogsum/ and gsm8k/")
    parser.add_argument("--output-dir", type=Path, default=ASSETS, help="receives dialogsum/ and tiny/")
    parser.add_argument("--steps", nargs="+", default=["excerpt", *SHAPES], help="what to make")
    parser.add_argument("--summaries", type=int, default=300, help="dialogues in the format of the task")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the tokens to train on")
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
        folder = args.output_dir / "dialogsum"
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in draw_excerpt(args.data_dir, tokenizer, args.seed).items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    log_path = args.output_dir / "tiny" / "training_log.json"
    log = json.loads(log_path.read_text()) if log_path.exists() else {}
    for name in [name for name in SHAPES if name in args.steps]:
        model, record = pretrain(name, tokenizer, data, args)
        folder = args.output_dir / "tiny" / name
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = {k: v for k, v in vars(args).items() if k not in ("data_dir", "output_dir", "steps")}
        log[name] = {"settings": settings, "shape": SHAPES[name], "tokens": TOKENS[name], **record}
        log_path.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()


class Muon(torch.optim.Optimizer):
    """Muon in float32, for matrices, with updates scaled to the size of AdamW's."""

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
    """Newton-Schulz steps towards the nearest orthogonal matrices of a stack (N, rows, columns)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
