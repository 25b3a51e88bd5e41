"""Numbers of both FINDINGS.md that stand in no table: `python -m results.findings` from the repository's root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from experiments.figures import strength
from experiments.report.__main__ import PAPER
from experiments.report.comparisons import Comparison, comparison
from experiments.report.floors import Answered, answered
from experiments.report.records import Context, by_metric, collect, contexts
from staff.evaluation.floors import specificity

HERE = Path(__file__).parent
RATE = 0.9
OPENING = "#Person1# and #Person2#"
CONTRASTS = (
    *(("staff", other) for other in ("random", "random_length", "ccs")),
    *(("staff_debiased", "random"), ("staff_fast scores=online", "staff")),
)


def compared(campaign: str, by: str | None = None) -> list[Context]:
    """The comparisons of methods of a campaign, a context for each task: by the metric `by`, or its first one."""
    results = HERE / campaign
    table = collect(results)
    table = table if by is None else by_metric(table, by)
    return [context for context in contexts(table, results) if context.varied == "method"]


def cut(context: Context) -> Iterator[str]:
    """Random's answers cut, sample by sample and seed by seed, to as many words as STAFF's answers have."""
    runs = {(run.variant, run.seeds): run for run in answered(context, RATE)}
    seeds = sorted(s for variant, s in runs if variant == "staff")
    answers = {
        name: {s: runs[name, s].answers for s in seeds if (name, s) in runs} for name in ("random", "staff", "full")
    }
    answers["cut"] = {
        s: [" ".join(a.split()[: len(b.split())]) for a, b in zip(answers["random"][s], answers["staff"][s])]
        for s in seeds
    }
    some = runs["staff", seeds[0]]
    split = {
        name: {s: specificity(context.metric, texts, some.references, some.ids) for s, texts in of.items()}
        for name, of in answers.items()
    }
    for name, of in answers.items():
        parts = [np.mean([getattr(split[name][s], p).mean() for s in of]) for p in ("own", "others", "specific")]
        words = np.mean([len(text.split()) for texts in of.values() for text in texts])
        opens = np.mean([text.startswith(OPENING) for texts in of.values() for text in texts])
        shown = "score {:.2f}, others {:.2f}, specific {:.2f}".format(*parts)
        yield f"  {name:7} {shown}, {words:.1f} words, {100 * opens:.0f} % open with {OPENING!r}"
    found = Comparison({name: {s: values.own for s, values in of.items()} for name, of in split.items()})
    for a, b in (("cut", "random"), ("staff", "cut")):
        yield f"  {a} - {b}: {_shown(found, a, b)}"


def parts(context: Context) -> Iterator[str]:
    """The registered contrasts in ROUGE-L against other samples' references, and in what is left of the score."""
    split: dict[str, dict[str, dict]] = {"others": {}, "specific": {}}
    for run in answered(context, RATE):
        found = specificity(context.metric, run.answers, run.references, run.ids)
        for part, by_method in split.items():
            by_method.setdefault(run.variant, {})[run.seeds] = getattr(found, part)
    for part, by_method in split.items():
        compared = Comparison(by_method)
        for a, b in CONTRASTS:
            if a in by_method and b in by_method:
                yield f"  {part}: {a} - {b}: {_shown(compared, a, b)}"


def opening(context: Context) -> str:
    """How many answers of each method open alike."""
    runs: dict[str, list[Answered]] = {}
    for run in answered(context, RATE):
        runs.setdefault(run.variant, []).append(run)
    shares = {v: np.mean([t.startswith(OPENING) for r in of for t in r.answers]) for v, of in runs.items()}
    return "  " + ", ".join(f"{variant} {100 * share:.0f} %" for variant, share in shares.items())


def against_raw(context: Context) -> Iterator[str]:
    """Methods minus the raw target, which the table of differences leaves out."""
    found = comparison(context, RATE)
    raw = next(iter(found.answers["raw target"].values()))  # it knows no seed
    for method in ("random", "staff"):
        own = found.answers[method]
        both = Comparison({method: own, "raw target": dict.fromkeys(own, raw)})
        yield f"  {method} - raw target: {_shown(both, method, 'raw target')}"


def paper() -> Iterator[str]:
    """The paper's differences for each of its targets, by the same rules as the contrasts."""
    values = pd.read_csv(PAPER).pivot(index=["task", "target", "pruning_rate"], columns="method", values="rouge_l")
    for _, rows in values.groupby(["task", "target"]):
        task, target, _ = rows.index[0]
        table = rows.droplevel(["task", "target"])
        full, table = float(table.loc[0.0, "full"]), table[table.index > 0].drop(columns="full")
        gains = table.drop(columns="staff").rsub(table["staff"], axis=0)
        yield f"  {task}, {target}, mean of 5 rates: {_listed(gains.mean())}; best other {gains.mean().min():+.2f}"
        for rate in (0.2, RATE):
            yield f"    p = {rate}: {_listed(gains.loc[rate])}, full {table.loc[rate, 'staff'] - full:+.2f}"


def agreement(context: Context) -> Iterator[str]:
    """Rank correlation of the small model's and the target's scores, and what is left of it beyond length."""
    if ("staff", RATE) not in context.cells:
        return
    for run in context.cells["staff", RATE].sort_values("selection_seed").to_dict("records"):
        samples = context.recorded[run["name"]].samples()
        assert samples is not None
        both = samples.dropna(subset=["speculative", "verified"])
        ranks = [both[name].rank().to_numpy() for name in ("speculative", "verified", "answer_tokens")]
        (_, ab, ac), (_, _, bc), _ = np.corrcoef(ranks)
        beyond = (ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2))
        shown = f"Spearman {ab:.2f}, with the answer's length partialled out {beyond:.2f}"
        yield f"  seed {run['seed']}: {len(both)} samples, {shown}"


def empty(context: Context, rate: float) -> Iterator[str]:
    """Answers without a word, and the score of the others."""
    for run in answered(context, rate):
        scores = specificity(context.metric, run.answers, run.references, run.ids).own
        some = np.array([bool(text.strip()) for text in run.answers])
        yield f"  {run.variant}: {(~some).sum()} of {len(some)} empty, the others {scores[some].mean():.1f}"


def without_wrong_answers() -> Iterator[str]:
    """Differences in exact match on the planted pool without wrong answers, over seeds, by Student's t."""
    runs = strength.measured(HERE / "strength", RATE)
    exact = runs[runs["wrong"] == 0].pivot(index="seed", columns="method", values="value")
    for a, b in (("staff", "random"), ("staff", "random_length"), ("random_length", "random")):
        gains = (exact[a] - exact[b]).dropna()
        half = stats.t.ppf(0.975, len(gains) - 1) * gains.sem()
        yield f"  {a} - {b}: {gains.mean():+.2f} ± {half:.2f}, {len(gains)} seeds"


def _listed(gains: pd.Series) -> str:
    return ", ".join(f"{method} {gain:+.2f}" for method, gain in gains.items())


def _shown(found: Comparison, a: str, b: str) -> str:
    difference = found.between(a, b)
    assert difference is not None
    return f"{difference.mean:+.2f} ± {difference.half:.2f}"


def main() -> None:
    tiny = compared("tiny")
    for context in tiny:
        print(
            f"{context.title}, p = {RATE}: random's answers cut to the lengths of STAFF's", *cut(context), sep="\n"
        )
        print("against the raw target", *against_raw(context), sep="\n")
        print("small model and target, samples that both scored", *agreement(context), sep="\n")
    print(f"answers that open with {OPENING!r}", *(opening(c) for c in tiny if "dialogsum" in c.name), sep="\n")
    print("Table 1 of the paper: STAFF's differences", *paper(), sep="\n")
    for context in compared("campaign2", "rougeL"):
        print(f"{context.title}, p = {RATE}: parts of the score", *parts(context), sep="\n")
    for context in compared("campaign2"):
        print(f"{context.title}: small model and target, samples that both scored", *agreement(context), sep="\n")
    print("planted pool without wrong answers", *without_wrong_answers(), sep="\n")
    for context in compared("smollm2"):
        print(f"{context.title}, p = {RATE}", *empty(context, RATE), *agreement(context), sep="\n")


if __name__ == "__main__":
    main()
