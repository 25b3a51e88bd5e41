"""Whatever comes in, a reader gives samples or one sentence, and a method selects its budget or says why not.

Each property is tried quickly by tests/test_untrusted_inputs.py, and for minutes by tests/stress/test_long.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.any_pool import METHODS, WIDTH, DrawnPool, expected_size, largest_budget, method_named, select

from baselines.precomputed import Precomputed
from staff import ArrayPool
from staff.data.rows import read_json_lines
from staff.data.samples import Sample
from staff.data.task import Task
from staff.data.tokens import tokenize
from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.regions import equal_width_edges, regions_left, serving_order, share_out, shares_of_ratio, stratify
from staff.selection import budget_for
from staff.store.cost import Cost
from staff.store.manifest import read_manifest, write_manifest

Check = Callable[..., None]
PHASES = (Phase.generate,)
PROPERTIES: dict[str, tuple[Check, dict[str, st.SearchStrategy]]] = {}


def fuzzed(**drawn: st.SearchStrategy) -> Callable[[Check], Check]:
    """A property of a folder to work in and of these values, whatever they are."""

    def keep(check: Check) -> Check:
        PROPERTIES[check.__name__] = check, drawn
        return check

    return keep


def fuzz(name: str, folder: Path, examples: int, start: int) -> None:
    """Try a property with so many examples, drawn from a seed."""
    check, drawn = PROPERTIES[name]

    @seed(start)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=PHASES
    )
    @given(st.fixed_dictionaries(drawn))
    def tried(values: dict[str, Any]) -> None:
        check(folder, **values)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        tried()


def sentence_or(attempt: Callable[[], Any]) -> Any:
    """What it returns; None where it is refused, which must be in one sentence of a readable length."""
    try:
        return attempt()
    except UserError as error:
        assert len(str(error)) < 2_000 and "\n" not in str(error), error
        return None


# ---------------------------------------------------------------- readers

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
surrogates = st.text(st.characters(categories=["Cs", "L"]), max_size=4)
fields = st.sampled_from(["question", "answer", "id", "r", ""])
rows = st.fixed_dictionaries(
    {},
    optional={name: st.text(max_size=12) | surrogates | json_values for name in ("question", "answer", "id", "r")},
)
good_rows = st.fixed_dictionaries({"question": st.text(min_size=1, max_size=12), "answer": st.text(min_size=1)})


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A line as a file of samples may have it: bytes, JSON, a row, or a row that something happened to."""
    kind = draw(st.sampled_from(["bytes", "json", "row", "good", "good", "torn"]))
    if kind == "bytes":
        return draw(st.binary(max_size=24))
    if kind == "json":
        return json.dumps(draw(json_values)).encode()
    row = draw(rows if kind == "row" else good_rows)
    line = json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind == "torn":
        at = draw(st.integers(0, len(line)))
        return line[:at] + draw(st.binary(max_size=3)) + line[at + draw(st.integers(0, 3)) :]
    return line


files = st.builds(bytes.join, st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"]), st.lists(lines(), max_size=4))
templates = st.sampled_from(["{question}", "Q: {question}", " {answer}", "{r[a]}", "{}"]) | st.text(
    "{}[]!:. aq", max_size=9
)


@fuzzed(
    content=files,
    prompt=templates,
    answer=st.just("{answer}") | templates,
    settings=st.fixed_dictionaries(
        {},
        optional={
            "id_field": fields | st.text(max_size=3),
            "references": st.lists(fields, max_size=2),
            "test_limit": st.integers(-1, 3),
        },
    ),
)
def a_file_gives_samples_or_a_sentence(
    folder: Path, content: bytes, prompt: str, answer: str, settings: dict[str, Any]
) -> None:
    (folder / "test.jsonl").write_bytes(content)
    samples: list[Sample] | None = sentence_or(
        lambda: Task("t", prompt, answer, ["rougeL"], 8, data_dir=str(folder), **settings).load("test")
    )
    if samples is None:
        return
    assert 0 < len(samples) <= settings.get("test_limit", len(samples))
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.id and sample.prompt.strip() and sample.answer.strip() and sample.references
        assert all(text.encode() for text in (sample.id, sample.prompt, sample.answer))


@fuzzed(
    texts=st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=5), ascii=st.booleans()
)
def rows_come_back_as_they_were_written(folder: Path, texts: list[tuple[str, str]], ascii: bool) -> None:
    written = [{"question": question, "answer": answer} for question, answer in texts]
    text = "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in written)
    (folder / "train.jsonl").write_text(text, encoding="utf-8", newline="")
    assert [row for _, row in read_json_lines(folder / "train.jsonl")] == written


TOKENIZER = ModelSpec("pkg://staff/assets/tiny/small").tokenizer()


@fuzzed(texts=st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4))
def tokens_spell_the_answer_and_nothing_of_the_prompt(folder: Path, texts: list[tuple[str, str]]) -> None:
    tokens = tokenize([Sample(str(i), *pair, (pair[1],)) for i, pair in enumerate(texts)], TOKENIZER)
    for i, (prompt, answer) in enumerate(texts):
        start, row = int(tokens.prompt_lengths[i]), tokens.row(i).tolist()
        assert row[0] == TOKENIZER.bos_token_id and row[-1] == TOKENIZER.eos_token_id
        assert spelt(row[1:start]) == prompt and spelt(row[start:-1]) == answer
        assert tokens.labels(i).tolist() == [-100] * start + row[start:]


def spelt(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, clean_up_tokenization_spaces=False)


coreset_files = {
    ".json": json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30),
    ".csv": st.text("idposition,\n\"'0123456789-x\x00\ud800 ").map(lambda t: t.encode("utf-8", "surrogatepass")),
    ".pt": st.binary(max_size=60),
}


@fuzzed(
    file=st.sampled_from(sorted(coreset_files)).flatmap(lambda s: st.tuples(st.just(s), coreset_files[s])),
    pool_size=st.none() | st.integers(-1, 5),
)
def a_listed_coreset_is_read_or_refused_in_a_sentence(
    folder: Path, file: tuple[str, bytes], pool_size: int | None
) -> None:
    suffix, content = file
    path = (folder / "coreset").with_suffix(suffix)
    path.write_bytes(content)
    method = sentence_or(lambda: Precomputed(str(path), pool_size))
    if method is not None:
        pool = ArrayPool([f"{i}" for i in range(5)], {})
        budget = method.fixed_size(5)
        coreset = sentence_or(lambda: select(method, pool, budget))
        assert coreset is None or len(set(coreset.indices.tolist())) == budget


@fuzzed(at=st.floats(0, 1, exclude_max=True), change=st.binary(max_size=4), length=st.integers(0, 9))
def a_manifest_that_was_changed_is_refused_in_a_sentence(
    folder: Path, at: float, change: bytes, length: int
) -> None:
    manifest = folder / "manifest.json"
    manifest.unlink(missing_ok=True)
    write_manifest(folder, {"stage": "scores", "label": "x", "fingerprint": "f" * 64}, Cost.zero(), {})
    whole = manifest.read_bytes()
    place = int(at * len(whole))
    manifest.write_bytes(whole[:place] + change + whole[place + length :])
    found = sentence_or(lambda: read_manifest(folder))
    if found is not None:
        assert found[0] == {name: value for name, value in json.loads(whole).items() if name != "checksum"}


# ---------------------------------------------------------------- selection

single = st.floats(width=32, allow_nan=False, allow_infinity=False)  # what a model's scores are made of
positive = st.floats(0, 2.0**127, width=32)
curious = st.sampled_from([0.0, 1.0, 1.0, 2.0**-149, 2.0**127, -0.0]) | st.floats(width=32)


@st.composite
def pools(draw: st.DrawFn) -> DrawnPool:
    """Any scores, the same kind for a whole pool as a rule; embeddings as any float32."""
    ids = draw(st.lists(st.text(max_size=3), min_size=1, max_size=12, unique=True))
    n = len(ids)
    kind = draw(st.sampled_from([st.floats(0, 10), positive, st.sampled_from([0.0, 1.0]), curious]))
    scores: dict[tuple[str, str], np.ndarray] = {}
    for model in ("small", "target", "target_tuned"):
        for signal in ("effort", "el2n", "loss"):
            scores[signal, model] = np.array(draw(st.lists(kind, min_size=n, max_size=n)))
        rows = st.lists(st.floats(-1e3, 1e3, width=32), min_size=WIDTH, max_size=WIDTH)
        scores["embedding", model] = np.array(draw(st.lists(rows, min_size=n, max_size=n)), dtype=np.float32)
    pool = DrawnPool(n, given=scores)
    pool.ids, pool.answer_lengths = ids, np.array(draw(st.lists(st.integers(1, 50), min_size=n, max_size=n)))
    return pool


@fuzzed(
    name=st.sampled_from(METHODS),
    pool=pools(),
    budget=st.integers(0, 13),
    order=st.randoms(),
    seed=st.integers(0, 3),
)
def a_method_selects_its_budget_in_any_order_or_says_why_not(
    folder: Path, name: str, pool: DrawnPool, budget: int, order: Any, seed: int
) -> None:
    method, n = method_named(name), len(pool.ids)
    coreset = sentence_or(lambda: select(method, pool, budget, seed))
    if coreset is None:
        asked = np.concatenate([values.ravel() for values in pool.given.values()])
        assert not 1 <= budget <= largest_budget(method, n) or not np.isfinite(asked).all() or (asked < 0).any()
        return
    assert len(coreset.indices) == expected_size(method, n, budget)
    assert (np.diff(coreset.indices) > 0).all() and set(coreset.indices) <= set(range(n))
    coreset.save(folder, pool.ids)
    assert type(coreset).load(folder).indices.tolist() == coreset.indices.tolist()
    places = list(range(n))
    order.shuffle(places)
    shuffled = pool.reordered(np.array(places))
    again = select(method, shuffled, budget, seed)
    assert {shuffled.ids[i] for i in again.indices} == {pool.ids[i] for i in coreset.indices}


@fuzzed(
    scores=st.lists(single, min_size=1, max_size=20),
    num_regions=st.integers(1, 60),
    ratios=st.lists(st.floats(0, 1e80) | st.just(np.nan), min_size=20, max_size=20),
    budget=st.integers(0, 30),
    as_the_authors=st.booleans(),
)
def regions_hold_every_sample_once_and_no_budget_is_exceeded(
    folder: Path, scores: list[float], num_regions: int, ratios: list[float], budget: int, as_the_authors: bool
) -> None:
    dtype = "float32" if as_the_authors else "float64"
    values = np.abs(scores).astype(dtype) if as_the_authors else np.array(scores)
    edges = equal_width_edges(values.min(), values.max(), num_regions, dtype)
    assert edges.shape == (num_regions,) and np.isfinite(edges).all() and (np.diff(edges) >= 0).all()
    positions = np.arange(len(values))
    regions, members = serving_order(stratify(values, edges), positions)
    held = np.concatenate([*members, np.empty(0, dtype=np.int64)])
    assert sorted(held.tolist()) == positions.tolist() or as_the_authors, "whose last edge may lie too low"
    sizes = np.array([len(m) for m in members])
    assert (np.diff(sizes) >= 0).all() and (sizes > 0).all() and len(set(regions.tolist())) == len(regions)
    for weights in (
        shares_of_ratio(np.array(ratios[: len(sizes)])),
        (np.ones(len(sizes)), regions_left(len(sizes))),
    ):
        given_out = share_out(budget, sizes, *weights)
        assert (given_out >= 0).all() and (given_out <= sizes).all() and given_out.sum() <= budget


@fuzzed(rate=st.floats() | json_values, size=st.integers(0, 10**7))
def a_pruning_rate_gives_a_budget_or_a_sentence(folder: Path, rate: Any, size: int) -> None:
    budget = sentence_or(lambda: budget_for(rate, size))
    assert budget is None or 1 <= budget <= size
