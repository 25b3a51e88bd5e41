"""How fast every sample gets its effort score, against what is done today and against the physical floor.

    python -m experiments.benchmark_scoring task=dialogsum task.data_dir=FOLDER -- task=gsm8k ...

takes settings of a run, `--` between cases, and scores the first --samples of each pool with the family's small
model and its target, both with the fresh adapter that the authors score with (rank 81 on q_proj and v_proj), B
drawn at random so that nothing is zero. The ways, in interleaved rounds:

- authors: their procedure, batch 1, padded to a multiple of 8, logits everywhere, the loss backpropagated twice
  through all adapters, the gradient of the last block's v_proj lora_B read off (twice the true one, so halved);
- authors, once: the same without the second backward pass;
- floor: a forward pass over our batches with logits at label positions alone;
- ours: `staff.scoring`, batched, exact;
- ours, bf16: the same in bfloat16, where asked for by --bf16 1.

With --drawn 1 the models have the shapes of their configurations and weights drawn at random, on the device: for
families whose weights are not at hand. A folder with config.json and a tokenizer is enough then.

"of the floor" is floor time over our time: 1 says that scores cost nothing beyond a forward pass. "FLOPs bound" is
the same ratio of floating point operations: what it would be if both ran at the same speed. It is below 1 because
the gradient of the head is another product of the head's size; only what the last block skips pays that back.
Error: the largest relative difference of our scores from the authors'. The second table says where the time goes,
in milliseconds by torch's profiler: what separates ours from the floor. The third is one size after the other:
throughput and peak memory while the number of samples grows. Times are the processor's; on a GPU the clock's, and
without the second table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from staff.adapters import fresh_lora
from staff.cost import Meter, forward_flops, scoring_flops
from staff.gradients import Positions
from staff.tokens import TokenizedSamples
from torch.nn.functional import cross_entropy

from experiments.benchmarking import alternating, arguments, clock, configured, row, table, write
from experiments.single import Run
from staff.models import LoraSpec, ModelSpec
from staff.scoring import Asked, score_samples, suited_batch_tokens

ADAPTER = LoraSpec(rank=81, alpha=16, dropout=0.0, targets=("q_proj", "v_proj"))
EFFORT = Asked(("effort",))
Load = Callable[[ModelSpec], Any]


def drawn_at_random(spec: ModelSpec) -> Any:
    torch.manual_seed(0)
    return spec.shapes("cuda" if torch.cuda.is_available() else "cpu").eval()


def with_adapter(spec: ModelSpec, load: Load) -> Any:
    model = fresh_lora(load(spec), ADAPTER, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def ours(model: Any, samples: TokenizedSamples, run: Run, pad: int) -> np.ndarray:
    return score_samples(model, samples, EFFORT, batch_tokens=run.scoring.batch_tokens, pad_token_id=pad)["effort"]


def authors(model: Any, samples: TokenizedSamples, pad: int, backwards: int) -> np.ndarray:
    weights = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for weight in weights.values():
        weight.requires_grad_()
    last = [p for name, p in weights.items() if ".v_proj.lora_B." in name][-1]
    scores = np.empty(len(samples))
    for i, tokens in enumerate(samples.input_ids):
        padding = -len(tokens) % 8
        ids = torch.tensor([[*tokens, *[pad] * padding]], device=model.device)
        labels = torch.tensor([*samples.labels(i), *[-100] * padding], device=model.device)
        mask = (torch.arange(len(ids[0]), device=model.device) < len(tokens))[None].long()
        model.zero_grad()
        loss = cross_entropy(model(input_ids=ids, attention_mask=mask).logits[0, :-1].float(), labels[1:])
        for turn in range(backwards):
            loss.backward(retain_graph=turn + 1 < backwards)
        assert last.grad is not None
        scores[i] = last.grad.norm().item() / backwards
    model.requires_grad_(False)
    return scores


def floor(model: Any, batches: list[tuple[torch.Tensor, Positions]]) -> None:
    head = model.get_output_embeddings()
    with torch.no_grad():
        for ids, at in batches:
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            head(at.gather(hidden)).sum().item()


def batches_of(
    samples: TokenizedSamples, budget: int, pad: int, device: Any
) -> list[tuple[torch.Tensor, Positions]]:
    """Those of `score_samples`."""
    order, made = np.argsort(-samples.lengths, kind="stable"), []
    while len(order):
        size = max(1, budget // int(samples.lengths[order[0]]))
        batch, order = samples.take(order[:size]), order[size:]
        width = max(map(len, batch.input_ids))
        filled = [[*ids, *[pad] * (width - len(ids))] for ids in batch.input_ids]
        labels = [[*batch.labels(i), *[-100] * (width - len(ids))] for i, ids in enumerate(batch.input_ids)]
        ids = torch.tensor(filled, device=device)
        made.append((ids, Positions.of_predictions(torch.tensor(labels, device=device))))
    return made


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "attention, backward": ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",),
    "softmax": ("aten::_softmax",),
    "zeros": ("aten::fill_", "aten::zero_"),
}


def profiled(way: Callable[[], Any]) -> list[str]:
    """Milliseconds that a way spends in operations of each of `KINDS`, and in all others, on a processor."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        way()
    spent = {event.key: event.self_cpu_time_total / 1000 for event in profile.key_averages()}
    parts = [sum(spent.get(operation, 0.0) for operation in kind) for kind in KINDS.values()]
    return [f"{part:.0f}" for part in (*parts, sum(spent.values()) - sum(parts))]


def compare(run: Run, role: str, count: int, rounds: int, bf16: int, load: Load) -> tuple[str, list[str]]:
    spec = run.family.small if role == "small" else run.family.target
    samples = run.tokenized[role].take(np.arange(count))
    model, pad = with_adapter(spec, load), spec.tokenizer().pad_token_id
    batches = batches_of(samples, run.scoring.batch_tokens or suited_batch_tokens(model), pad, model.device)
    ways: dict[str, Callable[[], Any]] = {
        "authors": partial(authors, model, samples, pad, 2),
        "once": partial(authors, model, samples, pad, 1),
        "floor": partial(floor, model, batches),
        "ours": partial(ours, model, samples, run, pad),
    }
    if bf16:
        ways["bf16"] = partial(ours, with_adapter(spec, load).bfloat16(), samples, run, pad)
    seconds, values = alternating(ways, rounds)
    error = np.max(np.abs(values["ours"] / values["authors"] - 1))
    narrow = ("", "")
    if bf16:
        rank = spearmanr(values["bf16"], values["ours"])[0]
        narrow = (f"{seconds['authors'] / seconds['bf16']:.2f} x", f"{rank:.4f}")
    bound = forward_flops(model.config, samples.lengths, samples.answer_lengths)
    bound += 2 * samples.lengths.sum() * sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    bound /= scoring_flops(model, samples.lengths, samples.answer_lengths, EFFORT)
    name = f"{run.choices['family']} {role}, {run.choices['task']}"
    on_processor = () if torch.cuda.is_available() else ("floor", "ours")
    profiles = [row(f"{name}: {way}", *profiled(ways[way])) for way in on_processor]
    compared = row(
        name,
        *(f"{count / seconds[name]:.3g}" for name in ("authors", "once", "floor", "ours")),
        f"{seconds['authors'] / seconds['ours']:.2f} x",
        f"{seconds['once'] / seconds['ours']:.2f} x",
        f"{seconds['floor'] / seconds['ours']:.2f}",
        f"{bound:.2f}",
        f"{error:.0e}",
        *narrow,
    )
    return compared, profiles


def growth(run: Run, count: int, load: Load) -> list[str]:
    """1, 4 and 16 times the samples, of the small model."""
    spec, whole = run.family.small, run.tokenized["small"]
    model, pad, rows = with_adapter(spec, load), spec.tokenizer().pad_token_id, []
    ours(model, whole.take(np.arange(count)), run, pad)
    for times in (1, 4, 16):
        if times * count > len(whole.ids):
            break
        samples = whole.take(np.arange(times * count))
        with Meter() as meter:
            started = clock()
            ours(model, samples, run, pad)
            seconds = clock() - started
        name = f"{run.choices['family']} small, {run.choices['task']}"
        memory = meter.cost.peak_memory_bytes / 1e6
        rows.append(row(name, f"{len(samples):,}", f"{len(samples) / seconds:.3g}", f"{memory:,.0f}"))
    return rows


def main() -> None:
    asked, cases = arguments(__doc__, samples=192, rounds=3, bf16=0, growth=128, drawn=0)
    load = drawn_at_random if asked.drawn else ModelSpec.load
    lines = table(
        *("model, data", "authors", "authors, once", "floor", "ours", "ours / authors", "ours / once"),
        *("of the floor", "FLOPs bound", "error", "bf16 / authors", "bf16 rank correlation"),
    )
    spent = table("model, data: way", *KINDS, "all else")
    growing = table("model, data", "samples", "samples/s", "peak memory, MB")
    for case in cases:
        run = configured(*case, f"task.train_limit={max(asked.samples, 17 * asked.growth)}")
        for role in ("small", "target"):
            compared, profiles = compare(run, role, asked.samples, asked.rounds, asked.bf16, load)
            lines.append(compared)
            spent += profiles
            print(compared, *profiles, sep="\n", flush=True)
        growing += growth(run, asked.growth, load)
    write(asked.name or "scoring", __doc__, lines, *([] if torch.cuda.is_available() else [spent]), growing)


if __name__ == "__main__":
    main()
