"""Measure the embedded tiny family and rewrite the table of its model card.

    python -m experiments.pretraining.measure

The small model and the target are fine-tuned on the excerpt's pool, with the settings of a run. The raw and the
fine-tuned models summarise its test dialogues. The effort scores of the fine-tuned small model are compared with
those of the target. With settings of a run, such as `task.data_dir=FOLDER` for other dialogues, the table is
printed and the card stays as it is. --show 3 prints the first three answers of each model.
"""

from dataclasses import dataclass

import numpy as np

from experiments.benchmarks.common import arguments, configured, machine, row, spearman, table
from experiments.pretraining.pretrain import ASSETS
from experiments.single import Run
from staff.evaluation.metrics import named_metric
from staff.evaluation.stage import Generate, read_predictions
from staff.models.state import ModelState
from staff.training.stage import Finetune

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
TUNED, RAW, SMALL = "target, tuned on the pool", "target, raw", "small, tuned on the pool"
TENTH = "target, tuned on a random tenth"


def states(run: Run) -> dict[str, ModelState]:
    """The raw and the fine-tuned models by name."""
    small, target, samples = run.family.small, run.family.target, run.tokenized["target"]
    tenth = np.random.default_rng(run.pool.seed).choice(len(samples), len(samples) // 10, replace=False)
    part = samples.take(np.sort(tenth))
    of_tenth = Finetune(target, part, run.settings, run.settings.epochs, run.pool.seed)
    return {
        "small, raw": ModelState(small),
        RAW: ModelState(target),
        SMALL: ModelState(small, run.pool.training("small")),
        TUNED: ModelState(target, run.pool.training("target_tuned")),
        TENTH: ModelState(target, of_tenth),
    }


@dataclass(frozen=True)
class Answers:
    """A model's answers to the test prompts.

    Attributes:
        tokens: tokens of each answer, (N,).
        rouge_l: ROUGE-L F1 of each answer, from 0 to 1, (N,).
        cut: the same with the answer cut to the mean length of its references.
    """

    texts: list[str]
    tokens: np.ndarray
    rouge_l: np.ndarray
    cut: np.ndarray


def answer(run: Run, state: ModelState) -> Answers:
    assert run.generator is not None
    generation = Generate(state, run.tokenized["test"], run.generator, run.task.max_new_tokens)
    answers = read_predictions(run.store.get(generation))
    by_id, tokenizer = {sample.id: sample.references for sample in run.splits.test}, state.spec.tokenizer()
    references = [by_id[id] for id in answers["id"]]
    texts = answers["prediction"].tolist()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    lengths = [round(np.mean([len(ids(text)) for text in several])) for several in references]
    short = [tokenizer.decode(ids(text)[:length]) for text, length in zip(texts, lengths, strict=True)]
    metric = named_metric("rougeL")
    whole, cut = (np.array(metric.measure(given, references)[1]) / 100 for given in (texts, short))
    return Answers(texts, answers["tokens"].to_numpy(), whole, cut)


def margin(better: np.ndarray, worse: np.ndarray, seed: int) -> str:
    """Mean difference with the 95 % interval of a paired bootstrap over the test samples."""
    draws = np.random.default_rng(seed).integers(0, len(better), (10_000, len(better)))
    low, high = np.quantile((better - worse)[draws].mean(axis=1), [0.025, 0.975])
    return f"{(better - worse).mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def performance(run: Run, show: int) -> list[str]:
    """ROUGE-L of the models' summaries, and the margins between the models, as tables."""
    lines = table("model", "ROUGE-L", "cut to the length of the references", "mean tokens", "fine-tuning")
    found: dict[str, Answers] = {}
    for name, state in states(run).items():
        this = found[name] = answer(run, state)
        spent = f"{run.store.get(state.training).cost.seconds:.0f} s" if state.training else ""
        means = f"{this.rouge_l.mean():.3f}", f"{this.cut.mean():.3f}", f"{this.tokens.mean():.1f}"
        lines.append(row(name, *means, spent))
        if show:
            print(name, *this.texts[:show], sep="\n  ")
    lines += ["", *table("margin in ROUGE-L over the test samples", "mean [95 % interval]")]
    whole = {name: answers.rouge_l for name, answers in found.items()}
    for label, better, worse in (
        ("tuned target over raw target", whole[TUNED], whole[RAW]),
        ("the same, both cut to the length of the references", found[TUNED].cut, found[RAW].cut),
        ("tuned target over tuned small model", whole[TUNED], whole[SMALL]),
        ("whole pool over a random tenth", whole[TUNED], whole[TENTH]),
    ):
        lines.append(row(label, margin(better, worse, run.pool.seed)))
    return lines


def agreement(run: Run) -> list[str]:
    """How the small model's effort scores agree with the target's, as a table."""
    lines = table("effort scores on the pool: Spearman", "last v_proj lora_B", "all LoRA parameters")
    parameters = ("last_v_b", "all_lora")
    small = [run.pool.ask("effort", of="small", parameters=p) for p in parameters]
    for name, of in ((RAW, "target"), (TUNED, "target_tuned")):
        target = [run.pool.ask("effort", of=of, parameters=p) for p in parameters]
        for label, given in (("", None), (", given the answer's length", run.pool.answer_lengths)):
            values = [f"{spearman(x, y, given):.2f}" for x, y in zip(small, target, strict=True)]
            lines.append(row(f"{SMALL} / {name}{label}", *values))
    return lines


def measure(run: Run, show: int) -> str:
    settings = run.settings
    sizes = f"Pool of {len(run.pool.ids)}, {len(run.tokenized['test'])} test dialogues"
    training = f"learning rate {settings.learning_rate}, {settings.epochs} epochs, batch {settings.batch_size}"
    title = f"{sizes}; {training}, seed {run.pool.seed}."
    return "\n".join([title, "", *performance(run, show), "", *agreement(run), "", machine(), ""])


def main() -> None:
    options, (settings, *_) = arguments(__doc__, show=0)
    measured = measure(configured("family=tiny", "task=dialogsum", "tracking=none", *settings), options.show)
    print(measured)
    card = ASSETS / "README.md"
    if not settings:
        before, rest = card.read_text(encoding="utf-8").split(BEGIN)
        card.write_text(before + BEGIN + measured + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
