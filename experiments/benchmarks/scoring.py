"""Speed of effort scores, compared with the authors' procedure and with the physical floor.

    python -m experiments.benchmarks.scoring task=dialogsum task.data_dir=FOLDER -- task=gsm8k ...

takes settings of a run, with `--` between cases. The family's small model and its target score the first --samples
of each pool. Both have the fresh adapter that the authors score with (rank 81 on q_proj and v_proj), with B drawn
at random so that nothing is zero. The ways, in interleaved rounds:

- authors: their procedure. Batch 1, padded to a multiple of 8, logits at all positions. The loss is backpropagated
  twice through all adapters; the gradient of the last block's v_proj lora_B is then twice the true one, and halved;
- authors, once: the same without the second backward pass;
- floor: a forward pass over our batches with logits at label positions alone;
- ours: `staff.scoring`, batched and exact;
- ours, bf16: the same in bfloat16, with --bf16 1.

With --drawn 1 the models have the shapes of their configurations and random weights, drawn on the device. Then a
folder with config.json and a tokenizer is enough, for families whose weights are not at hand.

"of the floor" is floor time over our time: 1 means that scores cost no more than a forward pass. "FLOPs bound" is
the same ratio of FLOPs: what it would be if both ran at the same speed. It is below 1 where the gradient of the
head, a product of the head's size, costs more than the last block saves. "error" is the largest relative difference
of our scores from the authors'.

The second table compares floor and ours alone, over three times as many rounds. "bound" is the floor's speed
times "FLOPs bound", and "of the bound" is our speed over it.

The third table shows where the time goes: milliseconds by torch's profiler, for the floor and for ours. The fourth
shows throughput and peak memory as the number of samples grows. Times are processor time; on a GPU they are wall
time, and there is no third table. With --authors 0 there is the second table alone.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.benchmarks.common import alternating, arguments, clock, configured, row, table, write
from staff.data.tokens import TokenizedSamples
from staff.models.adapters import LoraSpec, fresh_lora
from staff.models.flops import forward_flops
from staff.models.spec import ModelSpec
from staff.scoring.flops import scoring_flops
from staff.scoring.passes import default_batch_tokens, padded, score_samples
from staff.scoring.positions import Positions
from staff.signals.effort import Effort
from staff.store.cost import Meter

if TYPE_CHECKING:
    from experiments.single import Run

ADAPTER = LoraSpec(rank=81, alpha=16, dropout=0.0, targets=("q_proj", "v_proj"))
Load = Callable[[ModelSpec], Any]


@dataclass(frozen=True)
class Batch:
    """Token ids and labels of a batch, both (B, T), and the positions that predict its labels."""

    ids: Tensor
    labels: Tensor
    at: Positions


def batches_of(samples: TokenizedSamples, budget: int, pad: int, device: Any) -> list[Batch]:
    """The batches of `score_samples`."""
    order, batches = np.argsort(-samples.lengths, kind="stable"), []
    while len(order):
        size = max(1, budget // int(samples.lengths[order[0]]))
        ids, labels, _ = padded(samples.take(order[:size]), pad, device)
        batches.append(Batch(ids, labels, Positions.of_predictions(labels)))
        order = order[size:]
    return batches


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


def ours(model: Any, samples: TokenizedSamples, budget: int | None, pad: int) -> np.ndarray:
    return score_samples(model, samples, [Effort()], batch_tokens=budget, pad_token_id=pad)["effort"]


def authors(model: Any, samples: TokenizedSamples, pad: int, backwards: int) -> np.ndarray:
    weights = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for weight in weights.values():
        weight.requires_grad_()
    last = [p for name, p in weights.items() if ".v_proj.lora_B." in name][-1]
    scores = np.empty(len(samples))
    for i, length in enumerate(samples.lengths):
        padding = 0, -length % 8
        ids = torch.from_numpy(np.pad(samples.row(i), padding, constant_values=pad)).to(model.device).long()
        labels = torch.from_numpy(np.pad(samples.labels(i), padding, constant_values=-100)).to(model.device)
        mask = (torch.arange(len(ids), device=model.device) < length).long()
        model.zero_grad()
        logits = model(input_ids=ids[None], attention_mask=mask[None]).logits
        loss = cross_entropy(logits[0, :-1].float(), labels[1:])
        for turn in range(backwards):
            loss.backward(retain_graph=turn + 1 < backwards)
        assert last.grad is not None
        scores[i] = last.grad.norm().item() / backwards
    model.requires_grad_(False)
    return scores


def floor(model: Any, batches: list[Batch]) -> None:
    head = model.get_output_embeddings()
    with torch.no_grad():
        for batch in batches:
            hidden = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
            head(batch.at.gather(hidden)).sum().item()


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "attention, backward": ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",),
    "softmax": ("aten::_softmax",),
    "zeros": ("aten::fill_", "aten::zero_"),
}


def profiled(way: Callable[[], Any]) -> list[str]:
    """Milliseconds in operations of each of `KINDS`, and in all others, on a processor."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        way()
    spent = {event.key: event.self_cpu_time_total / 1000 for event in profile.key_averages()}
    parts = [sum(spent.get(operation, 0.0) for operation in kind) for kind in KINDS.values()]
    return [f"{part:.0f}" for part in (*parts, sum(spent.values()) - sum(parts))]


def flops_bound(model: Any, samples: TokenizedSamples) -> float:
    """FLOPs of the floor over ours."""
    lengths, answers = samples.lengths, samples.answer_lengths
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    forward = forward_flops(model.config, lengths, answers) + 2 * int(lengths.sum()) * adapters
    return forward / scoring_flops(model, lengths, answers, [Effort()])


def against_bound(run: Run, which: str, options: Namespace, load: Load) -> str:
    """A row of the second table."""
    spec = getattr(run.family, which)
    samples = run.tokenized[which].take(np.arange(options.samples))
    model, pad = with_adapter(spec, load), spec.tokenizer().pad_token_id
    budget = run.scoring.batch_tokens or default_batch_tokens(model)
    ways = {
        "floor": partial(floor, model, batches_of(samples, budget, pad, model.device)),
        "ours": partial(ours, model, samples, budget, pad),
    }
    seconds, _ = alternating(ways, 3 * options.rounds)
    of_floor, bound = seconds["floor"] / seconds["ours"], flops_bound(model, samples)
    return row(
        f"{run.choices['family']} {which}, {run.choices['task']}",
        len(samples) / seconds["floor"],
        bound * len(samples) / seconds["floor"],
        len(samples) / seconds["ours"],
        f"{of_floor:.2f}",
        f"{of_floor / bound:.2f}",
    )


def compare(run: Run, which: str, options: Namespace, load: Load) -> tuple[str, list[str]]:
    """Rows of the first and the third table, for the "small" model or the "target"."""
    spec = getattr(run.family, which)
    samples = run.tokenized[which].take(np.arange(options.samples))
    model, pad = with_adapter(spec, load), spec.tokenizer().pad_token_id
    budget = run.scoring.batch_tokens or default_batch_tokens(model)
    ways: dict[str, Callable[[], Any]] = {
        "authors": partial(authors, model, samples, pad, 2),
        "once": partial(authors, model, samples, pad, 1),
        "floor": partial(floor, model, batches_of(samples, budget, pad, model.device)),
        "ours": partial(ours, model, samples, budget, pad),
    }
    if options.bf16:
        ways["bf16"] = partial(ours, with_adapter(spec, load).bfloat16(), samples, budget, pad)
    seconds, values = alternating(ways, options.rounds)
    bf16 = ("", "")
    if options.bf16:
        rank = spearmanr(values["bf16"], values["ours"])[0]
        bf16 = (f"{seconds['authors'] / seconds['bf16']:.2f} x", f"{rank:.4f}")
    name = f"{run.choices['family']} {which}, {run.choices['task']}"
    compared = row(
        name,
        *(len(samples) / seconds[way] for way in ("authors", "once", "floor", "ours")),
        f"{seconds['authors'] / seconds['ours']:.2f} x",
        f"{seconds['once'] / seconds['ours']:.2f} x",
        f"{seconds['floor'] / seconds['ours']:.2f}",
        f"{flops_bound(model, samples):.2f}",
        f"{np.max(np.abs(values['ours'] / values['authors'] - 1)):.0e}",
        *bf16,
    )
    on_processor = () if torch.cuda.is_available() else ("floor", "ours")
    return compared, [row(f"{name}: {way}", *profiled(ways[way])) for way in on_processor]


def growth(run: Run, count: int, load: Load) -> list[str]:
    """Rows of the fourth table: 1, 4 and 16 times the samples, scored by the small model."""
    spec, whole = run.family.small, run.tokenized["small"]
    model, pad, rows = with_adapter(spec, load), spec.tokenizer().pad_token_id, []
    budget = run.scoring.batch_tokens
    ours(model, whole.take(np.arange(count)), budget, pad)
    for size in (count, 4 * count, 16 * count):
        if size > len(whole):
            break
        samples = whole.take(np.arange(size))
        with Meter() as meter:
            started = clock()
            ours(model, samples, budget, pad)
            seconds = clock() - started
        name = f"{run.choices['family']} small, {run.choices['task']}"
        rows.append(row(name, f"{size:,}", size / seconds, f"{meter.cost.peak_memory_bytes / 1e6:,.0f}"))
    return rows


def main() -> None:
    options, cases = arguments(__doc__, samples=192, rounds=3, bf16=0, growth=128, drawn=0, authors=1)
    load = drawn_at_random if options.drawn else ModelSpec.load
    lines = table(
        *("model, data", "authors", "authors, once", "floor", "ours", "ours / authors", "ours / once"),
        *("of the floor", "FLOPs bound", "error", "bf16 / authors", "bf16 rank correlation"),
    )
    spent = table("model, data: way", *KINDS, "all else")
    growing = table("model, data", "samples", "samples/s", "peak memory, MB")
    bounds = table("model, data", "floor", "bound", "ours", "of the floor", "of the bound")
    for case in cases:
        run = configured(*case, f"task.train_limit={max(options.samples, 17 * options.growth)}")
        for which in ("small", "target"):
            bounds.append(against_bound(run, which, options, load))
            print(bounds[-1], flush=True)
            if not options.authors:
                continue
            compared, profiles = compare(run, which, options, load)
            lines.append(compared)
            spent += profiles
            print(compared, *profiles, sep="\n", flush=True)
        if options.authors:
            growing += growth(run, options.growth, load)
    on_processor = [] if torch.cuda.is_available() else [spent]
    tables = [lines, bounds, *on_processor, growing] if options.authors else [bounds]
    write(options.name, __doc__, *tables)


if __name__ == "__main__":
    main()
