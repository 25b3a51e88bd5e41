"""Generate with a model, and measure what it wrote against the references.

Every metric is on the scale from 0 to 100, as in the paper's tables. Decoding is greedy, so that two evaluations
of the same weights agree; the authors sampled and used another tokeniser for ROUGE, so that absolute values are
not comparable with theirs, differences between methods are (section 5.1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from staff import distributed
from staff.adapters import load_tuned
from staff.artifacts import Artifact, Store
from staff.errors import UserError
from staff.models import ModelSpec, is_sharded
from staff.progress import progress

if TYPE_CHECKING:
    from staff.cost import Meter
    from staff.data import Sample
    from staff.tokens import TokenizedSamples

References = Sequence[tuple[str, ...]]
Metric = Callable[[Sequence[str], References], tuple[float, list[float]]]


def _rouge(name: str, predictions: Sequence[str], references: References) -> tuple[float, list[float]]:
    """F1 of rouge-score with Porter stemming, the best over a sample's references; headline: the mean.

    Lin, ROUGE (2004). The package keeps the letters a-z and digits alone: for English text.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=True)
    scores = [
        100 * scorer.score_multi(targets, prediction)[name].fmeasure
        for targets, prediction in zip(references, predictions, strict=True)
    ]
    return sum(scores) / len(scores), scores


def _sacrebleu(name: str, predictions: Sequence[str], references: References) -> tuple[float, list[float]]:
    """BLEU or chrF of sacrebleu (Post 2018) with its defaults; headline: the corpus value, not a mean.

    A sentence's own BLEU leaves out n-gram orders that it is too short for (`effective_order`).
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # force: no advice on tokenised input, which ours is not.
    corpus, sentence = (BLEU(force=True), BLEU(effective_order=True)) if name == "bleu" else (CHRF(), CHRF())
    streams = list(zip_longest(*references))  # one stream for the first references, one for the second, ...
    scores = [
        sentence.sentence_score(prediction, targets).score
        for targets, prediction in zip(references, predictions, strict=True)
    ]
    return corpus.corpus_score(predictions, streams).score, scores


# A minus after a digit, a letter or a bracket subtracts: the last number of "10-4" is 4.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\$-?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """The number GSM8K asks for: the first after `####`, else the last in the text; None if there is none.

    Thousands' commas, dollar signs and a full stop at the end do not count.
    """
    text = text.replace("−", "-")
    marked = _NUMBER.search(text.partition("####")[2])
    numbers = [marked] if marked else list(_NUMBER.finditer(text))
    if not numbers:
        return None
    return Decimal(numbers[-1].group().replace(",", "").replace("$", ""))


def _exact_match(predictions: Sequence[str], references: References) -> tuple[float, list[float]]:
    """100 where the final number is that of a reference (as numbers: 18 = 18.00), else 0 (Cobbe et al. 2021)."""
    scores = []
    for targets, prediction in zip(references, predictions, strict=True):
        number = final_number(prediction)
        scores.append(100.0 if number is not None and number in map(final_number, targets) else 0.0)
    return sum(scores) / len(scores), scores


def normalised(text: str) -> str:
    """`text` as `exact` compares it: case-folded, white space collapsed, without spaces at the ends and without
    one final full stop."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _exact(predictions: Sequence[str], references: References) -> tuple[float, list[float]]:
    """100 where the whole `normalised` text is that of a reference, else 0; headline: the mean."""
    scores = []
    for targets, prediction in zip(references, predictions, strict=True):
        text = normalised(prediction)
        scores.append(100.0 if text and text in map(normalised, targets) else 0.0)
    return sum(scores) / len(scores), scores


METRICS: dict[str, Metric] = {
    "rouge1": partial(_rouge, "rouge1"),
    "rouge2": partial(_rouge, "rouge2"),
    "rougeL": partial(_rouge, "rougeL"),
    "bleu": partial(_sacrebleu, "bleu"),
    "chrf": partial(_sacrebleu, "chrf"),
    "exact_match": _exact_match,
    "exact": _exact,
}
"""From predictions and references to the headline and one value a sample."""


def check_metrics(names: Sequence[str], samples: Sequence[Sample] = ()) -> None:
    """Refuse, before any model loads, metrics that `measure` could not compute.

    Raises:
        UserError: no metric, an unknown one, or `exact_match` on a reference without a number.
    """
    choices = ", ".join(METRICS)
    if isinstance(names, str) or not names:
        raise UserError(f"task.metrics={names!r} must be a list of one or more of {choices}, such as [rougeL].")
    for name in names:
        if name not in METRICS:
            raise UserError(f"task.metrics names {name!r}, which is unknown: choose from {choices}.")
    if "exact_match" in names:
        for sample in samples:
            if all(final_number(text) is None for text in sample.references):
                raise UserError(
                    f"sample {sample.id!r} has no number in its reference for task.metrics exact_match to compare: "
                    "take exact_match out, or mend the sample."
                )


def measure(
    names: Sequence[str], predictions: Sequence[str], references: References
) -> tuple[dict[str, float], pd.DataFrame]:
    """Metrics of `predictions`, each against one or more references, from 0 to 100; an empty prediction scores 0.

    Returns:
        The headline value of every metric, and a table with a row per sample and a column per metric.
    """
    check_metrics(names)
    values = {name: METRICS[name](predictions, references) for name in names}
    headline = {name: float(value) for name, (value, _) in values.items()}
    return headline, pd.DataFrame({name: scores for name, (_, scores) in values.items()})


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int | None,
    end_tokens: Iterable[int] = (),
    meter: Meter | None = None,
) -> list[list[int]]:
    """Continue every prompt greedily until an end token or `max_new_tokens`.

    The result does not depend on `batch_tokens` in float32, nor on the sampling, beam or penalty settings a model
    brings in its generation configuration; its end tokens, several in some chat models, are kept beside the
    tokenizer's. Processes of one run share the prompts out.

    Args:
        model: a causal language model, with or without adapters.
        prompts: rows of token ids, of any lengths.
        batch_tokens: upper bound of (longest prompt + max_new_tokens) x batch; a prompt beyond it goes alone. None:
            8192 on a processor, where more wait for the longest answer (results/benchmarks/generation.md), 32768 on
            a GPU.
        end_tokens: further ones, such as a chat template's end of turn.
        meter: told the real tokens processed, and their FLOPs as those of one forward pass over prompt and
            continuation with logits at the generated tokens. That is exact for the linear layers; attention, in
            which a decoding step sees only its past, counts up to twice what was needed, as in training.

    Returns:
        The new token ids of every prompt, in the order given, without end and padding tokens.
    """
    import torch

    # Adapters sit inside the base model, whose generation configuration is the one that is read.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, was_training = base.generation_config, base.training
    config, stop = _greedy(tokenizer, own, max_new_tokens, end_tokens)
    answers: dict[int, Answer] = {}
    base.generation_config = config
    base.eval()
    try:
        budget = batch_tokens or (8192 if base.device.type == "cpu" else 32768)
        with distributed.agreed(apart=not is_sharded(base)), torch.inference_mode():
            batches = _batches(prompts, max_new_tokens, budget, together=is_sharded(base))
            with progress(sum(map(len, batches)), "answers") as bar:
                for batch in batches:
                    answers |= _answered(base, config, stop, {i: prompts[i] for i in batch})
                    bar.update(len(batch))
    finally:
        base.generation_config = own
        base.train(was_training)
    for others in distributed.gather(answers):
        answers |= others
    if meter is not None:
        from staff.cost import forward_flops

        processed = [
            len(prompts[i]) + answer.generated - 1 for i, answer in answers.items()
        ]  # the last is not read
        generated = [answer.generated for answer in answers.values()]
        meter.add(forward_flops(base.config, processed, generated), tokens_forward=sum(processed))
    return [answers[i].tokens for i in range(len(prompts))]


class Answer(NamedTuple):
    """Token ids without end and padding, and how many were generated, the end token included."""

    tokens: list[int]
    generated: int


def _answered(base: Any, config: Any, stop: set[int], prompts: dict[int, Sequence[int]]) -> dict[int, Answer]:
    """Answers to the prompts of one batch, by the same keys."""
    import torch

    width = max(len(prompt) for prompt in prompts.values())
    ids = torch.full((len(prompts), width), config.pad_token_id, device=base.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts.values()):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=base.device)
        mask[row, width - len(prompt) :] = 1
    output = base.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    answers = {}
    for i, row in zip(prompts, output[:, width:].tolist(), strict=True):
        end = next((at for at, token in enumerate(row) if token in stop), len(row))
        tokens = [token for token in row[:end] if token != config.pad_token_id]
        answers[i] = Answer(tokens, min(end + 1, len(row)))
    return answers


def evaluated(
    store: Store,
    spec: ModelSpec,
    tuned: Artifact | None,
    samples: TokenizedSamples,
    *,
    kind: str,
    max_new_tokens: int,
    batch_tokens: int | None,
) -> Artifact:
    """The answers of the model that fine-tuning of `kind` left in `tuned` (of the raw one where that is None) to
    the prompts of `samples`, as an artefact that `read_predictions` reads."""
    key = {
        "model": spec.identity(),
        "tuned": tuned.fingerprint if tuned else None,
        "ids": samples.ids,
        "prompts": samples.prompts(),
        "max_new_tokens": max_new_tokens,
    }

    def make(folder: Path, cost: Meter) -> None:
        model = load_tuned(spec, tuned.path, kind) if tuned else spec.load()
        # Merged weights would be rounded to 4 bits again.
        if tuned and kind == "lora" and not spec.quantization and not spec.in_parts:
            model = model.merge_and_unload()
        tokenizer = spec.tokenizer()
        answers = generate(
            model,
            tokenizer,
            samples.prompts(),
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            end_tokens={row[-1] for row in samples.input_ids},
            meter=cost,
        )
        texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        table = {"id": samples.ids, "prediction": texts, "tokens": [len(answer) for answer in answers]}
        pd.DataFrame(table).to_parquet(folder / "predictions.parquet")

    def foresee(folder: Path, cost: Meter) -> None:
        """At most: no answer ends early."""
        from staff.cost import forward_flops

        processed = [len(prompt) + max_new_tokens - 1 for prompt in samples.prompts()]
        flops = forward_flops(spec.config(), processed, max_new_tokens * len(processed))
        cost.add(flops, tokens_forward=sum(processed))

    label = f"answer {len(samples)} test prompts, {'tuned' if tuned else 'raw'} {spec.name}"
    return store.get("evaluation", key, make, label=label, foresee=foresee)


def read_predictions(answered: Artifact) -> pd.DataFrame:
    """What `evaluated` left: a row a sample, with its id, prediction and number of tokens."""
    return pd.read_parquet(answered.path / "predictions.parquet")


def _greedy(tokenizer: Any, own: Any, max_new_tokens: int, end_tokens: Iterable[int]) -> tuple[Any, set[int]]:
    """A generation configuration with nothing of the model's own but its end tokens, and those tokens."""
    from transformers import GenerationConfig

    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stop = {token for token in (tokenizer.eos_token_id, *ends, *end_tokens) if token is not None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop), pad_token_id=pad
    )
    return config, stop


def _batches(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int, together: bool
) -> list[list[int]]:
    """Positions of this process's prompts in batches of like length; longest first: what does not fit in memory
    fails at once. With `together` all processes get as many batches, the last ones of the shortest prompt."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    left, batches = distributed.share(order), []
    while left:
        size = max(1, batch_tokens // (len(prompts[left[0]]) + max_new_tokens))
        batches.append(left[:size])
        left = left[size:]
    most = max(distributed.gather(len(batches))) if together else 0
    return batches + [order[-1:]] * (most - len(batches))
