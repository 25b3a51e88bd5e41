"""Measure the embedded tiny family and rewrite the table of its model card.

    python -m experiments.measure_tiny_family

Both models are fine-tuned on the excerpt's pool with LoRA; the raw and the tuned ones summarise its test dialogues,
and the effort scores of the tuned small model are compared with those of the raw target. `--test-file` measures on
other dialogues instead, as was done to choose the mixture (then the card is left as it is).
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import rankdata, spearmanr
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from experiments.pretrain_tiny_family import ASSETS, encode, read_jsonl, summary_sample
from staff.models import ModelSpec

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def with_lora(model, seed: int):
    """A copy of the model with a fresh adapter on every linear layer: B is zero, A is drawn from the seed."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(model), config)


def collate(samples, pad: int):
    """Right-padded ids, and labels that are -100 outside the answers, already shifted to the predicting token."""
    width = max(len(ids) for ids, _ in samples)
    ids = torch.full((len(samples), width), pad)
    labels = torch.full((len(samples), width), -100)
    for row, (tokens, start) in enumerate(samples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, start - 1 : len(tokens) - 1] = ids[row, start : len(tokens)]
    return ids, labels


def answer_losses(model, ids, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every answer token, and the row each belongs to; the head runs on these positions alone."""
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
    rows, columns = (labels >= 0).nonzero(as_tuple=True)
    return cross_entropy(causal.lm_head(hidden[rows, columns]), labels[rows, columns], reduction="none"), rows


def finetune(model, samples, args, pad: int, seed: int):
    """LoRA on the answer tokens; batches of similar length in random order, cosine, a tenth of warm-up."""
    rng = np.random.default_rng(seed)
    model = with_lora(model, seed).train()
    params = [param for param in model.parameters() if param.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=args.learning_rate, weight_decay=0.0)
    batches = []
    for _ in range(args.epochs):
        order = sorted(rng.permutation(len(samples)), key=lambda position: len(samples[position][0]))
        groups = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
        batches += [groups[i] for i in rng.permutation(len(groups))]
    warm_up = max(1, len(batches) // 10)
    for step, batch in enumerate(batches):
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, len(batches) - warm_up)))
        optimiser.param_groups[0]["lr"] = args.learning_rate * min(1, (step + 1) / warm_up) * decay
        losses, _ = answer_losses(model, *collate([samples[i] for i in batch], pad))
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@torch.inference_mode()
def summarise(model, samples, tokenizer, max_new: int = 64) -> list[list[int]]:
    """Greedy answers as token ids, without the end."""
    answers: list[list[int]] = [[] for _ in samples]
    order = sorted(range(len(samples)), key=lambda position: samples[position][1])
    for first in range(0, len(order), 32):
        group = order[first : first + 32]
        prompts = [samples[i][0][: samples[i][1]] for i in group]
        width = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False)
        for i, tokens in zip(group, output[:, width:].tolist(), strict=True):
            stop = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
            answers[i] = tokens[:stop]
    return answers


def rouge_l(texts: list[str], rows: list[dict]) -> np.ndarray:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    references = [[row[key] for key in row if key.startswith("summary")] for row in rows]
    return np.array(
        [
            max(scorer.score(reference, text)["rougeL"].fmeasure for reference in several)
            for text, several in zip(texts, references, strict=True)
        ]
    )


def efforts(model, samples, pad: int) -> dict[str, np.ndarray]:
    """Norm of each sample's gradient: of the last block's v_proj lora_B, and of all LoRA parameters."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    last = max((name for name in layers if name.endswith("v_proj")), key=lambda name: int(name.split(".")[-3]))
    seen = {}

    def remember(name):
        def hook(module, inputs, output):
            output.register_hook(lambda gradient: seen.__setitem__(name, (inputs[0].detach(), gradient)))

        return hook

    hooks = [layer.register_forward_hook(remember(name)) for name, layer in layers.items()]
    squares = {"last": np.zeros(len(samples)), "all": np.zeros(len(samples))}
    order = sorted(range(len(samples)), key=lambda position: len(samples[position][0]))
    for first in range(0, len(order), 16):
        group = order[first : first + 16]
        losses, rows = answer_losses(model, *collate([samples[i] for i in group], pad))
        counts = torch.bincount(rows, minlength=len(group))
        (losses / counts[rows]).sum().backward()
        with torch.no_grad():
            for name, layer in layers.items():
                x, gradient = seen[name]
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                gradient = gradient * layer.scaling["default"]
                of_b = torch.einsum("bto,btr->bor", gradient, x @ a.T).square().sum((1, 2)).numpy()
                of_a = torch.einsum("btr,bti->bri", gradient @ b, x).square().sum((1, 2)).numpy()
                squares["all"][group] += of_a + of_b
                if name == last:
                    squares["last"][group] = of_b
        model.zero_grad()
    for hook in hooks:
        hook.remove()
    return {kind: np.sqrt(values) for kind, values in squares.items()}


def partial_spearman(x, y, given) -> float:
    """Spearman's correlation of x and y with the ranks of a third variable regressed out of both."""
    design = np.stack([np.ones(len(given)), rankdata(given)], axis=1)
    residuals = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (rankdata(x), rankdata(y))]
    return float(np.corrcoef(*residuals)[0, 1])


def margin(better: np.ndarray, worse: np.ndarray, seed: int) -> str:
    """Mean difference with the 95 % interval of a paired bootstrap over the test samples."""
    draws = np.random.default_rng(seed).integers(0, len(better), (10_000, len(better)))
    low, high = np.quantile((better - worse)[draws].mean(axis=1), [0.025, 0.975])
    return f"{(better - worse).mean():+.3f} [{low:+.3f}, {high:+.3f}]"


TUNED, RAW, SMALL = "target, tuned on the pool", "target, raw", "small, tuned on the pool"
TENTH = "target, tuned on a random tenth"


def measure(args) -> str:
    pool, test = read_jsonl(args.train_file)[: args.pool], read_jsonl(args.test_file)[: args.test]
    folder = args.assets / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    train = encode(tokenizer, [summary_sample(row) for row in pool])
    models, seconds = adapted(folder, train, args, tokenizer.pad_token_id)
    effort = {name: efforts(models[name], train, tokenizer.pad_token_id) for name in (SMALL, RAW, TUNED)}
    lines = [*performance(models, seconds, test, tokenizer, args), "", *agreement(effort, train)]
    settings = (
        f"learning rate {args.learning_rate}, {args.epochs} epochs, batch {args.batch_size}, seed {args.seed}"
    )
    return f"Pool of {len(pool)}, {len(test)} test dialogues; {settings}.\n\n" + "\n".join(lines) + "\n"


def adapted(folder: Path, train, args, pad: int):
    """The raw and the tuned models by name, and the seconds that the tuned ones took."""
    roles = ("small", "target")
    raw = {role: ModelSpec(str(folder / role)).weights(dtype=torch.float32).eval() for role in roles}
    tenth = sorted(np.random.default_rng(args.seed).choice(len(train), len(train) // 10, replace=False))
    tuned, seconds = {}, {}
    for name, role, samples in (
        (SMALL, "small", train),
        (TUNED, "target", train),
        (TENTH, "target", [train[i] for i in tenth]),
    ):
        started = time.time()
        tuned[name] = finetune(raw[role], samples, args, pad, args.seed)
        seconds[name] = time.time() - started
    return {f"{role}, raw": with_lora(raw[role], args.seed).eval() for role in roles} | tuned, seconds


def performance(models, seconds, test, tokenizer, args) -> list[str]:
    """What the models' summaries are worth, and the margins between them, as tables."""
    probe = encode(tokenizer, [summary_sample({**row, "summary": row.get("summary1", "")}) for row in test])
    lengths = [[len(tokenizer(row[k])["input_ids"]) for k in row if k.startswith("summary")] for row in test]
    lines = ["| model | ROUGE-L | cut to the length of the references | mean tokens | fine-tuning |"]
    lines += ["|---|---|---|---|---|"]
    scores, cut = {}, {}
    for name, model in models.items():
        answers = summarise(model, probe, tokenizer)
        scores[name] = rouge_l(tokenizer.batch_decode(answers), test)
        short = [answer[: round(np.mean(several))] for answer, several in zip(answers, lengths, strict=True)]
        cut[name] = rouge_l(tokenizer.batch_decode(short), test)
        spent = f"{seconds[name]:.0f} s" if name in seconds else ""
        lines.append(
            f"| {name} | {scores[name].mean():.3f} | {cut[name].mean():.3f} "
            f"| {np.mean([len(answer) for answer in answers]):.1f} | {spent} |"
        )
        if args.show:
            print(name, *tokenizer.batch_decode(answers[: args.show]), sep="\n  ")
    lines += ["", "| margin in ROUGE-L over the test samples | mean [95 % interval] |", "|---|---|"]
    for label, better, worse in (
        ("tuned target over raw target", scores[TUNED], scores[RAW]),
        ("the same, both cut to the length of the references", cut[TUNED], cut[RAW]),
        ("tuned target over tuned small model", scores[TUNED], scores[SMALL]),
        ("whole pool over a random tenth", scores[TUNED], scores[TENTH]),
    ):
        lines.append(f"| {label} | {margin(better, worse, args.seed)} |")
    return lines


def agreement(effort, train) -> list[str]:
    """How the small model's effort scores agree with the target's, as a table."""
    answer_lengths = [len(ids) - start for ids, start in train]
    lines = ["| effort scores on the pool: Spearman | last v_proj lora_B | all LoRA parameters |", "|---|---|---|"]
    for name in (RAW, TUNED):
        for label, correlate in (
            ("", lambda x, y: spearmanr(x, y)[0]),
            (", given the answer's length", lambda x, y: partial_spearman(x, y, answer_lengths)),
        ):
            values = [correlate(effort[SMALL][kind], effort[name][kind]) for kind in ("last", "all")]
            lines.append(f"| {SMALL} / {name}{label} | {values[0]:.2f} | {values[1]:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with tiny/ and dialogsum/")
    parser.add_argument("--train-file", type=Path, default=ASSETS / "dialogsum" / "train.jsonl")
    parser.add_argument("--test-file", type=Path, help="the excerpt's test dialogues if not given")
    parser.add_argument("--pool", type=int, default=1_200, help="use the first so many")
    parser.add_argument("--test", type=int, default=150, help="use the first so many")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--show", type=int, default=0, help="print so many answers of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rewrite = args.test_file is None
    args.test_file = args.test_file or ASSETS / "dialogsum" / "test.jsonl"
    table = measure(args)
    print(table)
    card = args.assets / "tiny" / "README.md"
    if rewrite:
        before, rest = card.read_text(encoding="utf-8").split(BEGIN)
        card.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
