"""Conversations as models read them: every answer is trained with its end, by the chat template's own text."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import AGAIN, ASKED, SAID, SEVERAL, SYSTEM, messages
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from staff.data.samples import Sample, plain_pieces
from staff.data.splits import DataView
from staff.data.tokens import TokenizedSamples, Tokens, read_tokens, tokenize
from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.store.store import Store

TINY = ModelSpec("pkg://staff/assets/tiny/small")


def texts(tokens: TokenizedSamples, tokenizer: Any, i: int = 0) -> list[str]:
    """What is trained, a text for each run of labels."""
    mask = tokens.label_mask(i)
    starts = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
    ends = np.flatnonzero(mask & ~np.concatenate([mask[1:], [False]])) + 1
    return [tokenizer.decode(tokens.row(i)[start:end]) for start, end in zip(starts, ends, strict=True)]


def sample(*turns: tuple[str, str], id: str = "a") -> Sample:
    return Sample(id, "", "", (), turns)


PLAIN = (
    "System: Be brief.\n\nUser: 2 + 2?\n\nAssistant: It is 4.</s>\n\nUser: 3 + 3?\n\nAssistant: 6, of course.</s>"
)


@pytest.mark.parametrize(("loss_on", "trained"), [("all", [" It is 4.</s>"]), ("last", [])])
def test_the_plain_form_ends_every_answer_and_labels_all_or_the_last(loss_on: str, trained: list[str]):
    tokenizer = TINY.tokenizer()
    tokens = tokenize([sample(*SEVERAL)], tokenizer, loss_on=loss_on)
    assert tokenizer.decode(tokens.row(0)[1:]) == PLAIN and tokens.begin == 1
    assert texts(tokens, tokenizer) == [*trained, " 6, of course.</s>"]
    assert tokenizer.decode(tokens.prompts()[0]).endswith("User: 3 + 3?\n\nAssistant:")
    assert (tokens.labelled is None) == (loss_on == "last")


def test_a_conversation_of_one_answer_has_no_mask_and_the_tokens_of_its_plain_text():
    tokenizer = TINY.tokenizer()
    pieces = plain_pieces((SYSTEM, ASKED, SAID))
    text = Sample("a", pieces[0].text, pieces[1].text, ())
    both = [tokenize([s], tokenizer, loss_on="all") for s in (sample(SYSTEM, ASKED, SAID), text)]
    assert both[0].fingerprint == both[1].fingerprint and both[0].labelled is None


CHAT = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def tokenizer_of(template: str, *special: str, rstrip: bool = False) -> Any:
    """A tokenizer that begins every text with its begin token.

    Args:
        rstrip: its special tokens take the white space behind them, as those of Phi-4-mini do.
    """
    tokenizer = TINY.tokenizer()
    tokens: list[Any] = [AddedToken(text, special=True, rstrip=rstrip, normalized=False) for text in special]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = template
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


def test_a_chat_template_is_trained_on_every_answer_with_its_end():
    tokenizer = tokenizer_of(CHAT, "<turn>", "<end>")
    tokens = tokenize([sample(*SEVERAL)], tokenizer, "chat", loss_on="all")
    assert texts(tokens, tokenizer) == ["It is 4.<end>", "6, of course.<end>"]
    shown = tokenizer.apply_chat_template(messages(*SEVERAL), tokenize=False)
    assert tokenizer.decode(tokens.row(0)) == shown.removesuffix("\n")


def test_a_text_that_looks_like_the_template_or_like_another_turn_is_not_taken_for_it():
    tokenizer = tokenizer_of(CHAT, "<turn>", "<end>")
    turns = (("user", "assistant"), ("assistant", "user"), ("user", "user"), ("assistant", "assistant"))
    tokens = tokenize([sample(*turns)], tokenizer, "chat", loss_on="all")
    assert texts(tokens, tokenizer) == ["user<end>", "assistant<end>"]


FORGETFUL = CHAT.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}")


def test_a_template_that_changes_an_earlier_answer_is_refused_unless_the_last_alone_is_trained():
    tokenizer = tokenizer_of(FORGETFUL, "<turn>", "<end>")
    thought = sample(ASKED, ("assistant", "<think>Hm.</think>It is 4."), *AGAIN)
    with pytest.raises(UserError, match=r"does not leave every turn of sample 'a' unchanged: set task.loss_on"):
        tokenize([thought], tokenizer, "chat", loss_on="all")
    tokens = tokenize([thought], tokenizer, "chat")
    assert texts(tokens, tokenizer) == ["6, of course.<end>"]
    assert "Hm." not in tokenizer.decode(tokens.row(0)), "the template's own text"


def test_a_template_that_refuses_or_leaves_out_a_turn_is_one_sentence_with_the_sample():
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    with pytest.raises(UserError, match="fails on sample 'a' with 'no system'"):
        tokenize([sample(*SEVERAL)], tokenizer_of(strict, "<turn>", "<end>"), "chat", loss_on="all")
    deaf = CHAT.replace("in messages %}", "in messages if m.role != 'system' %}")
    with pytest.raises(UserError, match=r"leaves out or changes a turn of system of sample 'a': remove"):
        tokenize([sample(*SEVERAL)], tokenizer_of(deaf, "<turn>", "<end>"), "chat", loss_on="all")


TURNS = "{% for m in messages %}"
DONE = "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
SHOWN = "<turn>{{ m.role }}\n{{ m.content }}<end>\n"
QUESTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<turn>{% if messages[0].role == 'system' and "
    "AT %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}<over>{% elif m.role == 'assistant' %} "
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ODD = {
    "begins the text itself": "{{ bos_token }}" + CHAT,
    "trims": CHAT.replace("m.content", "m.content | trim"),
    "has a system prompt of its own": (
        "{% if messages[0].role != 'system' %}<turn>system\nHelp.<end>\n{% endif %}" + CHAT
    ),
    "has a branch for tools": f"{TURNS}{{% if m.role == 'tool' %}}<tool>{{% else %}}{SHOWN}{{% endif %}}{DONE}",
    "tells the system in the first question": QUESTIONS.replace("AT", "loop.index0 == 1"),
    "tells the system in the last question": QUESTIONS.replace("AT", "loop.index0 >= messages | length - 2"),
    "ends the last turn alone": CHAT.replace("<end>\n", "{% if loop.last %}<end>{% endif %}"),
    "always asks for an answer": f"{TURNS}{SHOWN}{{% endfor %}}<turn>assistant\n",
    "never asks for an answer": f"{TURNS}{SHOWN}{{% endfor %}}",
    "wants roles in turn": (
        TURNS + "{% if not loop.first and m.role == loop.previtem.role %}{{ raise_exception('the roles must "
        "alternate') }}{% endif %}" + SHOWN + DONE
    ),
}


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_the_tokens_are_those_of_the_template_whatever_it_does_with_turns(kind: str, rstrip: bool):
    tokenizer = tokenizer_of(ODD[kind], "<turn>", "<end>", "<over>", rstrip=rstrip)
    for turns in (SEVERAL, SEVERAL[1:], SEVERAL[:3], (ASKED, ("assistant", "a\n\nb  c")), (*SEVERAL, *SEVERAL[1:])):
        whole = tokenizer.apply_chat_template(messages(*turns))["input_ids"]
        for loss_on in ("all", "last"):
            tokens = tokenize([sample(*turns)], tokenizer, "chat", loss_on=loss_on)
            ours = tokens.row(0).tolist()
            assert ours == whole[: len(ours)] and ours.count(tokenizer.bos_token_id) == ("bos_token" in ODD[kind])
            said = [text for role, text in turns if role == "assistant"][-1 if loss_on == "last" else 0 :]
            ends = ["" if "alone" in kind else "</s>" if "question" in kind else "<end>"] * len(said)
            ends[-1] = ends[-1] or "<end>"
            trained = [text.lstrip() for text in texts(tokens, tokenizer)]
            assert trained == [text + end for text, end in zip(said, ends, strict=True)]
    if kind == "wants roles in turn":
        with pytest.raises(UserError, match="fails on sample 'a' with 'the roles must alternate'"):
            tokenize([sample(ASKED, ASKED, SAID)], tokenizer, "chat")


THINKING = (
    f"{TURNS}<turn>{{{{ m.role }}}}\n{{% if m.role == 'assistant' and '</think>' not in m.content %}}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content }}<end>\n" + DONE.replace("assistant\n", "assistant\n<think>\n")
)


def test_a_think_block_of_the_answer_follows_the_generation_prompt_that_opens_it():
    tokenizer = tokenizer_of(THINKING, "<turn>", "<end>")
    thought = (ASKED, ("assistant", "<think>\nHm.\n</think>\n\nIt is 4."))
    tokens = tokenize([sample(*thought), sample(ASKED, SAID, id="b")], tokenizer, "chat")
    for i, turns in enumerate((thought, (ASKED, SAID))):
        whole = tokenizer.apply_chat_template(messages(*turns))["input_ids"]
        assert tokens.row(i).tolist() == whole[: tokens.lengths[i]]
    assert texts(tokens, tokenizer) == ["Hm.\n</think>\n\nIt is 4.<end>"]
    assert texts(tokens, tokenizer, 1) == ["It is 4.<end>"]
    dropping = THINKING.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    with pytest.raises(UserError, match="does not leave the answer of sample 'a' unchanged"):
        tokenize([sample(*thought)], tokenizer_of(dropping, "<turn>", "<end>"), "chat")


def test_a_turn_that_a_template_leaves_out_is_told_of_where_the_last_answer_alone_is_trained(caplog):
    deaf = CHAT.replace("in messages %}", "in messages if m.role != 'system' %}")
    tokenize([sample(*SEVERAL), sample(*SEVERAL, id="b")], tokenizer_of(deaf, "<turn>", "<end>"), "chat")
    (told,) = (m for m in caplog.messages if "leaves out" in m)
    assert "a turn of system, first of sample 'a'" in told


# The templates that trl carries

TRL = importlib.util.find_spec("trl")
TEMPLATES = (
    sorted(Path(next(iter(TRL.submodule_search_locations or []))).glob("chat_templates/*.jinja")) if TRL else []
)
NO_SYSTEM = ("gemma.jinja", "gemma_training.jinja")
"""They refuse a system turn."""


def special_tokens(template: str) -> list[str]:
    """What looks like a special token in a template, think blocks apart, which are ordinary text to many models."""
    found = set(re.findall(r"<[|｜]?[A-Za-z_/▁][A-Za-z_/0-9▁]*[|｜]?>|\[/?[A-Z_]+\]", template))
    known = TINY.tokenizer().get_vocab()
    return sorted(token for token in found if "think" not in token and token not in known)


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_every_template_of_trl_trains_the_answers_and_their_ends_in_its_own_text(file: Path, rstrip: bool):
    template = file.read_text("utf-8")
    tokenizer = tokenizer_of(template, *special_tokens(template), rstrip=rstrip)
    for turns in (SEVERAL, SEVERAL[:3], (*SEVERAL, *SEVERAL[1:])):
        turns = turns[1:] if file.name in NO_SYSTEM else turns
        tokens = tokenize([sample(*turns)], tokenizer, "chat", loss_on="all")
        said = [text for role, text in turns if role == "assistant"]
        for trained, answer in zip(texts(tokens, tokenizer), said, strict=True):
            text, end = trained.strip().partition(answer)[::2]
            assert not text and re.fullmatch(r"\s*(<\S+>|\[\S+\])", end), "the answer and one token that ends it"
        ours, mask = tokens.row(0).tolist(), tokens.label_mask(0)
        whole = tokenizer(rendered(tokenizer, turns, tokenize=False), add_special_tokens=False)["input_ids"]
        assert ours[:-1] == whole[: len(ours) - 1], (
            "token by token, up to an end token that some leave to the model"
        )
        if "generation %}" in template or "generation -%}" in template:
            marked = rendered(tokenizer, turns, return_dict=True, return_assistant_tokens_mask=True)
            theirs = np.array(marked["assistant_masks"], bool)[: len(ours) - 1]
            assert theirs[mask[: len(theirs)]].all(), "what we train, the template's own mask trains"
            more = tokenizer.decode(np.array(whole[: len(theirs)])[theirs & ~mask[: len(theirs)]])
            assert not any(text in more for _, text in turns), "beyond it the mask has text of the template alone"


def rendered(tokenizer: Any, turns: tuple[tuple[str, str], ...], **options: Any) -> Any:
    """What the template shows, from content as text or, to templates that want it so, in parts."""
    parts = [(role, [{"type": "text", "text": text}]) for role, text in turns]
    for content in (turns, parts):
        try:
            shown = tokenizer.apply_chat_template(messages(*content), date_string="26 Jul 2024", **options)
        except Exception:
            continue
        whole = shown if isinstance(shown, str) else tokenizer.decode(shown["input_ids"])
        if all(text in whole for _, text in turns):
            return shown
    return pytest.fail("the template shows not all turns")


# Views, the store, scores and training


def mixed() -> TokenizedSamples:
    samples = [sample(*SEVERAL, id="a"), sample(ASKED, SAID, id="b"), sample(ASKED, SAID, *AGAIN, *AGAIN, id="c")]
    return tokenize(samples, TINY.tokenizer(), loss_on="all")


def test_every_view_of_a_conversation_keeps_its_labels():
    tokens, tokenizer = mixed(), TINY.tokenizer()
    for i in range(3):
        labels = tokens.labels(i)
        assert tokens.answer_lengths[i] == (labels != -100).sum() == tokens.label_mask(i).sum()
        assert (labels[labels != -100] == tokens.row(i)[labels != -100]).all()
    assert [len(texts(tokens, tokenizer, i)) for i in range(3)] == [2, 1, 3]
    some = DataView(indices=np.array([2, 0])).of(tokens)
    assert texts(some, tokenizer, 0) == texts(tokens, tokenizer, 2) and some.ids == ["c", "a"]
    answers = DataView(prompt=False).of(tokens)
    assert tokenizer.decode(answers.row(0)) == "<s> It is 4.</s> 6, of course.</s>"
    assert answers.answer_lengths.tolist() == tokens.answer_lengths.tolist() and answers.labelled is None
    everything = DataView(text="all").of(tokens)
    assert everything.answer_lengths.tolist() == (tokens.lengths - 1).tolist()


def test_labels_are_part_of_the_fingerprint_and_pass_through_the_store(tmp_path: Path):
    samples = [sample(*SEVERAL)]
    store = Store(tmp_path)
    read = {
        loss_on: read_tokens(store.get(Tokens(samples, TINY, {"prompt_format": "plain", "loss_on": loss_on})))
        for loss_on in ("all", "last")
    }
    for loss_on, tokens in read.items():
        made = tokenize(samples, TINY.tokenizer(), loss_on=loss_on)
        assert tokens.fingerprint == made.fingerprint and tokens.labels(0).tolist() == made.labels(0).tolist()
    assert read["all"].fingerprint != read["last"].fingerprint
    assert read["all"].tokens.tolist() == read["last"].tokens.tolist()


def test_a_conversation_scores_the_mean_loss_of_the_tokens_that_are_labelled():
    import torch

    from staff.scoring.passes import score_samples
    from staff.signals.loss import Loss

    model, tokens = TINY.load(), mixed()
    scores = score_samples(model, tokens, (Loss(),), batch_tokens=512, pad_token_id=0)["loss"]
    for i in range(3):
        with torch.no_grad():
            logits = model(torch.tensor(tokens.row(i)[None], dtype=torch.int64)).logits[0, :-1].double()
        targets = torch.tensor(tokens.labels(i)[1:])
        expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)
        assert scores[i] == pytest.approx(float(expected), rel=1e-5)


def test_the_trainer_is_given_the_labels_that_the_scorer_sees():
    from staff.training.trainer import Rows, _collator

    tokens = mixed()
    batch = _collator(TINY.tokenizer())([Rows(tokens)[i] for i in range(3)])
    for i in range(3):
        assert batch["labels"][i][: tokens.lengths[i]].tolist() == tokens.labels(i).tolist()


def test_a_run_on_conversations_trains_every_answer_and_is_evaluated_on_the_last(run, tmp_path: Path):
    def rows(numbers: range) -> str:
        turns = [(ASKED, SAID, ("user", f"{i} + {i}?"), ("assistant", f"{2 * i}")) for i in numbers]
        return "".join(json.dumps({"messages": messages(*some)}) + "\n" for some in turns)

    (tmp_path / "train.jsonl").write_text(rows(range(12)))
    (tmp_path / "test.jsonl").write_text(rows(range(50, 53)))
    data = ("task=file", f"task.data_dir={tmp_path}", "method=staff", "method.num_regions=2")
    both = {loss_on: run(*data, f"task.loss_on={loss_on}") for loss_on in ("all", "last")}
    assert both["all"]["run"]["fingerprint"] != both["last"]["run"]["fingerprint"]
    tokens = {name: record["finetuning"]["tokens_forward"] for name, record in both.items()}
    assert both["all"]["counts"]["test"] == 3 and min(tokens.values()) > 0
