"""A quantized model is the one that transformers and bitsandbytes make: the same matrices, codes, scales and config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from click.testing import CliRunner
from four_bit_models import four_bit_names, save_by_transformers, without_padding
from safetensors.torch import load_file, save_file
from tiny_models import DTYPES, digest, load, rewrite_tensors, save_plain_model, stored_in_file, stored_tensors
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

import loratool
from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.cli import cli
from loratool.errors import LoratoolError, WrongBaseError
from loratool.weights.four_bit import NF4, STATE
from loratool.weights.nf4 import BLOCKSIZES, Nf4Layout, Nf4Options, dynamic_map

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

SHAPES = [(64, 172), (135, 391), (3, 5), (1, 1), (1, 129), (300, 1100)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """How torch rounds the mean of many scales depends on the number of its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_as_bitsandbytes(matrix: torch.Tensor, options: Nf4Options) -> None:
    codes, state = bnb.quantize_4bit(
        matrix, blocksize=options.blocksize, compress_statistics=options.double_quant, quant_type="nf4"
    )
    expected = {"w": codes} | {f"w.{part}": value for part, value in state.as_dict(packed=True).items()}
    rows, columns = matrix.shape
    layout = Nf4Layout("w", (rows, columns), str(matrix.dtype).removeprefix("torch."), options)
    quantizer, numbers = layout.quantizer(), matrix.float().view(-1)
    absmax = quantizer.measure(numbers)
    found = {"w": quantizer.codes(numbers, absmax).view(-1, 1), **quantizer.parts(absmax)}
    assert {new.name: new.shape for new in layout.tensors} == {name: tuple(part.shape) for name, part in found.items()}
    assert found.keys() == expected.keys()
    for name, part in found.items():
        if STATE in name:
            assert json.loads(bytes(part.numpy())) == json.loads(bytes(expected[name].numpy()))
        else:
            assert part.dtype == expected[name].dtype
            assert torch.equal(part, expected[name]), name


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_those_of_bitsandbytes(dtype: str, blocksize: int) -> None:
    generator = torch.Generator().manual_seed(blocksize)
    for shape in SHAPES:
        matrix = torch.randn(shape, generator=generator) * 0.05
        for double_quant in (True, False):
            assert_as_bitsandbytes(matrix.to(DTYPES[dtype]), Nf4Options(blocksize, double_quant))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_wide_ranges_and_small_integers_are_quantized_alike(dtype: str, double_quant: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    some_zeros = torch.randn(30, 77, generator=generator)
    some_zeros.view(-1)[:300] = 0
    matrices = {
        "blocks of zeros": some_zeros,
        "nothing but zeros": torch.zeros(30, 77),
        "small integers, whose codes tie": torch.randint(-3, 4, (64, 64), generator=generator) / 3.0,
        "magnitudes far apart": torch.randn(64, 67, generator=generator)
        * torch.randn(64, 67, generator=generator).exp(),
        "scales all equal": torch.ones(70, 64),
    }
    for matrix in matrices.values():
        assert_as_bitsandbytes(matrix.to(DTYPES[dtype]), Nf4Options(64, double_quant))


def test_numbers_at_and_beside_every_boundary_get_the_code_that_bitsandbytes_gives() -> None:
    values = torch.tensor(NF4)
    bounds = (values[:-1] + values[1:]) / 2
    cells = torch.linspace(-1, 1, 1025)
    centres = torch.cat([bounds, values, cells])
    near = torch.cat([torch.nextafter(centres, torch.tensor(side)) for side in (-9.0, 9.0)])
    numbers = torch.cat([centres, near]).clamp(-1, 1)
    numbers = torch.cat([numbers, torch.zeros(-len(numbers) % 63)]).view(-1, 63)
    assert_as_bitsandbytes(torch.cat([torch.ones(len(numbers), 1), numbers], 1), Nf4Options())


def test_subnormal_numbers_are_quantized_alike() -> None:
    for shape in ((4, 64), (3, 67)):
        assert_as_bitsandbytes(torch.full(shape, 1e-40), Nf4Options())


def test_the_values_of_scales_are_bitsandbytes_dynamic_map() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_quant_state_has_the_length_that_the_header_promises(dtype: str, double_quant: bool) -> None:
    layout = Nf4Layout("w", (5632, 2048), str(DTYPES[dtype]).removeprefix("torch."), Nf4Options(64, double_quant))
    offsets = [0.0, 1.0, 1e-45, 1.1754943508222875e-38, 3.4028234663852886e38, torch.tensor(0.1).item()]
    assert {len(layout.state(offset)) for offset in offsets} == {len(layout.state(0.0))}


ARCHITECTURES_TRIED = [
    ("llama", "bf16"),
    ("llama", "fp32"),
    ("llama", "fp16"),
    ("llama-tied", "bf16"),
    ("llama-odd", "fp32"),
    ("mistral", "bf16"),
    ("qwen2", "bf16"),
    ("gemma", "bf16"),
    ("gpt2", "fp32"),
    ("gpt2-untied", "bf16"),
    ("opt", "fp16"),
    ("gpt_neox", "bf16"),
    ("bert", "fp32"),
    ("bert-headless", "fp32"),
]


@pytest.mark.parametrize(("architecture", "dtype"), ARCHITECTURES_TRIED)
def test_the_model_is_what_transformers_quantizes_and_saves(
    tiny_models: TinyModels, tmp_path: Path, architecture: str, dtype: str
) -> None:
    base = tiny_models.folder(architecture, dtype)
    theirs = save_by_transformers(base, tmp_path / "theirs", architecture, dtype)
    result = loratool.quantize(base, out=tmp_path / "ours")
    assert without_padding(stored_tensors(result.out)) == without_padding(stored_tensors(theirs))
    ours, expected = (json.loads((folder / "config.json").read_text()) for folder in (result.out, theirs))
    assert ours["quantization_config"] == expected["quantization_config"]


def test_without_double_quantization_it_is_what_transformers_saves_too(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "bf16")
    theirs = save_by_transformers(base, tmp_path / "theirs", "llama", "bf16", double_quant=False)
    loratool.quantize(base, out=tmp_path / "ours", double_quant=False)
    assert without_padding(stored_tensors(tmp_path / "ours")) == without_padding(stored_tensors(theirs))


@pytest.mark.parametrize("architecture", ["llama-many-blocks", "gpt2-many-blocks"])
def test_matrices_of_many_blocks_of_rows_are_what_transformers_saves(
    tiny_models: TinyModels, tmp_path: Path, architecture: str
) -> None:
    base = tiny_models.folder(architecture, "fp32")
    theirs = save_by_transformers(base, tmp_path / "theirs", architecture, "fp32")
    loratool.quantize(base, out=tmp_path / "ours")
    assert without_padding(stored_tensors(tmp_path / "ours")) == without_padding(stored_tensors(theirs))


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_transformers_loads_it_as_a_4_bit_model_without_further_words(
    tiny_models: TinyModels, tmp_path: Path, architecture: str, blocksize: int
) -> None:
    base = tiny_models.folder(architecture, "bf16")
    out = loratool.quantize(base, out=tmp_path / "out", blocksize=blocksize).out
    model = load(out, architecture)
    assert model.is_loaded_in_4bit
    stored = stored_tensors(out)
    for name in four_bit_names(stored):
        parameter = model.get_parameter(name)
        assert parameter.data.numpy().tobytes() == stored[name].data
        assert (parameter.quant_state.quant_type, parameter.quant_state.blocksize) == ("nf4", blocksize)


def test_the_loaded_model_computes_nearly_what_the_dense_one_does(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Every row is a whole number of blocks: for others bitsandbytes' kernel for CPUs takes scales of other blocks."""
    base = tiny_models.folder("gpt2", "bf16")
    out = loratool.quantize(base, out=tmp_path / "out").out
    tokens = torch.arange(12)[None]
    quantized, dense = (load(folder, "gpt2")(tokens).logits.float().view(-1) for folder in (out, base))
    assert torch.nn.functional.cosine_similarity(quantized, dense, dim=0) > 0.95


def test_gpt2_files_without_the_models_prefix_keep_their_own_names(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("gpt2-without-prefix", "bf16")
    with_prefix = loratool.quantize(tiny_models.folder("gpt2", "bf16"), out=tmp_path / "with").out
    out = loratool.quantize(base, out=tmp_path / "out").out
    expected = {name.removeprefix("transformer."): part for name, part in stored_tensors(with_prefix).items()}
    found = stored_tensors(out)
    assert {name: found[name] for name in expected} == expected
    assert found.keys() - expected.keys() == {f"h.{layer}.attn.bias" for layer in range(2)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_sharded_model_stays_sharded_each_tensor_in_its_own_shard(
    tiny_models: TinyModels, tmp_path: Path, architecture: str
) -> None:
    base = tiny_models.folder(architecture, "bf16", "sharded")
    single = loratool.quantize(tiny_models.folder(architecture, "bf16"), out=tmp_path / "single").out
    out = loratool.quantize(base, out=tmp_path / "out").out
    assert stored_tensors(out) == stored_tensors(single)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {path.name: stored_in_file(path) for path in sorted(out.glob("*.safetensors"))}
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(len(part.data) for part in stored_tensors(out).values())
    before = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: index["weight_map"][name] for name in before} == before
    assert load(out, architecture).is_loaded_in_4bit


def test_safetensors_itself_reads_the_files_and_finds_every_tensor_aligned(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    out = loratool.quantize(tiny_models.folder("llama-odd", "bf16"), out=tmp_path / "out").out
    loaded = load_file(out / "model.safetensors")
    assert loaded.keys() == stored_tensors(out).keys()
    for info in Checkpoint.open(out).tensors.values():
        assert info.start % {"F32": 4, "BF16": 2, "U8": 1}[info.dtype] == 0


def test_everything_else_in_the_folder_comes_along(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")
    (base / "notes").mkdir()
    (base / "notes" / "a.txt").write_text("kept")
    out = loratool.quantize(base, out=tmp_path / "out").out
    changed = {"config.json", "model.safetensors", "loratool.json"}
    before, after = digest(base), digest(out)
    assert before.keys() | changed == after.keys()
    assert {name for name in before if before[name] != after[name]} == changed & before.keys()
    config, own = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert own.pop("quantization_config")["load_in_4bit"]
    assert list(own.items()) == list(config.items())


def test_equal_inputs_give_equal_bytes(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("mistral", "bf16", "sharded")
    one, other = (loratool.quantize(base, out=tmp_path / name).out for name in ("one", "other"))
    assert digest(one) == digest(other)


def test_the_manifest_says_what_was_made_of_what(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "bf16")
    result = loratool.quantize(base, out=tmp_path / "out", blocksize=128, double_quant=False)
    manifest = json.loads((result.out / "loratool.json").read_text())
    assert manifest["kind"] == "quantization"
    assert manifest["options"] == {"quantize": "nf4", "blocksize": "128", "double_quant": "false", "device": "cpu"}
    for folder, recorded in ((base, manifest["base"]["fingerprint"]), (result.out, manifest["fingerprint"])):
        checkpoint = Checkpoint.open(folder)
        assert fingerprint(checkpoint.tensors, tensor_digests(checkpoint)) == recorded
    assert manifest["tensors"] == tensor_digests(Checkpoint.open(result.out))
    assert (result.base_fingerprint, result.output_fingerprint) == (
        manifest["base"]["fingerprint"],
        manifest["fingerprint"],
    )


def test_a_catalogued_base_gets_it_as_a_variant_that_its_adapters_fit(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")
    loratool.base_add("tiny", base)
    loratool.add(tiny_adapters.folder("llama"), name="pirate", base="tiny")
    result = loratool.quantize("tiny")
    assert (result.name, result.out) == ("tiny-nf4", base.parent / "tiny-nf4")
    record = loratool.base_show("tiny-nf4").record
    assert (record.variant_of, record.fingerprint, record.dtype) == ("tiny", result.output_fingerprint, "nf4")
    assert loratool.base_verify("tiny-nf4").parameter_count == loratool.base_show("tiny").record.parameter_count
    merged = loratool.merge("pirate", "tiny-nf4", out=tmp_path / "merged")
    assert four_bit_names(stored_tensors(merged.out)) == four_bit_names(stored_tensors(result.out))


def test_a_base_that_is_not_catalogued_is_catalogued_only_by_name(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "bf16")
    assert loratool.quantize(base, out=tmp_path / "one").name is None
    assert loratool.base_list() == ()
    assert loratool.quantize(base, out=tmp_path / "two", name="mine").name == "mine"
    (record,) = loratool.base_list()
    assert (record.name, record.path, record.variant_of) == ("mine", tmp_path / "two", None)
    with pytest.raises(LoratoolError, match="'mine'"):
        loratool.quantize(base, out=tmp_path / "three", name="mine")
    assert not (tmp_path / "three").exists()


def test_a_dry_run_writes_nothing_and_tells_the_sizes(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "bf16")
    planned = loratool.quantize(base, out=tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    done = loratool.quantize(base, out=tmp_path / "out")
    assert planned.to_json()["size_bytes"] == sum(len(part.data) for part in stored_tensors(done.out).values())
    assert planned.to_json()["tensors"] == done.to_json()["tensors"]


QWEN3 = {"head_dim": 32, "intermediate_size": 64}
MIXTRAL = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 64}


@pytest.mark.parametrize("task", ["TokenClassification", "SequenceClassification"])
@pytest.mark.parametrize(
    ("config", "sizes"),
    [(transformers.Qwen3Config, QWEN3), (transformers.MixtralConfig, MIXTRAL)],
    ids=["qwen3", "mixtral"],
)
def test_a_head_with_a_bias_is_stored_in_4_bits_and_one_without_is_not(
    config: type[transformers.PreTrainedConfig], sizes: dict[str, int], task: str, tmp_path: Path
) -> None:
    """As transformers does, which takes the last parameter for the last module."""
    auto = getattr(transformers, f"AutoModelFor{task}")
    model = auto.from_config(config(vocab_size=48, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                                    num_key_value_heads=2, num_labels=64, pad_token_id=0, **sizes))  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    out = loratool.quantize(tmp_path / "base", out=tmp_path / "nf4").out
    is_4_bits = "score.weight.absmax" in stored_tensors(out)
    assert is_4_bits == should_convert_module("score", get_keys_to_not_convert(model))
    auto.from_pretrained(out)(torch.tensor([[5, 6, 7]]))


def test_experts_stay_dense_and_the_config_names_them(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    torch.manual_seed(5)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    out = loratool.quantize(tmp_path / "base", out=tmp_path / "out").out
    before, after = stored_tensors(tmp_path / "base"), stored_tensors(out)
    assert all(part == after[name] for name, part in before.items() if "self_attn" not in name)
    assert len(four_bit_names(after)) == 4
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "lm_head" in skipped
    assert any(module.endswith(".experts") for module in skipped)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_what_cannot_be_quantized_is_refused_and_nothing_is_written(tiny_models: TinyModels, tmp_path: Path) -> None:
    quantized = loratool.quantize(tiny_models.folder("llama", "bf16"), out=tmp_path / "quantized").out
    linear = {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 64)}
    name = next(iter(linear))
    cases = {
        "is already quantized": quantized,
        "config.json": quantized / "model.safetensors",
        "no linear modules": save_plain_model(tmp_path / "norms", {"model.norm.weight": torch.ones(64)}),
        "F64": save_plain_model(tmp_path / "fp64", {name: linear[name].double()}),
        "NaN": save_plain_model(tmp_path / "nan", {name: linear[name] * torch.nan}),
        "infinity": save_plain_model(tmp_path / "infinite", {name: linear[name] * torch.inf}),
    }
    for message, base in cases.items():
        with pytest.raises(LoratoolError, match=message):
            loratool.quantize(base, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))
    with pytest.raises(LoratoolError, match="block size"):
        loratool.quantize(tiny_models.folder("llama"), out=tmp_path / "out", blocksize=100)
    with pytest.raises(LoratoolError, match="exists already"):
        loratool.quantize(tiny_models.folder("llama"), out=quantized)


def test_a_base_that_changed_since_it_was_catalogued_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")
    loratool.base_add("tiny", base)
    rewrite_tensors(base, extra={"model.norm.weight": torch.zeros(64, dtype=torch.bfloat16)})
    with pytest.raises(LoratoolError, match="not those that were catalogued"):
        loratool.quantize("tiny", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert loratool.quantize("tiny", out=tmp_path / "out", any_base=True).name is None


def test_the_command_line_quantizes_and_errs_in_one_sentence(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = str(tiny_models.folder("llama", "bf16"))
    out = str(tmp_path / "out")
    runner = CliRunner()
    planned = runner.invoke(cli, ["quantize", base, "--out", out, "--dry-run"])
    assert planned.exit_code == 0
    assert "up_proj x 2" in planned.stdout
    done = runner.invoke(cli, ["quantize", base, "--out", out, "--blocksize", "128", "--json"])
    assert json.loads(done.stdout)["blocksize"] == 128
    again = runner.invoke(cli, ["quantize", out, "--out", str(tmp_path / "again")])
    assert isinstance(again.exception, LoratoolError)
    assert "\n" not in str(again.exception)


def test_a_matrix_of_no_elements_stays_as_it_is(tmp_path: Path) -> None:
    tensors = {"a.up_proj.weight": torch.ones(4, 64), "b.up_proj.weight": torch.ones(0, 64)}
    base = save_plain_model(tmp_path / "base", tensors)
    out = loratool.quantize(base, out=tmp_path / "out").out
    assert four_bit_names(stored_tensors(out)) == ["a.up_proj.weight"]


def test_metadata_of_the_files_is_kept_in_order(tmp_path: Path) -> None:
    base = save_plain_model(tmp_path / "base", {"a.up_proj.weight": torch.ones(4, 64)})
    save_file(load_file(base / "model.safetensors"), base / "model.safetensors", {"z": "1", "a": "2", "format": "pt"})
    out = loratool.quantize(base, out=tmp_path / "out").out
    (header,) = Checkpoint.open(out).headers
    assert list(header.metadata.items()) == [("a", "2"), ("format", "pt"), ("z", "1")]


def test_an_image_says_itself_whose_it_is_where_no_catalogue_does(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loratool.base_add("tiny", tiny_models.folder("llama"))
    loratool.add(tiny_adapters.folder("llama"), name="pirate", base="tiny")
    loratool.export("pirate", out=tmp_path / "pirate.safetensors")
    image = loratool.quantize("tiny", out=tmp_path / "image").out
    monkeypatch.setenv("LORATOOL_HOME", str(tmp_path / "another"))
    assert not loratool.merge(tmp_path / "pirate.safetensors", image, out=tmp_path / "merged").notes
    rewrite_tensors(image, extra={"model.norm.weight": torch.zeros(64, dtype=torch.bfloat16)})
    with pytest.raises(WrongBaseError):
        loratool.merge(tmp_path / "pirate.safetensors", image, out=tmp_path / "other")


def test_what_replaces_an_image_is_catalogued_in_its_place(tiny_models: TinyModels, tmp_path: Path) -> None:
    loratool.base_add("tiny", shutil.copytree(tiny_models.folder("llama"), tmp_path / "base"))
    first = loratool.quantize("tiny")
    again = loratool.quantize("tiny", blocksize=128, force=True)
    assert (again.name, again.notes) == (first.name, ())
    assert first.output_fingerprint != again.output_fingerprint
    record = loratool.base_verify("tiny-nf4")
    assert (record.fingerprint, record.variant_of) == (again.output_fingerprint, "tiny")
