"""How fast test prompts are answered, against plain `generate` over unsorted batches of 8.

    python -m experiments.benchmark_generation task=dialogsum task.data_dir=FOLDER -- task=gsm8k ...

takes settings of a run, `--` between cases, and answers the first --samples test prompts with the target, in
interleaved rounds. Ours are batches of similar length under a token budget. Times are the processor's. "equal" says
how many answers are the same, token by token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from staff.evaluate import generate

from experiments.benchmarking import alternating, arguments, configured, row, table, write
from experiments.single import Run


def plain(model: Any, tokenizer: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    answers = []
    for start in range(0, len(prompts), 8):
        padded = tokenizer.pad(
            {"input_ids": prompts[start : start + 8]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
            rows = model.generate(**padded, **settings, eos_token_id=tokenizer.eos_token_id)
        for answer in rows[:, padded["input_ids"].shape[1] :].tolist():
            end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else len(answer)
            answers.append(answer[:end])
    return answers


def compare(run: Run, rounds: int) -> str:
    spec, samples, new = run.family.target, run.tokenized["test"], run.task.max_new_tokens
    model, tokenizer = spec.load(), spec.tokenizer()
    prompts = samples.prompts()
    how = {"max_new_tokens": new, "batch_tokens": run.cfg.evaluation.batch_tokens}
    ways = {
        "plain": partial(plain, model, tokenizer, prompts, new),
        "ours": partial(generate, model, tokenizer, prompts, **how),
    }
    seconds, answers = alternating(ways, rounds)
    equal = sum(a == b for a, b in zip(answers["plain"], answers["ours"], strict=True))
    return row(
        f"{run.choices['family']}, {run.choices['task']}, batch_tokens={how['batch_tokens']}",
        *(f"{len(prompts) / seconds[name]:.3g}" for name in ("plain", "ours")),
        f"{seconds['plain'] / seconds['ours']:.2f} x",
        f"{equal} of {len(prompts)}",
    )


def main() -> None:
    asked, cases = arguments(__doc__, samples=128, rounds=3)
    lines = table("target, data", "plain, samples/s", "ours, samples/s", "ratio", "equal")
    for case in cases:
        lines.append(compare(configured(*case, f"task.test_limit={asked.samples}"), asked.rounds))
        print(lines[-1], flush=True)
    write(asked.name or "generation", __doc__, lines)


if __name__ == "__main__":
    main()
