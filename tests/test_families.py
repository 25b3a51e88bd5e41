"""Real families: every architecture from scores to metrics, chat templates, published settings, the hub."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from support.tiny import SETTINGS, pool_of_sums, weights_of

from staff.data.samples import Sample
from staff.data.tokens import tokenize
from staff.errors import UserError
from staff.evaluation.generator import Greedy, generate
from staff.evaluation.stage import Generate, read_predictions
from staff.models.adapters import LoraSpec, fresh_lora
from staff.models.family import Family
from staff.models.spec import ModelSpec
from staff.models.state import ModelState
from staff.pool import Select
from staff.selection import Coreset
from staff.speculative import Staff
from staff.training.stage import Finetune

TINY = ModelSpec("pkg://staff/assets/tiny/small")
FAMILIES = ("gemma", "llama2", "mistral", "qwen2_5", "gemma3")
ARCHITECTURES = [
    ("gemma", "gemma"),
    ("llama2", "llama"),
    ("mistral", "mistral"),
    ("qwen2_5", "qwen2"),
    ("gemma3", "gemma3_text"),
    ("qwen2_5", "qwen3"),  # by path: any model of an architecture that scoring covers
    ("gemma", "gemma2"),
]
CHAT = {  # as the families' own tokenizers have them, shortened to one question and one answer
    "qwen2_5": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "gemma3": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
}
SAMPLES = [Sample(str(i), f"Say {i}, please. ", f" {i} is end", ()) for i in range(3)]


def chat_tokenizer(template: str):
    tokenizer = TINY.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    """A two-layer model with random weights from an architecture's own configuration class, and a tokenizer."""

    def make(family: str, architecture: str) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = tmp_path_factory.mktemp(family)
        tokenizer = chat_tokenizer(CHAT[family]) if family in CHAT else TINY.tokenizer()
        depth_and_heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        config = AutoConfig.for_model(architecture, **depth_and_heads, **sizes, **special)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)
def test_every_architecture_goes_from_scores_to_answers(folder_of, tmp_path: Path, family: str, architecture: str):
    folder = folder_of(family, architecture)
    paths = [f"family.{role}.path={folder}" for role in ("target", "small")]
    attention = "eager" if architecture == "gemma2" else "sdpa"
    shrunk = ("family.target.dtype=float32", f"family.target.attention={attention}")
    models: Family = instantiate(composed(f"family={family}", *paths, *shrunk).family, _convert_="all")
    pool = pool_of_sums(tmp_path, family=models)
    chosen = pool.store.get(Select(Staff(num_regions=3, verification_budget=2), pool, 3))
    samples = pool.slices["pool"].target.take(Coreset.load(chosen.path).indices)
    tuning = Finetune(models.target, samples, SETTINGS, 1, 0)
    answers = Generate(ModelState(models.target, tuning), samples, Greedy(), 4)
    answered = pool.store.get(answers)
    assert len(samples) == 3 and read_predictions(answered)["tokens"].between(0, 4).all()
    tuned = pool.store.get(tuning)
    layers = {name.split(".layers.")[1].rsplit(".", 2)[0] for name in weights_of(tuned.path)}
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert layers == {f"{i}.self_attn.{n}" for i in (0, 1) for n in attention} | {
        f"{i}.mlp.{n}" for i in (0, 1) for n in mlp
    }


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bert", "is an encoder"),
        ("roberta", "is an encoder"),
        ("t5", "is an encoder-decoder"),
        ("vit", "is not a causal"),
    ],
)
def test_a_model_that_does_not_predict_the_next_token_is_refused_by_its_kind(tmp_path: Path, kind: str, said: str):
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"family path={tmp_path} .*{said}.*: name a decoder"):
        spec = ModelSpec(str(tmp_path))
        spec.check()
        spec.shapes()


@pytest.mark.parametrize("kind", ["llama4_text", "phimoe"])
def test_a_router_of_experts_that_returns_two_tensors_gets_no_adapter(kind: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, head_dim=16, **sizes, **experts))
    adapted = fresh_lora(model, LoraSpec(2, 4), 0)
    names = {name.rsplit(".", 1)[-1] for name, module in adapted.named_modules() if hasattr(module, "lora_B")}
    assert "v_proj" in names and not names & {"router", "gate"}
    adapted(input_ids=torch.ones(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("template", CHAT.values(), ids=CHAT)
def test_a_chat_model_reads_its_template_and_learns_the_answer_and_its_end_of_turn(template: str):
    tokenizer = chat_tokenizer(template)
    tokens = tokenize(SAMPLES, tokenizer, "chat")
    for i, sample in enumerate(SAMPLES):
        turns = [
            {"role": "user", "content": sample.prompt},
            {"role": "assistant", "content": sample.answer.strip()},
        ]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert tokens.prompts()[i] == prompt
        assert tokenizer.decode(tokens.row(i)) == whole.rstrip("\n")
        answer = [token for token in tokens.labels(i) if token != -100]
        assert tokenizer.decode(answer[:-1]).strip() == sample.answer.strip()
        assert tokenizer.decode(answer[-1:]) == ("<|im_end|>" if "im_end" in template else tokenizer.eos_token)


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma", "mamba"])
def test_a_model_that_reads_its_padding_answers_as_one_at_a_time(kind: str, caplog):
    from transformers import AutoConfig, AutoModelForCausalLM

    caplog.set_level("INFO")
    tokenizer = TINY.tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32, "lru_width": 32}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_window_size": 64,
        "intermediate_size": 48,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes, **heads)
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    prompts = [tokenizer(text).input_ids for text in ("How are you?", "x is", "A long prompt that goes on", "y or")]
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=6, batch_tokens=None)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, max_new_tokens=6, batch_tokens=10_000) == alone
    assert ("reads padding" in caplog.text) == (kind != "mamba") and len({*map(tuple, alone)}) == len(alone)


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma", "mamba", "gpt2", "olmo2", "mixtral", "llama"])
def test_answers_of_models_that_read_padding_alone_have_another_name(kind: str, tmp_path: Path):
    """Since they were once made in padded batches."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"attention_hidden_size": 32, "lru_width": 32} if kind in ("rwkv", "recurrent_gemma") else {}
    AutoConfig.for_model(kind, vocab_size=100, **sizes, **more).save_pretrained(tmp_path)
    key = Generate(ModelState(ModelSpec(str(tmp_path))), tokenize(SAMPLES, TINY.tokenizer()), Greedy(), 4).key()
    assert key.pop("prompts", None) == ("one at a time" if more else None)
    assert key.keys() == {"state", "samples", "generator", "max_new_tokens"}


def test_generation_stops_at_a_further_end_token():
    model, tokenizer = TINY.load(), TINY.tokenizer()
    prompt = tokenizer("How are you").input_ids
    (free,) = generate(model, tokenizer, [prompt], max_new_tokens=8, batch_tokens=99)
    (stopped,) = generate(model, tokenizer, [prompt], max_new_tokens=8, batch_tokens=99, end_tokens=[free[2]])
    assert stopped == free[: free.index(free[2])] and len(stopped) < len(free)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "has no chat template: set family.prompt_format=plain, or name an instruction-tuned model"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not put an answer as it is behind"),
    ],
)
def test_a_tokenizer_without_a_usable_chat_template_is_refused(template: str | None, sentence: str):
    with pytest.raises(UserError, match=sentence):
        tokenize(SAMPLES, chat_tokenizer(template), "chat")


def test_an_unknown_prompt_format_is_refused(run):
    with pytest.raises(Exception, match=r"family\.prompt_format='instruct': choose plain or chat"):
        run("family.prompt_format=instruct")


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("family", [*FAMILIES, "smollm2"])
def test_one_override_of_family_or_task_gives_its_published_settings_and_nothing_of_the_tiny_familys(family: str):
    published = {"epochs": 4, "small_epochs": 3, "batch_size": 8, "scheduler": "cosine", "warmup_ratio": 0.1}
    published |= {"max_length": 1024, "length_grouped": False}
    tiny = composed()["finetune"]
    for task, rate in (("dialogsum", 1e-4), ("bioinstruct", 1e-4), ("wmt19_kk_en", 2e-4)):
        settings = composed(f"family={family}", f"task={task}")["finetune"]
        assert settings.learning_rate == rate != tiny.learning_rate
        assert {name: settings[name] for name in published} == published
    assert composed(f"family={family}", "finetune=full")["finetune"].learning_rate == 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_the_hub_is_half_precision_and_named_when_it_cannot_be_had(family: str):
    cfg = composed(f"family={family}")
    models: Family = instantiate(cfg.family, _convert_="all")
    assert models.target.dtype == models.small.dtype == cfg.finetune.precision == "bfloat16"
    for spec in (models.target, models.small):
        with pytest.raises(UserError) as refused:
            spec.load()
        sentence = str(refused.value)
        assert repr(spec.path) in sentence and "family.target.path=FOLDER family.small.path=FOLDER" in sentence
        assert ("accept its licence at" in sentence) == (family in ("gemma", "llama2", "gemma3"))


def test_the_commit_that_a_models_name_resolves_to_is_recorded_and_tells_models_apart(tmp_path: Path, monkeypatch):
    """From a cache as the hub's client leaves it: a name, a branch, and the commit it stood at."""
    commits = {"main": "a" * 40, "v2": "b" * 40}
    for branch, commit in commits.items():
        repository = tmp_path / "models--somebody--model"
        shutil.copytree(TINY.local, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    named = ModelSpec("somebody/model")
    assert named.source() == {"hub": "somebody/model", "commit": commits["main"]}
    second = replace(named, revision="v2")
    assert second.source()["commit"] == commits["v2"]
    assert replace(named, revision=commits["v2"]).identity() == second.identity() != named.identity()
    assert named.tokenizer().eos_token == TINY.tokenizer().eos_token


def test_qlora_is_refused_where_it_cannot_be_before_anything_loads(run, monkeypatch):
    monkeypatch.setattr(ModelSpec, "weights", lambda *args, **options: pytest.fail("a model was loaded"))
    found, there = importlib.util.find_spec, None
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: there if n == "bitsandbytes" else found(n))
    with pytest.raises(UserError, match=r"needs the package bitsandbytes: pip install 'staff-coresets\[qlora\]'"):
        run("finetune=qlora")
    there = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA GPU, and there is none here: choose finetune=lora"):
        run("finetune=qlora")
    with pytest.raises(Exception, match=r"finetune\.quantization=nf4 is for finetune\.kind=lora"):
        run("finetune=full", "finetune.quantization=nf4")


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes, of the extra qlora")
def test_qlora_goes_from_scores_to_metrics_with_4_bit_models_throughout(run, monkeypatch):
    """On a processor, which bitsandbytes can do as well, if slowly."""
    import bitsandbytes

    for user in ("staff.models.spec", "experiments.single"):
        monkeypatch.setattr(f"{user}.check_quantization", lambda: None)
    loaded, load = [], ModelSpec.load
    monkeypatch.setattr(ModelSpec, "load", lambda spec: loaded.append(load(spec)) or loaded[-1])
    record = run("finetune=qlora", "method=staff")
    assert record["counts"]["selected"] == record["counts"]["trained"] == 6
    assert record["identity"]["models"]["target"]["quantization"] == "nf4"
    assert len(loaded) == 5, "to fine-tune and score the small model, to verify, to fine-tune and to answer"
    for model in loaded:
        linear = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert len(linear) >= 7 * model.config.num_hidden_layers
    with pytest.raises(UserError, match="adapters cannot be merged into weights of 4 bits"):
        run("finetune=qlora", "method=staff_official")


def test_an_outage_of_the_hub_ends_a_run_in_a_sentence_and_loses_no_finished_stage(tmp_path, monkeypatch):
    load, pool = ModelSpec.load, pool_of_sums(tmp_path)
    method = Select(Staff(num_regions=2, verification_budget=1), pool, 4)

    def target_is_away(spec: ModelSpec):
        if "target" in spec.path:
            raise UserError("the model cannot be read from the Hugging Face hub")
        return load(spec)

    monkeypatch.setattr(ModelSpec, "load", target_is_away)
    with pytest.raises(UserError, match="cannot be read"):
        pool.store.get(method)
    monkeypatch.setattr(ModelSpec, "load", load)
    pool.store.computed.clear()
    charged = pool.store.get(method).charged()
    computed = {charged[name].label for name in pool.store.computed}
    assert computed == {"effort of 2 samples, raw target", "select by Staff"}
    assert {"fine-tune small on 12 samples", "effort of 12 samples, fine-tuned small"} < {
        charge.label for charge in charged.values()
    }


def test_a_run_says_which_data_it_reads_and_warns_where_another_family_reads_the_shipped_excerpt(
    run, tmp_path, caplog
):
    caplog.set_level("INFO")
    target = shutil.copytree(ROOT / "staff/assets/tiny/target", tmp_path / "another")
    run("method=raw", "evaluation=none")
    assert caplog.messages[0] == "reading pkg://staff/assets/dialogsum"
    assert any(m.endswith("samples of pkg://staff/assets/dialogsum") for m in caplog.messages)
    assert not any("that are shipped" in m for m in caplog.messages)
    run("method=raw", "evaluation=none", "seed=1", f"family.target.path={target}")
    (warning,) = (m for m in caplog.messages if "that are shipped" in m)
    assert "task.data_dir" in warning
