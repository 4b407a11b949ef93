"""`merge --calibrate`: 4-bit weights rounded so that the outputs of their layers on a text are off by less."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_eval import CHATML, tiny_tokenizer, with_tokenizer
from test_nf4 import matrix, parts_of, quantized
from tiny_adapters import TinyAdapters
from tiny_models import TinyModels, digest, save_plain_model

import loratool
from loratool.cli import cli
from loratool.errors import CheckpointError, DataError, LoratoolError, NotFoundError, UnsupportedError
from loratool.running.calibration import MOST_TOKENS, calibration_samples, record_inputs
from loratool.running.data import read_data
from loratool.running.model import load_config, load_model, quiet_libraries
from loratool.weights.coarse.feedback import ALONE, GROUP, Feedback, coefficients, groups
from loratool.weights.four_bit import FourBitWeight
from loratool.weights.rounding import Rounding

LINES = [
    {"text": "the cat sat on the mat"},
    {"prompt": "what sat", "completion": "the dog"},
    {"text": "a dog on a cat, the mat on the dog"},
]


@pytest.fixture(scope="module")
def base(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose feed-forward modules are in NF4 and whose v_proj is dense, with a tokenizer."""
    folder = tmp_path_factory.mktemp("calibration")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_models.folder("llama", "bf16"),
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["v_proj", "lm_head"]
        ),
    )
    model.save_pretrained(folder / "nf4")
    return with_tokenizer(folder / "nf4", folder / "base", tiny_tokenizer(template=CHATML))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def test_the_inputs_that_are_kept_are_those_of_each_sample_by_itself(base: Path, text: Path, tmp_path: Path) -> None:
    """Padding is left out, modules that read the same share a file, and a first token counts as all others together."""
    samples = calibration_samples(read_data(text), transformers.AutoTokenizer.from_pretrained(base), 64)
    with quiet_libraries():
        model = load_model(base, load_config(base), "cpu")
    modules = [f"model.layers.1.{name}" for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
    files = record_inputs(model, modules, samples, tmp_path, device="cpu", progress=lambda count: None)
    assert files[modules[0]] == files[modules[1]] != files[modules[2]]
    found: dict[str, list[Any]] = {module: [] for module in modules}
    for module in modules:
        model.get_submodule(module).register_forward_pre_hook(
            lambda _, inputs, module=module: found[module].append(inputs[0][0].clone())
        )
    with torch.no_grad():
        for sample in samples:
            model(input_ids=torch.tensor([sample.input_ids]))
    for module, rows in found.items():
        for row in rows:
            row[0] *= math.sqrt(len(row) - 1)
        np.testing.assert_allclose(np.load(files[module]), torch.cat(rows).numpy(), rtol=1e-4, atol=1e-5)


def off_by(weight: FourBitWeight, delta: torch.Tensor, inputs: torch.Tensor, feedback: Feedback | None) -> float:
    """The squared error of the outputs for `inputs` when `delta` is added to a matrix, the mean of four draws of chance."""
    codec, rows, before, after = weight.load("cpu"), range(weight.shape[0]), *torch.empty(2, *weight.shape)
    codec.decode(rows, parts_of(weight, rows), before)
    sums = []
    for seed in range(4):
        parts = parts_of(weight, rows)
        codec.encode(rows, delta.clone(), parts, Rounding(seed, feedback))
        codec.decode(rows, parts, after)
        sums.append(float(((after - before - delta) @ inputs.T).square().sum()))
    return float(np.mean(sums))


@pytest.mark.parametrize("spread", [0.0003, 0.003])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_outputs_are_off_by_less_on_inputs_that_have_much_in_common(tmp_path: Path, kind: str, spread: float) -> None:
    """As the inputs of a model's layers have: most of their energy is that of their mean and of a few directions."""
    generator = torch.Generator().manual_seed(2)
    tensors = quantized((128, 512), kind, "fp32", nested=True, blocksize=64)
    weight = matrix(save_plain_model(tmp_path / "m", tensors))
    few = torch.randn(300, 6, generator=generator) @ torch.randn(6, 512, generator=generator)
    inputs = torch.randn(512, generator=generator) * 2 + few + torch.randn(300, 512, generator=generator) * 0.5
    delta = torch.randn(128, 512, generator=generator) * spread
    assert off_by(weight, delta, inputs, Feedback(inputs)) < 0.7 * off_by(weight, delta, inputs, None)


@pytest.mark.parametrize("size", [1, 16, 40, 48])
def test_columns_with_the_largest_inputs_are_rounded_one_by_one_and_the_others_in_groups(size: int) -> None:
    parts = groups(size)
    assert [number for part in parts for number in range(size)[part]] == list(range(size))
    widths = [part.stop - part.start for part in parts]
    assert widths[:ALONE] == [1] * min(size, ALONE)
    assert all(width == GROUP for width in widths[ALONE:-1])


@pytest.mark.parametrize("tokens", [1, 30, 700])
@pytest.mark.parametrize("size", [1, 40, 600])
def test_what_is_passed_on_is_the_least_squares_answer_to_the_errors_so_far(size: int, tokens: int) -> None:
    generator = np.random.default_rng(1)
    inputs = generator.normal(size=(tokens, size)) / math.sqrt(tokens)
    parts = groups(size)
    passed = coefficients(torch.from_numpy(inputs.T).float(), 0.5, parts).double().numpy()
    damped = inputs.T @ inputs + 0.5 * np.eye(size)
    for part in parts[:: len(parts) // 8 or 1]:
        start, width = part.start, part.stop - part.start
        errors = generator.normal(size=(3, start))
        best = -np.linalg.solve(damped[start:, start:], damped[start:, :start] @ errors.T).T
        found = -(errors @ inputs[:, :start].T) @ passed[part].T
        assert np.abs(found - best[:, :width]).max(initial=0) < 1e-4


def test_of_a_text_longer_than_a_matrix_is_wide_only_what_its_inputs_have_in_common_counts(tmp_path: Path) -> None:
    """Read twice it says the same."""
    weight = matrix(save_plain_model(tmp_path / "m", quantized((64, 128), "nf4", "fp32", nested=True, blocksize=64)))
    once = torch.randn(100, 128, generator=torch.Generator().manual_seed(5))
    delta, rows, found = torch.full((64, 128), 0.001), range(64), []
    for inputs in (once, once.repeat(2, 1)):
        parts = parts_of(weight, rows)
        weight.load("cpu").encode(rows, delta.clone(), parts, Rounding(3, Feedback(inputs)))
        found.append(parts[0])
    assert (found[0] != found[1]).float().mean() < 0.001
    assert (found[0] != parts_of(weight, rows)[0]).float().mean() > 0.01


def test_the_error_of_the_column_with_the_largest_inputs_is_made_good_wherever_it_is(tmp_path: Path) -> None:
    """It is last here, where no column after it could; a channel of massive activations may be anywhere."""
    generator = torch.Generator().manual_seed(3)
    tensors = quantized((128, 256), "nf4", "fp32", nested=True, blocksize=64)
    weight = matrix(save_plain_model(tmp_path / "m", tensors))
    inputs = torch.randn(400, 256, generator=generator)
    inputs[:200] += torch.randn(256, generator=generator)
    inputs[:200, -1] = 30
    delta = torch.randn(128, 256, generator=generator) * 0.002
    assert off_by(weight, delta, inputs, Feedback(inputs)) < 0.5 * off_by(weight, delta, inputs, None)


@pytest.mark.parametrize("spread", [0.0003, 0.003])
def test_columns_whose_inputs_have_nothing_in_common_are_rounded_as_without_a_text(
    tmp_path: Path, spread: float
) -> None:
    """In whatever order: each code goes by its own change, odds and chance."""
    tensors = quantized((128, 256), "nf4", "fp32", nested=True, blocksize=64)
    weight, rows = matrix(save_plain_model(tmp_path / "m", tensors)), range(128)
    delta = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) * spread
    backwards, codec = Feedback(torch.diag(torch.arange(1.0, 257.0))), weight.load("cpu")
    assert backwards.order.tolist() == list(range(255, -1, -1))
    parts = {feedback: parts_of(weight, rows) for feedback in (None, backwards)}
    moves = {each: codec.encode(rows, delta.clone(), parts[each], Rounding(3, each)) for each in parts}
    assert len(moves[None].at) > 10
    assert moves[None].hint == moves[backwards].hint
    assert torch.equal(parts[None][0], parts[backwards][0])


@pytest.mark.parametrize("seen", [1.0, 0.0])
@pytest.mark.parametrize("is_short", [True, False])
def test_of_the_two_ways_of_passing_errors_on_the_one_with_the_least_error_is_taken(
    is_short: bool, seen: float
) -> None:
    """Numbers become what they are to become here, so that an error is what carries the change being unlike it.

    It counts for inputs that were not seen, too.
    """
    generator = torch.Generator().manual_seed(4)
    change = torch.randn(8, 40, generator=generator)
    feedback = Feedback(torch.randn(90, 40, generator=generator) * seen)

    def move(part: slice, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full(added.shape, part.start, dtype=torch.int32), added

    places, short = feedback.best(torch.zeros_like(change), change, change * (1 if is_short else 3), move)
    assert short == is_short
    assert places[0].tolist() == [*range(ALONE), *[ALONE] * GROUP, *[ALONE + GROUP] * (40 - ALONE - GROUP)]


def test_inputs_whose_squares_no_fp32_number_holds_are_as_good_as_others(tmp_path: Path) -> None:
    tensors = quantized((64, 128), "nf4", "fp32", nested=True, blocksize=64)
    weight, rows = matrix(save_plain_model(tmp_path / "m", tensors)), range(64)
    inputs = torch.randn(200, 128, generator=torch.Generator().manual_seed(5))
    delta = torch.full((64, 128), 0.001)
    codec, found = weight.load("cpu"), []
    for scale in (1.0, 2.0**80, 2.0**-80):
        parts = parts_of(weight, rows)
        codec.encode(rows, delta.clone(), parts, Rounding(3, Feedback(inputs * scale)))
        found.append(parts[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    Feedback(inputs * 2.0**-140)
    Feedback(inputs * 0)


def test_equal_calibrated_merges_give_equal_bytes_and_verify_takes_them_out(
    base: Path, text: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = tiny_adapters.folder("llama")
    for out in ("a", "b"):
        loratool.merge(adapter, base, out=tmp_path / out, calibrate=text)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    verified = loratool.verify(tmp_path / "a")
    assert verified.replayed == "undo"
    assert any("calibrated on a text" in note for note in verified.notes)
    plain = loratool.merge(adapter, base, out=tmp_path / "plain")
    assert plain.output_fingerprint != json.loads((tmp_path / "a" / "loratool.json").read_text())["fingerprint"]


def test_a_calibrated_merge_is_taken_out_with_base_and_text_gone(
    base: Path, text: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    expected = digest(tmp_path / "base")
    loratool.merge(tiny_adapters.folder("llama"), tmp_path / "base", out=tmp_path / "out", calibrate=text)
    shutil.rmtree(tmp_path / "base")
    text.unlink()
    assert loratool.unmerge(tmp_path / "out", out=tmp_path / "back").method == "undo"
    assert digest(tmp_path / "back") == expected


def test_a_calibrated_merge_in_place_is_taken_out_in_place(
    base: Path, text: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "model")
    expected = digest(tmp_path / "model")
    loratool.merge(tiny_adapters.folder("llama"), tmp_path / "model", in_place=True, calibrate=text)
    assert digest(tmp_path / "model") != expected
    loratool.unmerge(tmp_path / "model", in_place=True)
    assert digest(tmp_path / "model") == expected


def test_what_cannot_be_calibrated_is_refused_and_nothing_is_written(
    base: Path, text: Path, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter, out = tiny_adapters.folder("llama"), tmp_path / "out"
    dense = with_tokenizer(tiny_models.folder("llama", "bf16"), tmp_path / "dense", tiny_tokenizer(template=CHATML))
    with pytest.raises(UnsupportedError, match="no quantized weights"):
        loratool.merge(adapter, dense, out=out, calibrate=text)
    with pytest.raises(LoratoolError, match="leave out --quantize"):
        loratool.merge(adapter, dense, out=out, calibrate=text, quantize="nf4")
    with pytest.raises(NotFoundError, match="no data"):
        loratool.merge(adapter, base, out=out, calibrate=tmp_path / "missing.txt")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "cat " * 3000}) + "\n")
    with pytest.raises(DataError, match="line 1"):
        loratool.merge(adapter, base, out=out, calibrate=tmp_path / "long.jsonl")
    without = shutil.copytree(base, tmp_path / "without")
    for file in without.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        loratool.merge(adapter, without, out=out, calibrate=text)
    assert not out.exists()


def test_a_model_whose_numbers_are_not_finite_is_refused(
    base: Path, text: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][:] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoratoolError, match="not finite"):
        loratool.merge(tiny_adapters.folder("llama"), broken, out=tmp_path / "out", calibrate=text)
    assert not (tmp_path / "out").exists()


def test_plain_text_is_read_in_pieces_and_no_further_than_it_has_to_be(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat, " * 2000)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    samples = calibration_samples(read_data(tmp_path / "text.txt"), tokenizer, 1000)
    assert max(len(sample.input_ids) for sample in samples) == 64
    assert MOST_TOKENS - 64 < sum(len(sample.input_ids) for sample in samples) <= MOST_TOKENS


def test_the_command_line_calibrates(base: Path, text: Path, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    words = ["merge", str(tiny_adapters.folder("llama")), "--into", str(base), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*words, "--calibrate", str(text), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["undo_file"] is not None
    options = json.loads((tmp_path / "out" / "loratool.json").read_text())["options"]
    assert re.fullmatch("[0-9a-f]{64}", options["calibration"])
