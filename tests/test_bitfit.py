"""Files of trained biases and norms under the model's own names: BitFit, and what is no such file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_models import DTYPES, TinyModels, assert_same_tensors, load, stored_tensors

import loratool
from loratool.cli import cli
from loratool.errors import LoratoolError
from loratool.formats.identify import identify
from loratool.formats.read import read_adapter

Tensors = dict[str, torch.Tensor]
CHOICES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "biases of BERT": ("bert", lambda name: name.endswith(".bias") and "decoder" not in name),
    "biases of BERT and its classifier": ("bert", lambda name: name.endswith(".bias") or name == "classifier.weight"),
    "biases of Qwen2": ("qwen2", lambda name: name.endswith(".bias")),
    "norms of Llama": ("llama", lambda name: name.endswith("norm.weight")),
    "biases and norms of GPT-2": ("gpt2", lambda name: name.endswith(".bias") or ".ln_" in name),
}


def trained(base: Path, architecture: str, chosen: Callable[[str], bool], folder: Path) -> tuple[Path, Path]:
    """Train some parameters of a model, save them alone, and save the model whole; return both places."""
    model = load(base, architecture)
    generator = torch.Generator().manual_seed(3)
    found: Tensors = {}
    for name, parameter in model.named_parameters():
        if chosen(name):
            new = parameter.detach().float() + torch.randn(parameter.shape, generator=generator)
            found[name] = new.clone()
            parameter.data.copy_(new)
    assert found
    folder.mkdir()
    save_file(found, folder / "bitfit.safetensors")
    model.save_pretrained(folder / "whole")
    return folder / "bitfit.safetensors", folder / "whole"


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("case", CHOICES)
def test_each_tensor_takes_the_place_of_the_bases_and_comes_out_again(
    case: str, dtype: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    architecture, chosen = CHOICES[case]
    base = tiny_models.folder(architecture, dtype)
    adapter, whole = trained(base, architecture, chosen, tmp_path / "trained")
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged", undo=True)
    assert_same_tensors(stored_tensors(merged.out), stored_tensors(whole))
    assert any("whole" in note and "replace the base's own" in note for note in merged.notes)
    loratool.verify(merged.out)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged.out, out=tmp_path / "back").out), stored_tensors(base))


def test_it_is_catalogued_exported_and_read_again(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("qwen2", "fp32")
    adapter, whole = trained(base, "qwen2", CHOICES["biases of Qwen2"][1], tmp_path / "trained")
    record = loratool.add(adapter, name="biases", base=base).record
    assert (record.kind, record.format, record.rank, record.alpha) == ("bitfit", "own_names", None, None)
    for name, out in (("single", "copy.st"), ("folder", "folder")):
        exported = loratool.export("biases", tmp_path / out)
        assert read_adapter(exported).kind == "bitfit"
        assert set(read_adapter(exported).changes) == set(load_file(adapter))
        merged = loratool.merge(exported, into=base, out=tmp_path / f"merged-{name}")
        assert_same_tensors(stored_tensors(merged.out), stored_tensors(whole))
    shown = CliRunner().invoke(cli, ["show", "biases"])
    assert shown.exit_code == 0 and "bitfit" in shown.output


VECTOR = torch.ones(56)
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({BIAS: VECTOR[:-1]}, r"shape \[55\], which has \[56\] there; is it the right base"),
        ({BIAS: VECTOR, "model.layers.9.self_attn.q_proj.bias": VECTOR + 1}, "land on no tensor of the base"),
        ({BIAS: VECTOR * torch.nan}, "holds NaN or infinity"),
        ({BIAS: VECTOR.int()}, "is I32; save it as fp32, fp16 or bf16"),
        ({BIAS: VECTOR[:0]}, r"is empty \(shape \[0\]\)"),
        ({BIAS: VECTOR, "classifier.bias": torch.ones(2), "classifier.weight": torch.ones(2, 56)}, "land on no tensor"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_written(
    tensors: Tensors, message: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "bitfit.safetensors")
    with pytest.raises(LoratoolError, match=message):
        loratool.merge(tmp_path / "bitfit.safetensors", into=tiny_models.folder("qwen2"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_has_no_alpha_and_no_weight(tiny_models: TinyModels, tmp_path: Path) -> None:
    save_file({BIAS: VECTOR}, tmp_path / "bitfit.safetensors")
    base = tiny_models.folder("qwen2")
    with pytest.raises(LoratoolError, match=r"no alpha; leave --alpha out"):
        loratool.merge(tmp_path / "bitfit.safetensors", into=base, out=tmp_path / "out", alpha=2.0)
    with pytest.raises(LoratoolError, match=r"leave the weight 0\.5 out"):
        loratool.merge([(tmp_path / "bitfit.safetensors", 0.5)], into=base, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("all.safetensors", {BIAS: VECTOR, "model.layers.0.self_attn.q_proj.weight": torch.ones(56, 56)}),
        ("embedding.safetensors", {BIAS: VECTOR, "model.embed_tokens.weight": torch.ones(9, 56)}),
        ("classifier.safetensors", {"classifier.weight": torch.ones(2, 56)}),
        ("model.safetensors", {"model.norm.weight": VECTOR}),
        ("tail-00002-of-00002.safetensors", {"model.norm.weight": VECTOR}),
        ("statistics.safetensors", {"encoder.running_mean": VECTOR}),
        ("bare.safetensors", {"bias": VECTOR}),
    ],
)
def test_a_model_or_a_part_of_one_is_not_taken_for_an_adapter(name: str, tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / name)
    with pytest.raises(LoratoolError, match="holds no adapter's tensors that loratool knows"):
        identify(tmp_path / name)


def test_biases_and_norms_beside_factors_are_no_second_format(tmp_path: Path) -> None:
    pair = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 56)}
    pair |= {"model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(56, 2)}
    save_file(pair | {BIAS: VECTOR}, tmp_path / "lora.safetensors", {"lora_alpha": "2"})
    assert identify(tmp_path / "lora.safetensors").format == "peft"


@pytest.mark.parametrize("command", ["truncate", "prune", "spectrum"])
def test_what_works_on_factors_refuses_it_by_its_kind(command: str, tmp_path: Path) -> None:
    save_file({BIAS: VECTOR}, tmp_path / "bitfit.safetensors")
    words = {"truncate": ["--rank", "2"], "prune": ["--average-rank", "1"], "spectrum": []}[command]
    start = ["show", "--spectrum"] if command == "spectrum" else [command]
    result = CliRunner().invoke(cli, [*start, str(tmp_path / "bitfit.safetensors"), *words])
    assert result.exit_code != 0 and isinstance(result.exception, LoratoolError), result.output
