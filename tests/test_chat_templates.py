"""Chat templates of every shape: what is read before an answer, what ends it, and what a template may not do."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from staff.data.chat import ChatTemplate
from staff.data.samples import Sample
from staff.data.tokens import tokenize
from staff.errors import UserError
from staff.evaluation.generator import generate
from staff.models.family import Family
from staff.models.spec import ModelSpec

TINY = ModelSpec("pkg://staff/assets/tiny/small")
SAMPLES = [Sample("a", "What is 2 plus 2?", " It is 4.", ()), Sample("b", "Say it. ", "\nTwo\n\nlines", ())]
START = "{% for m in messages %}<turn>{{ m.role }}\n"
ASK = "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n"


def chat(after: str, *, before: str = "", ask: str = "") -> str:
    """A template with this text after every turn, before an answer, and at the end of the generation prompt."""
    shown = "{% if m.role == 'assistant' %}" + before + "{% endif %}{{ m.content }}"
    return START + shown + after + ASK + ask + "{% endif %}"


def tokenizer_of(template: str | None, *added: AddedToken, **named: list[str]):
    tokenizer = TINY.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": named.get("special", [])})
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = template
    return tokenizer


def unnamed(folder: Path, template: str, *contents: str, special: bool = True):
    """A tokenizer loaded from files in which tokenizer.json alone knows these tokens, as in Gemma 3 and Phi 3."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY.local / name, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    for i, text in enumerate(contents, start=len(content["model"]["vocab"])):
        content["added_tokens"].append({"id": i, "content": text, **flags})
    file.write_text(json.dumps(content), "utf-8")
    tokenizer = ModelSpec(str(folder)).tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def answers_of(tokens, tokenizer) -> list[str]:
    return [tokenizer.decode([t for t in tokens.labels(i) if t != -100]) for i in range(len(tokens))]


@pytest.mark.parametrize("special", [True, False])
def test_an_end_of_turn_that_only_the_vocabulary_knows_ends_every_answer(tmp_path: Path, special: bool):
    tokenizer = unnamed(tmp_path, chat("<turn_end>\n"), "<turn>", "<turn_end>", special=special)
    assert "<turn_end>" not in tokenizer.all_special_tokens
    tokens = tokenize(SAMPLES, tokenizer, "chat")
    assert answers_of(tokens, tokenizer) == ["It is 4.<turn_end>", "Two\n\nlines<turn_end>"]
    assert tokens.end_tokens == [tokenizer.convert_tokens_to_ids("<turn_end>")]


@pytest.mark.parametrize(
    ("after", "ending"),
    [
        ("<end>", "<end>"),
        ("\n<end>\n", "\n<end>"),  # white space that the template puts between is trained with the answer
        ("<end><over>", "<end>"),
        ("<over>\n</s>", "<over>"),
        (" [DONE]<end>", "<end>"),
        ("</s>", "</s>"),
        ("", "</s>"),
        ("\n\n", "</s>"),  # an added token of white space ends nothing
        ("\n### over\n", "</s>"),
        ("<unknown_end>", "</s>"),
    ],
)
def test_the_first_token_of_its_own_that_a_template_puts_after_an_answer_ends_it(after: str, ending: str):
    tokenizer = tokenizer_of(chat(after), "<over>", "\n\n", special=["<end>"])
    assert answers_of(tokenize(SAMPLES[:1], tokenizer, "chat"), tokenizer) == ["It is 4." + ending]


def test_an_unknown_token_ends_no_answer():
    tokenizer = tokenizer_of(chat("<pad>"))
    tokenizer.unk_token = "<pad>"
    assert ChatTemplate(tokenizer).end == tokenizer.eos_token_id


def test_an_end_of_turn_of_ordinary_text_is_told_of(caplog):
    ChatTemplate(tokenizer_of(chat("<|im_end|>\n"))).end  # noqa: B018
    assert "'<|im_end|>\\n', which does not start with an added token: using '</s>'" in caplog.text


def test_generation_waits_for_the_end_that_was_trained(tmp_path: Path):
    model, tokenizer = TINY.load(), TINY.tokenizer()
    prompt = tokenizer("How are you").input_ids
    (free,) = generate(model, tokenizer, [prompt], max_new_tokens=8, batch_tokens=99)
    tokenizer = tokenizer_of(chat(tokenizer.decode(free[2])), AddedToken(tokenizer.decode(free[2]), special=False))
    end = ChatTemplate(tokenizer).end
    assert end == free[2]
    (stopped,) = generate(model, tokenizer, [prompt], max_new_tokens=8, batch_tokens=99, end_tokens=[end])
    assert stopped == free[: free.index(end)]


THINK = "<think>\n\n</think>\n\n"
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}" + THINK + "{% endif %}"


@pytest.mark.parametrize(
    ("before", "ask", "options", "prompt_end"),
    [
        (THINK, "", {}, "assistant\n" + THINK),  # Qwen 3
        (THINK, SWITCH, {"enable_thinking": False}, "assistant\n" + THINK),
        (THINK, "<think>\n", {}, "assistant\n" + THINK),  # Qwen 3.5
        ("<think></think>", "<think>\n", {}, "assistant\n<think></think>"),  # Nemotron 3
        ("", "<think>\n", {}, "assistant\n"),  # DeepSeek R1
        ("<|channel|>final<|message|>", "", {}, "assistant\n<|channel|>final<|message|>"),  # gpt-oss
        (" to=user:", "", {}, "assistant\n to=user:"),
    ],
)
def test_what_a_template_always_puts_before_an_answer_belongs_to_the_prompt(before, ask, options, prompt_end):
    tokenizer = tokenizer_of(chat("<end>", before=before, ask=ask), special=["<turn>", "<end>"])
    samples = [*SAMPLES, Sample("c", "Who?", "user", ()), Sample("d", "assistant", "final", ())]
    tokens = tokenize(samples, tokenizer, "chat", template_options=options)
    for sample, prompt, answer in zip(samples, tokens.prompts(), answers_of(tokens, tokenizer), strict=True):
        assert tokenizer.decode(prompt) == f"<turn>user\n{sample.prompt}<end><turn>{prompt_end}"
        assert answer == sample.answer.strip() + "<end>"


def test_an_answer_with_reasoning_of_its_own_needs_no_empty_think_block():
    template = chat("<end>", before="{% if '</think>' not in m.content %}" + THINK + "{% endif %}")
    reasoned = Sample("c", "Why?", "<think>\nHm.\n</think>\n\nSo.", ())
    tokens = tokenize([*SAMPLES, reasoned], tokenizer := tokenizer_of(template, special=["<end>"]), "chat")
    assert tokenizer.decode(tokens.prompts()[0]).endswith(THINK)
    assert tokenizer.decode(tokens.row(2)).endswith("assistant\n<think>\nHm.\n</think>\n\nSo.<end>")


def test_white_space_alone_before_an_answer_belongs_to_the_answer():
    tokenizer = tokenizer_of(chat("<end>", before=" "), special=["<end>"])
    assert answers_of(tokenize(SAMPLES[:1], tokenizer, "chat"), tokenizer) == [" It is 4.<end>"]


@pytest.mark.parametrize("part", ["{{ p.text }}", "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}"])
def test_a_template_that_wants_content_in_parts_gets_it_so(part: str):
    template = START + "{% for p in m.content %}" + part + "{% endfor %}<end>" + ASK + "{% endif %}"
    tokenizer = tokenizer_of(template, special=["<end>"])
    assert answers_of(tokenize(SAMPLES, tokenizer, "chat"), tokenizer) == ["It is 4.<end>", "Two\n\nlines<end>"]


def test_a_template_that_wants_a_system_turn_reads_samples_that_have_one():
    refusal = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    tokenizer = tokenizer_of(refusal + chat("<end>"), special=["<turn>", "<end>"])
    turns = (("system", "Be brief."), ("user", "What is 2 plus 2?"), ("assistant", "It is 4."))
    tokens = tokenize([replace(SAMPLES[0], turns=turns)], tokenizer, "chat", loss_on="all")
    roles = [{"role": role, "content": text} for role, text in turns]
    assert tokenizer.decode(tokens.row(0)) == tokenizer.apply_chat_template(roles, tokenize=False)
    assert answers_of(tokens, tokenizer) == ["It is 4.<end>"]
    with pytest.raises(UserError, match="fails on sample 'a' with 'no system turn'"):
        tokenize(SAMPLES, tokenizer, "chat")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('a system turn is required') }}", "a system turn is required"),
        ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[0].none.text }}", "has no attribute 'none'"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_is_one_sentence_with_what_it_said(template: str, said: str):
    tokenizer = tokenizer_of(template)
    with pytest.raises(UserError) as refused:
        tokenize(SAMPLES, tokenizer, "chat")
    sentence = str(refused.value)
    assert tokenizer.name_or_path in sentence and said in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (chat("").replace("m.content", "m.content.replace('\n', ' ')"), "does not leave the answer of sample 'b'"),
        (chat("").replace("m.content", "m.content + m.content"), "does not put an answer as it is"),
        (chat("").replace("m.content", "m.content | lower"), "does not put an answer as it is"),
        ("{{ messages[-1].content }}", "does not put an answer as it is"),  # no question
    ],
)
def test_a_template_that_changes_an_answer_is_refused(template: str, sentence: str):
    with pytest.raises(UserError, match=sentence):
        tokenize(SAMPLES, tokenizer_of(template), "chat")


DATED = "{{ strftime_now('%d %b %Y') }}|{{ date_string }}|" + chat("<end>")


def test_a_template_that_asks_for_the_day_is_told_the_same_one_every_day(monkeypatch):
    import transformers.utils.chat_template_utils as templates

    tokenizer = tokenizer_of(DATED, special=["<end>"])
    first = tokenize(SAMPLES, tokenizer, "chat")
    assert tokenizer.decode(first.row(0)).startswith("26 Jul 2024|26 Jul 2024|")

    class Tomorrow:
        @staticmethod
        def now():
            pytest.fail("the clock was read")

    monkeypatch.setattr(templates, "datetime", Tomorrow)
    other = tokenize(SAMPLES, tokenizer, "chat", date="2025-01-02")
    assert tokenizer.decode(other.row(0)).startswith("02 Jan 2025|02 Jan 2025|")
    assert tokenize(SAMPLES, tokenizer, "chat").fingerprint == first.fingerprint


def test_a_variable_that_no_template_has_is_told_of(caplog):
    tokenizer = tokenizer_of(chat("<end>", ask=SWITCH))
    ChatTemplate(tokenizer, options={"enable_thinking": True})
    assert "has no variable" not in caplog.text
    ChatTemplate(tokenizer, options={"enable_thinkin": True})
    assert "has no variable 'enable_thinkin'" in caplog.text
    ChatTemplate(tokenizer_of("{# switch #}" + chat("<switch>")), options={"switch": True})
    assert "has no variable 'switch'" in caplog.text, "a comment and plain text read no variable"


@pytest.mark.parametrize("date", ["today", "2024-7-26", "2024-02-30", 20240726, None, ""])
def test_a_date_that_is_none_is_refused(date: object):
    with pytest.raises(UserError, match=r"family\.date=.* must be a day as YYYY-MM-DD, such as 2024-07-26"):
        Family("x", TINY, TINY, "chat", date=date)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [["enable_thinking"], "enable_thinking", {1: True}, [], ""])
def test_template_options_that_are_no_mapping_with_text_keys_are_refused(options: object):
    with pytest.raises(UserError, match=r"family\.template_options=.* must map names to values"):
        Family("x", TINY, TINY, "chat", template_options=options)  # type: ignore[arg-type]


def test_an_option_that_belongs_to_the_rendering_is_refused():
    with pytest.raises(UserError, match="multiple values for keyword argument 'tokenize'"):
        tokenize(SAMPLES, tokenizer_of(chat("")), "chat", template_options={"tokenize": True})


def test_a_run_records_its_day_and_options_and_is_known_by_them_where_a_template_reads_them(run, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(TINY.local, folder)
    tokenizer_of("{{ enable_thinking }}|" + DATED).save_pretrained(folder)
    raw = ["method=raw", *(f"family.{role}.path={folder}" for role in ("target", "small"))]
    chat_runs = {
        options: run("family.prompt_format=chat", *options, *raw)
        for options in ((), ("family.date=2025-01-02",), ("family.template_options={enable_thinking: false}",))
    }
    first, dated, told = chat_runs.values()
    assert first["config"]["family"]["date"] == first["identity"]["date"] == "2024-07-26"
    assert dated["identity"]["date"] == "2025-01-02"
    assert told["identity"]["template_options"] == {"enable_thinking": False}
    assert len({record["run"]["fingerprint"] for record in chat_runs.values()}) == 3
    unread = run("family.prompt_format=chat", "family.template_options={unread: 1}", *raw)
    assert unread["run"]["fingerprint"] == first["run"]["fingerprint"], "the prompts are the same"
    plain = [run(f"family.date={date}", *raw)["run"]["fingerprint"] for date in ("2024-07-26", "2025-01-02")]
    assert plain[0] == plain[1], "a plain prompt has no day"


def test_an_answer_of_a_raw_model_depends_on_the_end_it_waited_for(run, tmp_path: Path):
    """The store may not hand over answers that waited for another end of turn."""
    evaluations = []
    for after in ("</s>", "<pad>"):
        folder = tmp_path / after.strip("</>")
        shutil.copytree(TINY.local, folder)
        tokenizer_of("{% set end = '" + after + "' %}" + chat("{{ end }}")).save_pretrained(folder)
        paths = [f"family.{role}.path={folder}" for role in ("target", "small")]
        run("family.prompt_format=chat", "method=raw", *paths)
        evaluations.append(len(list((tmp_path / "results/artifacts/evaluation").iterdir())))
    assert evaluations == [1, 2]


# ---------------------------------------------------------------- tokenizers that put a space before every text


def spacing(kind: str) -> Any:
    """A tokenizer with whole words that puts a space before every text, in one of the ways there are."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    words: Any = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "first" else "always")
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True) if kind == "bytes" else words
    made.decoder = decoders.ByteLevel() if kind == "bytes" else decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    made.train_from_iterator(["user assistant It is 34: x. Say 12 please.\n"] * 9, trainer)
    if kind == "normaliser":  # as tokenizer.json of Llama 2 has it
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        made.pre_tokenizer = None  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("template", ["im", "llama"])
@pytest.mark.parametrize("kind", ["first", "always", "normaliser", "bytes"])
def test_no_space_is_put_before_an_answer_that_its_template_does_not_have(kind: str, template: str):
    tokenizer = spacing(kind)
    tokenizer.chat_template = {
        "im": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "llama": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Say: {{ m.content }} :"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    }[template]
    tokens = tokenize([Sample("a", "Say 12 please.", " It is 34.", ())], tokenizer, "chat")
    turns = [{"role": "user", "content": "Say 12 please."}, {"role": "assistant", "content": "It is 34."}]
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    assert tokens.row(0).tolist() == whole[: len(tokens.row(0))]
    assert tokens.prompts()[0] == tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("answer", [" It is 34.", "It is 34."])
@pytest.mark.parametrize("kind", ["first", "always", "normaliser", "bytes"])
def test_an_answer_has_the_tokens_that_it_has_behind_its_prompt(kind: str, answer: str):
    tokenizer = spacing(kind)
    row = tokenize([Sample("a", "Say 12 please:", answer, ())], tokenizer).row(0).tolist()
    assert row[1:-1] == tokenizer(f"Say 12 please:{answer}", add_special_tokens=False)["input_ids"]
