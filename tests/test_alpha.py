"""Alpha is read wherever a file states it, in every format that is read; what contradicts itself is refused with both places."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratool
from loratool.cli import main
from loratool.errors import AdapterError, LoratoolError, UnsupportedError
from loratool.formats.identify import identify
from loratool.formats.read import read_adapter

RANK = 2
DOWN, UP = (RANK, 6), (4, RANK)

FORMATS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "PEFT's names": ("peft", {"base_model.model.x.q.lora_A.weight": DOWN, "base_model.model.x.q.lora_B.weight": UP}),
    "bare names": ("peft", {"x.q.lora_A.weight": DOWN, "x.q.lora_B.weight": UP}),
    "diffusers": ("diffusers", {"transformer.x.to_q.lora_A.weight": DOWN, "transformer.x.to_q.lora_B.weight": UP}),
    "ComfyUI": ("comfyui", {"diffusion_model.x.q.lora_A.weight": DOWN, "diffusion_model.x.q.lora_B.weight": UP}),
    "dotted": ("dotted", {"clip_l.x.q.lora_down.weight": DOWN, "clip_l.x.q.lora_up.weight": UP}),
    "kohya": ("kohya", {"lora_unet_x_q.lora_down.weight": DOWN, "lora_unet_x_q.lora_up.weight": UP}),
    "OneTrainer": (
        "onetrainer",
        {"lora_transformer_x_q.lora_down.weight": DOWN, "lora_transformer_x_q.lora_up.weight": UP},
    ),
    "AdaLoRA": (
        "peft",
        {
            "base_model.model.x.q.lora_A": DOWN,
            "base_model.model.x.q.lora_E": (RANK, 1),
            "base_model.model.x.q.lora_B": UP,
        },
    ),
}
NEEDS_ALPHA = {"PEFT's names", "bare names", "AdaLoRA"}

WORDS: dict[str, dict[str, str]] = {
    "lora_alpha": {"lora_alpha": "3"},
    "alpha": {"alpha": "3.0"},
    "network_alpha": {"network_alpha": "3"},
    "ss_network_alpha": {"ss_network_alpha": "3.0", "ss_network_dim": "2"},
    "a component's lora_alpha": {"transformer.lora_alpha": "3"},
    "a component's alpha": {"transformer.alpha": "3"},
    "lora_adapter_metadata": {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 3, "alpha_pattern": {}})},
    "lora_adapter_metadata of a pipeline": {
        "lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 3})
    },
    "peft_config": {"peft_config": json.dumps({"r": RANK, "lora_alpha": 3})},
}
SILENT = {
    "ss_network_alpha": "Dynamic",
    "network_alpha": "None",
    "alpha": "",
    "lora_alpha": "nan",
    "learning_rate": "3",
}


def written(case: str, folder: Path, metadata: dict[str, str] | None = None, **more: Any) -> Path:
    file = folder / "pirate.safetensors"
    tensors = {name: np.ones(shape, np.float32) for name, shape in FORMATS[case][1].items()}
    save_file(tensors | more, file, metadata)
    return file


def scaling_of(case: str, alpha: float) -> float:
    return alpha / (RANK + 1e-5) if case == "AdaLoRA" else alpha / RANK


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("case", FORMATS)
def test_alpha_in_the_metadata_is_read_in_every_format(case: str, word: str, tmp_path: Path) -> None:
    file = written(case, tmp_path, WORDS[word])
    assert read_adapter(file).scaling == pytest.approx(scaling_of(case, 3), rel=1e-12)
    assert read_adapter(file, 3).scaling == read_adapter(file).scaling
    key = next(key for key in WORDS[word] if "alpha" in key or "metadata" in key or "config" in key)
    for given, said in ((5, "--alpha says 5"), ("rank", "--alpha says each module's rank")):
        with pytest.raises(AdapterError, match=rf"its metadata '{key}' says 3 .*{said}; leave --alpha out"):
            read_adapter(file, given)


@pytest.mark.parametrize("case", FORMATS)
def test_words_that_are_no_numbers_state_nothing(case: str, tmp_path: Path) -> None:
    file = written(case, tmp_path, SILENT)
    assert read_adapter(file, 5).scaling == pytest.approx(scaling_of(case, 5), rel=1e-12)
    assert read_adapter(file, "rank").scaling == pytest.approx(scaling_of(case, RANK), rel=1e-12)
    if case in NEEDS_ALPHA:
        with pytest.raises(AdapterError, match=r"does not state its alpha.*--alpha \(a number, or 'rank'"):
            read_adapter(file)
    else:
        assert read_adapter(file).scaling == 1


@pytest.mark.parametrize("case", FORMATS)
def test_two_stated_alphas_that_conflict_are_refused_with_both_and_the_user_decides(case: str, tmp_path: Path) -> None:
    file = written(case, tmp_path, {"lora_alpha": "3", "network_alpha": "5"})
    both = r"contradicts itself: its metadata 'lora_alpha' says that alpha is 3 and its metadata 'network_alpha' that it is 5"
    with pytest.raises(AdapterError, match=both + r".*say which is right with --alpha"):
        read_adapter(file)
    for right in (3, 5):
        assert read_adapter(file, right).scaling == pytest.approx(scaling_of(case, right), rel=1e-12)
    with pytest.raises(AdapterError, match="--alpha says 4"):
        read_adapter(file, 4)


@pytest.mark.parametrize("case", ["kohya", "ComfyUI", "dotted", "diffusers"])
def test_a_tensor_and_the_metadata_that_conflict_are_refused(case: str, tmp_path: Path) -> None:
    module = next(iter(FORMATS[case][1])).rpartition(".lora_")[0]
    alpha = {f"{module}.alpha": np.array(4.0, np.float32)}
    with pytest.raises(
        AdapterError, match=rf"the tensor '{module}.alpha' says .* is 4 and its metadata 'lora_alpha' that it is 3"
    ):
        read_adapter(written(case, tmp_path, {"lora_alpha": "3"}, **alpha))
    assert read_adapter(written(case, tmp_path, {"lora_alpha": "4"}, **alpha)).scaling == 4 / RANK


@pytest.mark.parametrize("case", sorted(set(FORMATS) - {"AdaLoRA"}))
def test_a_configuration_beside_the_file_is_read_in_every_format(case: str, tmp_path: Path) -> None:
    written(case, tmp_path).rename(tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter(tmp_path).scaling == 3 / RANK
    with pytest.raises(AdapterError, match=r"its configuration says 3 .*--alpha says 5"):
        read_adapter(tmp_path, 5)


def test_patterns_in_the_metadata_are_pefts(tmp_path: Path) -> None:
    tensors = {}
    for module in ("x.to_q", "x.to_out.0"):
        tensors |= {
            f"{module}.lora_A.weight": np.ones(DOWN, np.float32),
            f"{module}.lora_B.weight": np.ones(UP, np.float32),
        }
    config = {"r": RANK, "lora_alpha": 3, "alpha_pattern": {"to_out.0": 7}, "use_rslora": True}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert read_adapter(tmp_path / "a.safetensors").scaling == {"x.to_q": 3 / RANK**0.5, "x.to_out.0": 7 / RANK**0.5}
    save_file(tensors, tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(config | {"r": 5})})
    with pytest.raises(
        AdapterError, match=r"'x.to_out.0' .* has rank 2 and its metadata 'lora_adapter_metadata' say 5"
    ):
        read_adapter(tmp_path / "b.safetensors")
    for text in ("{", "[]", '{"r": 2, "lora_alpha": "much"}', '{"r": 2, "use_dora": true, "lora_alpha": 1}'):
        save_file(tensors, tmp_path / "c.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(LoratoolError, match=r"c\.safetensors"):
            read_adapter(tmp_path / "c.safetensors")


def test_rslora_in_kohyas_format_is_refused(tmp_path: Path) -> None:
    config = {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 3, "use_rslora": True})}
    with pytest.raises(UnsupportedError, match="use_rslora"):
        read_adapter(written("kohya", tmp_path, config))


@pytest.mark.parametrize("word", ["lora_alpha", "lora_adapter_metadata"])
def test_formats_that_are_only_catalogued_have_the_alpha_that_they_state(word: str, tmp_path: Path) -> None:
    for name, tensors in {
        "xlabs": {
            "double_blocks.0.processor.qkv_lora1.down.weight": DOWN,
            "double_blocks.0.processor.qkv_lora1.up.weight": UP,
        },
        "loralib": {"x.q.lora_A": DOWN, "x.q.lora_B": UP},
    }.items():
        file = tmp_path / f"{name}.safetensors"
        save_file({key: np.ones(shape, np.float32) for key, shape in tensors.items()}, file, WORDS[word])
        assert (identify(file).format, identify(file).alpha) == (name, 3)


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("alpha", [5.0, "rank"])
def test_a_catalogued_adapter_acts_by_the_alpha_that_it_was_added_with(case: str, alpha: Any, tmp_path: Path) -> None:
    wanted = scaling_of(case, RANK if alpha == "rank" else alpha)
    record = loratool.add(written(case, tmp_path), alpha=alpha).record
    assert record.scaling == pytest.approx(wanted, rel=1e-12)
    assert read_adapter(loratool.export("pirate", tmp_path / "out")).scaling == record.scaling
    assert not loratool.add(written(case, tmp_path), alpha=alpha).new
    if case in NEEDS_ALPHA:
        assert loratool.show(written(case, tmp_path)).record.reference == "pirate@1"


@pytest.mark.parametrize("case", FORMATS)
def test_so_does_one_whose_file_contradicts_itself(case: str, tmp_path: Path) -> None:
    record = loratool.add(written(case, tmp_path, {"lora_alpha": "3", "network_alpha": "5"}), alpha=5).record
    assert record.scaling == pytest.approx(scaling_of(case, 5), rel=1e-12)
    shown = loratool.show("pirate")
    assert shown.record.scaling == record.scaling
    assert read_adapter(loratool.export("pirate", tmp_path / "out.st")).rank == RANK


def test_a_merge_with_a_given_alpha_comes_out_again(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    generator = np.random.default_rng(0)
    save_file({"x.q.weight": generator.normal(size=(4, 6)).astype(np.float32)}, base)
    before = base.read_bytes()
    tensors = {"x.q.lora_down.weight": generator.normal(size=DOWN), "x.q.lora_up.weight": generator.normal(size=UP)}
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    merged = loratool.merge(tmp_path / "a.safetensors", into=base, alpha=5, out=tmp_path / "merged")
    assert loratool.verify(merged.out).replayed
    loratool.unmerge(merged.out, out=tmp_path / "back", approximate=True)
    assert base.read_bytes() == before


def test_rank_is_a_word_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def typed(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["loratool", *words])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out + " ".join(printed.err.split())

    file = str(written("bare names", tmp_path))
    status, printed = typed("add", file, "--alpha", "rank")
    assert status == 0
    assert "kind     lora, rank 2, alpha 2" in printed
    assert "alpha is each module's rank, as you gave it" in printed
    status, printed = typed("add", file, "--alpha", "much")
    assert status == 2
    assert "'much' is neither a number nor 'rank'" in printed
