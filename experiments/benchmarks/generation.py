"""Speed of answering test prompts, compared with plain `generate` over unsorted batches of 8.

    python -m experiments.benchmarks.generation task=dialogsum task.data_dir=FOLDER -- task=gsm8k ...

takes settings of a run, with `--` between cases. The target answers the first --samples test prompts in interleaved
rounds. Ours (`staff/evaluation/decoding.py`) starts the longest prompts first, and puts the next prompts in the
place of answers that have ended, under a token budget. Times are processor time. "equal" counts the answers that
are the same, token by token.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from experiments.benchmarks.common import alternating, arguments, configured, row, table, write

if TYPE_CHECKING:
    from experiments.single import Run


def plain(model: Any, tokenizer: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Answers by transformers' `generate`, without end tokens."""
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
    assert run.generator is not None
    spec, new = run.family.target, run.task.max_new_tokens
    model, tokenizer, prompts = spec.load(), spec.tokenizer(), run.tokenized["test"].prompts()
    ways = {
        "plain": partial(plain, model, tokenizer, prompts, new),
        "ours": partial(run.generator.generate, model, tokenizer, prompts, max_new_tokens=new),
    }
    seconds, answers = alternating(ways, rounds)
    equal = sum(a == b for a, b in zip(answers["plain"], answers["ours"], strict=True))
    return row(
        f"{run.choices['family']}, {run.choices['task']}, "
        f"batch_tokens={run.setup.config['evaluation']['batch_tokens']}",
        *(len(prompts) / seconds[name] for name in ("plain", "ours")),
        f"{seconds['plain'] / seconds['ours']:.2f} x",
        f"{equal} of {len(prompts)}",
    )


def main() -> None:
    options, cases = arguments(__doc__, samples=128, rounds=3)
    lines = table("target, data", "plain, samples/s", "ours, samples/s", "ratio", "equal")
    for case in cases:
        lines.append(compare(configured(*case, f"task.test_limit={options.samples}"), options.rounds))
        print(lines[-1], flush=True)
    write(options.name, __doc__, lines)


if __name__ == "__main__":
    main()
