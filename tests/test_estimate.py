"""Estimates: the figures that papers print, transformers' own modules, what autograd keeps, and what a process really took."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_eval import Outcome
from tiny_adapters import TinyAdapters
from tiny_models import ARCHITECTURES, TinyModels
from training_memory import CONFIG, LENGTH, RANK, ROWS

import loratool
from loratool.cli import main
from loratool.errors import LoratoolError
from loratool.estimating.known_shapes import KNOWN
from loratool.estimating.memory import (
    Step,
    activation_bytes,
    adapter_memory,
    full_memory,
    layer_bytes,
    nf4_bytes,
)
from loratool.estimating.shape import read_shape
from loratool.library.estimate import EstimateResult, estimate
from loratool.training.options import METHODS

REPOSITORY = Path(__file__).parents[1]
MB, GB = 10**6, 10**9


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATOOL_HOME", str(tmp_path / "home"))


# What papers print


def test_gpt3_with_rank_4_on_queries_and_values_has_the_lora_papers_checkpoint() -> None:
    """Hu et al. 2021, arXiv:2106.09685, section 4.2: with r = 4 and only query and value projections adapted, a checkpoint of
    GPT-3 175B shrinks by roughly 10,000 times, from 350 GB to 35 MB. (2 * 2 * 96 * 4 * 12,288 numbers of fp16 are 37.7 MB,
    or 36.0 MiB.)"""
    result = estimate("gpt3-175b", rank=4, targets="q_proj,v_proj", adapter_dtype="fp16")

    assert result.trainable_parameters == 2 * 96 * 4 * (12_288 + 12_288)
    assert result.adapter_file == pytest.approx(35 * MB, rel=0.1)
    assert result.parameters == pytest.approx(175e9, rel=0.005)
    assert result.parameters / result.trainable_parameters == pytest.approx(10_000, rel=0.1)
    assert way(result, "full").memory.weights == pytest.approx(350 * GB, rel=0.01)


@pytest.mark.parametrize(("rank", "targets", "millions"), [(1, "q_proj,v_proj", 4.7), (8, "q_proj,v_proj", 37.7)])
def test_gpt3s_trainable_parameters_are_those_of_the_lora_papers_table(
    rank: int, targets: str, millions: float
) -> None:
    """arXiv:2106.09685, table 4: 4.7 M with r_q = r_v = 1, 37.7 M with r_q = r_v = 8."""
    result = estimate("gpt3-175b", rank=rank, targets=targets)

    assert round(result.trainable_parameters / 1e6, 1) == millions


def test_an_8192_by_8192_weight_at_rank_8_takes_131_thousand_parameters() -> None:
    """``r * (in + out)``, arXiv:2106.09685, section 4.1: 8 * (8,192 + 8,192) = 131,072, of 67,108,864."""
    result = estimate("llama-65b", rank=8, targets=["model.layers.0.self_attn.q_proj"])

    assert (result.adapted_modules, result.trainable_parameters) == (1, 131_072)


def test_65b_takes_over_780_gb_in_full_and_under_48_gb_as_qlora() -> None:
    """Dettmers et al. 2023, arXiv:2305.14314, abstract and section 1: regular 16-bit fine-tuning of LLaMA 65B takes more than
    780 GB, QLoRA under 48 GB. Theirs: r = 64 on all linear layers (appendix B.2), the adapter in bf16, batches of one
    sample, gradient checkpointing."""
    result = estimate("llama-65b", rank=64, batch_size=1, max_length=512, adapter_dtype="bf16")
    full, qlora = way(result, "full").checkpointed, way(result, "lora-nf4").checkpointed

    assert 780 * GB < full.weights + full.gradients + full.optimizer < 790 * GB
    assert 40 * GB < qlora.total < 48 * GB
    assert way(result, "lora").checkpointed.total > 132 * GB


def test_nf4_with_double_quantization_takes_4_127_bits_a_parameter() -> None:
    """arXiv:2305.14314, section 3: double quantization brings the scales from 0.5 bits a parameter to 0.127."""
    shape = read_shape(KNOWN["llama-65b"], "llama-65b")

    assert nf4_bytes(shape) * 8 / shape.linear_parameters == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize(("length", "batch"), [(2048, 1), (512, 4)])
def test_a_gpts_layer_keeps_what_korthikanti_count(length: int, batch: int) -> None:
    """Korthikanti et al. 2022, arXiv:2205.05198, equation 1: ``s b h (34 + 5 a s / h)`` bytes a layer, equation 2: L times
    that, for 16 bits, dropout, and attention that keeps its scores."""
    config = {"model_type": "gpt2", "vocab_size": 51_200, "n_embd": 12_288, "n_layer": 96, "n_head": 96,
              "n_positions": 2048, "activation_function": "gelu", "resid_pdrop": 0.1}  # fmt: skip
    shape = read_shape(config, "gpt3")
    step = Step(batch, length, compute=2, attention="eager")
    per_layer = length * batch * 12_288 * (34 + 5 * 96 * length / 12_288)
    ends = step.tokens * (12 * 51_200 + 2 * 2 * 12_288)  # the logits, the last norm's input and its result

    assert activation_bytes(shape, step, None) == 96 * per_layer + ends
    checkpointed = Step(batch, length, compute=2, attention="eager", checkpointing=True)
    assert activation_bytes(shape, checkpointed, None) == 96 * 2 * step.tokens * 12_288 + max(per_layer, ends)


def way(result: EstimateResult, name: str) -> Any:
    return next(each for each in result.ways if each.name == name)


# What transformers, PEFT and autograd say

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    **{
        name: ARCHITECTURES[name].config
        for name in ("llama", "llama-tied", "mistral", "qwen2", "gemma", "gpt2", "gpt2-untied", "opt", "gpt_neox")
    },
    "llama with biases": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=24),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=24),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=24),
    "smollm3": lambda: transformers.SmolLM3Config(**SMALL),
    "granite": lambda: transformers.GraniteConfig(**SMALL),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    **{
        name: lambda name=name: transformers.AutoConfig.for_model(**KNOWN[name])  # type: ignore[misc]
        for name in ("gpt3-175b", "gpt2-xl", "llama-65b", "llama3-8b", "mistral-7b")
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_and_parameters_are_those_of_transformers(name: str) -> None:
    config = CONFIGS[name]()
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    weights = {
        name: tuple(module.weight.shape)
        if not isinstance(module, torch.nn.Linear)
        else tuple(module.weight.shape)[::-1]
        for name, module in linear.items()
        if module is not model.get_output_embeddings()
    }
    for content in (config.to_dict(), config.to_diff_dict()):
        shape = read_shape(content, name)
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert {name: (each.in_features, each.out_features) for name, each in shape.linears.items()} == weights


def kept_by_autograd(model: torch.nn.Module, **inputs: torch.Tensor) -> int:
    """Bytes of every storage that the graph of one forward pass keeps, parameters and buffers apart."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**inputs, use_cache=False)
    assert output.logits.requires_grad
    return sum(nbytes for nbytes, _ in kept.values())


WIDE: dict[str, Any] = SMALL | {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 8,
}
MODELS: dict[str, tuple[transformers.PreTrainedConfig, tuple[str, ...]]] = {
    "llama": (transformers.LlamaConfig(**WIDE), ("q_proj", "v_proj")),
    "qwen3": (transformers.Qwen3Config(**WIDE, head_dim=32), ("q_proj", "v_proj")),
    "gpt2": (
        transformers.GPT2Config(vocab_size=131, n_embd=256, n_layer=4, n_head=8, bos_token_id=0, eos_token_id=0,
                                attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
        ("c_attn",),
    ),
    "opt": (
        transformers.OPTConfig(vocab_size=131, hidden_size=256, ffn_dim=1024, num_hidden_layers=4,
                               num_attention_heads=8, dropout=0.0, attention_dropout=0.0, word_embed_proj_dim=256),
        ("q_proj", "v_proj"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("targets", ["full", "all-linear", "some"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps(name: str, targets: str, attention: Any) -> None:
    config, some = MODELS[name]
    shape = read_shape(config.to_dict(), name)
    modules = [each for each in shape.linears if targets != "some" or each.rpartition(".")[2] in some]
    ranks = None if targets == "full" else dict.fromkeys(modules, 4)
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
        model.train()
        if ranks is not None:
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=modules)).to(dtype)
        for rows in (1, 2):
            input_ids, mask = torch.randint(0, 131, (rows, 128)), torch.ones(rows, 128, dtype=torch.int64)
            mask[0, 100:] = 0 if rows > 1 else 1
            step = Step(rows, 128, compute=dtype.itemsize, attention=attention)
            logits = 12 * shape.vocabulary * step.tokens  # made by the loss, which is not computed here

            expected = activation_bytes(shape, step, ranks) - logits
            assert expected == pytest.approx(
                kept_by_autograd(model, input_ids=input_ids, attention_mask=mask), rel=0.06
            )


def test_the_memory_that_steps_really_take_is_the_estimate() -> None:
    """Of a small Llama in fp32 on a CPU, by the resident memory of its process; within a tenth."""
    # Else glibc keeps blocks that are free for later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(REPOSITORY / "tests" / "training_memory.py")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240, check=True)
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    shape = read_shape(CONFIG | {"model_type": "llama"}, "small")
    modules = list(shape.linears)
    assert len(measured) == 4
    for case in measured:
        step = Step(ROWS, LENGTH, compute=4, checkpointing=case["checkpointing"])
        expected = full_memory(shape, step, "adamw") if case["full"] else adapter_memory(
            shape, step, "adamw", modules, RANK, method=METHODS["lora"], adapter_dtype="fp32", quantized=False
        )  # fmt: skip
        assert expected.total == pytest.approx(case["peak"], rel=0.1), case


@pytest.mark.parametrize(
    ("architecture", "rank", "factors"), [("llama", 4, "fp32"), ("gpt2", 3, "fp16"), ("opt", 4, "bf16")]
)
def test_the_adapters_file_is_as_large_as_pefts(
    architecture: str, rank: int, factors: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters
) -> None:
    saved = tiny_adapters.folder(architecture, factors=factors, r=rank) / "adapter_model.safetensors"
    targets = list(ARCHITECTURES[architecture].target_modules)
    folder = tiny_models.folder(architecture)
    result = estimate(folder, rank=rank, targets=targets, adapter_dtype=factors)

    assert result.adapter_file == pytest.approx(saved.stat().st_size, abs=256)


# What is at hand


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gpt2-without-prefix", "opt", "gpt_neox"])
def test_a_folder_is_counted_from_its_headers_and_gives_what_its_configuration_does(
    architecture: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tiny_models.folder(architecture)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_bytes((folder / "config.json").read_bytes())
    by_headers, by_config = estimate(folder).to_json(), estimate(tmp_path / "alone").to_json()
    masks = 2 * 64 if architecture == "gpt2-without-prefix" else 0  # stored, and no parameters

    assert by_headers["parameters"] - masks == by_config["parameters"]
    for key in ("trainable_parameters", "adapted_modules"):
        assert by_headers[key] == by_config[key]
    assert sorted(by_headers["target_modules"]) == sorted(by_config["target_modules"])
    assert estimate(tmp_path / "alone" / "config.json").trainable_parameters == by_config["trainable_parameters"]


def test_a_model_whose_type_is_not_known_is_counted_by_its_weights_with_a_note(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tiny_models.folder("mistral")
    known = estimate(folder)
    (tmp_path / "model").mkdir()
    for file in folder.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "newest"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    result = estimate(tmp_path / "model")

    assert result.parameters == known.parameters
    assert result.ways == known.ways
    assert "'newest'" in result.notes[0]


def test_a_catalogued_base_and_a_damaged_one(tiny_models: TinyModels, tmp_path: Path) -> None:
    loratool.base_add("gpt2", tiny_models.folder("llama"))
    assert estimate("gpt2").model_type == "llama"  # the user's own before a known shape
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((tiny_models.folder("llama") / "config.json").read_bytes())
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\xff" * 100)
    cut = estimate(tmp_path / "cut")

    assert cut.parameters == estimate("gpt2").parameters
    assert "weights cannot be read" in cut.notes[0]


def test_dylora_costs_what_its_largest_rank_does_and_adalora_its_first() -> None:
    lora, dylora = estimate("gpt2", rank=8), estimate("gpt2", rank=8, method="dylora")
    adalora = estimate("gpt2", rank=8, method="adalora")
    modules = adalora.adapted_modules

    assert dylora.trainable_parameters == lora.trainable_parameters
    assert adalora.trainable_parameters == lora.trainable_parameters * 10 // 8 + 10 * modules
    assert adalora.initial_rank == 10
    assert lora.adapter_file < adalora.adapter_file < 1.1 * lora.adapter_file
    assert way(adalora, "adalora").memory.optimizer == 16 * adalora.trainable_parameters


@pytest.mark.parametrize(("optimizer", "nbytes"), [("adamw", 8), ("adamw-8bit", 2), ("adamw-paged", 0), ("sgd", 0)])
def test_the_optimizer_keeps_so_many_bytes_of_each_parameter(optimizer: str, nbytes: int) -> None:
    result = estimate("gpt2", optimizer=optimizer)

    assert way(result, "lora").memory.optimizer == nbytes * result.trainable_parameters
    assert way(result, "full").memory.optimizer == nbytes * result.parameters


def test_a_pattern_or_names_choose_modules_as_training_does() -> None:
    by_pattern = estimate("llama-7b", targets=r"model\.layers\.[0-3]\.self_attn\.(q|v)_proj")
    by_name = estimate("llama-7b", targets="self_attn.q_proj, v_proj")

    assert (by_pattern.adapted_modules, by_pattern.target_modules) == (8, ("q_proj", "v_proj"))
    assert by_name.adapted_modules == 64
    assert estimate("llama-7b", targets="all-linear") == estimate("llama-7b")


def test_a_layer_keeps_less_of_modules_that_no_adapter_reads_and_never_more_than_in_full() -> None:
    shape = read_shape(KNOWN["llama-7b"], "llama-7b")
    step = Step(1, 512)
    everything = layer_bytes(shape, step, dict.fromkeys(shape.linears, 8))
    attention = layer_bytes(shape, step, {"model.layers.0.self_attn.q_proj": 8})

    assert attention < everything < layer_bytes(shape, step, None)


# What is refused

LLAMA: Mapping[str, Any] = KNOWN["llama-7b"]
BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    "no type": ({key: value for key, value in LLAMA.items() if key != "model_type"}, "of type 'None'"),
    "another type": (LLAMA | {"model_type": "whisper"}, "of type 'whisper', whose modules are not known"),
    "a type that is a list": (LLAMA | {"model_type": ["llama"]}, "whose modules are not known"),
    "a missing key": ({key: value for key, value in LLAMA.items() if key != "vocab_size"}, "has no 'vocab_size'"),
    "a negative number": (LLAMA | {"hidden_size": -4096}, "has 'hidden_size' '-4096'"),
    "nothing": (LLAMA | {"num_hidden_layers": 0}, "has 'num_hidden_layers' '0'"),
    "a string": (LLAMA | {"hidden_size": "4096"}, "has 'hidden_size' '4096', which is not a whole number"),
    "a fraction": (LLAMA | {"intermediate_size": 1.5}, "has 'intermediate_size' '1.5'"),
    "a truth": (LLAMA | {"num_attention_heads": True}, "has 'num_attention_heads' 'True'"),
    "a huge number": (LLAMA | {"hidden_size": 10**30}, "1 to 16,777,216"),
    "more layers than can be": (LLAMA | {"num_hidden_layers": 10**6}, "1 to 4,096"),
    "heads that do not divide": (LLAMA | {"num_attention_heads": 33}, "do not divide"),
    "a list": ([LLAMA], "not an object"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_configuration_that_cannot_be_is_one_clear_error(case: str, tmp_path: Path) -> None:
    config, problem = BAD_CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for base in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(LoratoolError, match=re.escape(problem)) as raised:
            estimate(base)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_config_that_is_no_json_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(LoratoolError, match=r"config\.json"):
        estimate(tmp_path)


def test_a_config_that_is_a_pipe_or_a_folder_is_none(tmp_path: Path) -> None:
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.json")
    for name in ("folder", "pipe"):
        with pytest.raises(LoratoolError, match=r"there is no .*config\.json"):
            estimate(tmp_path / name)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``loratool estimate WORDS...`` in this process."""

    def call(*words: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["loratool", "estimate", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return Outcome(int(left.value.code or 0), printed.out, printed.err)

    return call


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["llama-6b"], "the nearest are 'llama-65b'"),
        (["./llama-7b"], "there is no model"),
        ([""], "there is no model"),
        (["."], "config.json"),
        (["gpt2", "--rank", "0"], "--rank is 0"),
        (["gpt2", "--rank", "99999999999"], "--rank is 99999999999"),
        (["gpt2", "--targets", "q_proj"], "its modules are 'c_attn', 'c_proj', 'c_fc'"),
        (["gpt2", "--targets", "("], "--targets"),
        (["gpt2", "--targets", ","], "no target is named"),
        (["gpt2", "--batch-size", "-1"], "--batch-size"),
        (["gpt2", "--length", "0"], "--max-length"),
        (["gpt2", "--max-length", "1025"], "1,024 tokens at most"),
        (["gpt2", "--initial-rank", "9"], "AdaLoRA's"),
        (["gpt2", "--method", "adalora", "--initial-rank", "2"], "at least 8"),
    ],
)
def test_what_cannot_be_estimated_is_one_sentence_and_exit_status_1(
    words: list[str], problem: str, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*words)

    assert (done.status, done.out) == (1, "")
    assert re.fullmatch(r"Error: [^\n]{20,700}\n", done.err)
    assert problem in done.err


@pytest.mark.parametrize(
    "choice", [["--method", "dora"], ["--optimizer", "lion"], ["--rank", "x"], ["--precision", "int8"]]
)
def test_what_is_no_choice_is_wrong_usage(choice: list[str], run: Callable[..., Outcome]) -> None:
    assert run("gpt2", *choice).status == 2


@pytest.mark.parametrize(
    "option",
    [{"method": "dora"}, {"optimizer": "lion"}, {"precision": "fp8"}, {"adapter_dtype": "x"}, {"attention": "x"}],
)
def test_the_function_refuses_what_is_no_choice(option: dict[str, Any]) -> None:
    with pytest.raises(LoratoolError, match=f"--{next(iter(option)).replace('_', '-')} is"):
        estimate("gpt2", **option)


# What is printed


def test_json_has_the_same_keys_for_every_method(run: Callable[..., Outcome]) -> None:
    ways = {"weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "total_bytes"}
    for method in ("lora", "dylora", "adalora"):
        printed = json.loads(run("gpt2", "--method", method, "--json").out)
        assert list(printed) == [
            "model", "model_type", "parameters", "method", "rank", "initial_rank", "target_modules", "adapted_modules",
            "trainable_parameters", "adapter_file_bytes", "adapter_dtype", "batch_size", "max_length", "precision",
            "optimizer", "attention", "memory", "notes",
        ]  # fmt: skip
        assert list(printed["memory"]) == ["full", method, f"{method}-nf4"]
        for way in printed["memory"].values():
            assert set(way) == ways | {"trainable_parameters", "with_gradient_checkpointing"}
            assert set(way["with_gradient_checkpointing"]) == ways
            assert way["total_bytes"] == sum(way[key] for key in ways - {"total_bytes"})


@pytest.mark.parametrize(
    "words", [["gpt3-175b", "--method", "adalora"], ["llama3-405b", "--batch-size", "4096"], ["gpt2"]]
)
def test_the_table_fits_80_columns(words: list[str], run: Callable[..., Outcome]) -> None:
    done = run(*words)

    assert done.status == 0
    assert max(map(len, done.out.splitlines())) <= 80
    for word in ("weights", "gradients", "optimizer", "activations", "FULL", "NF4 + ", "adapter file"):
        assert word in done.out


def test_it_needs_no_torch() -> None:
    code = """
import sys
import loratool
loratool.estimate("llama-65b")
assert not {"torch", "transformers", "peft"} & sys.modules.keys()
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0
