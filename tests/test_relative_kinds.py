"""Kinds that multiply W or transform matrices, as PEFT saves them: merged to PEFT's bytes, taken out, refused if broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from other_machine import assert_taken_out_alike
from peft.tuners.waveft.waverec2d import waverec2d
from safetensors.torch import load_file, save_file
from test_other_kinds import WEIGHTS, Change, first, saying, with_last_cut, with_nan, without
from tiny_adapters import merge_by_peft, save_peft_adapter
from tiny_models import DTYPES, TinyModels, as_torch, assert_same_tensors, load, stored_tensors

import loratool
from loratool.errors import LoratoolError
from loratool.formats.identify import identify
from loratool.formats.read import read_adapter
from loratool.formats.write import write_peft
from loratool.updates.oft import neumann, neumann_inverse
from loratool.updates.rotation import Rotation, cayley, cayley_inverse, inverted
from loratool.updates.waveft import squares


@dataclass(frozen=True)
class Saved:
    """A configuration, the model it is trained on, and the tensors whose numbers lie around 1, as trained ones do.

    PEFT rounds the change of half types more than once if not `once`. If not `exact`, its arithmetic has errors that depend on
    the number of threads.
    """

    config: peft.PeftConfig
    model: str = "llama"
    around_1: tuple[str, ...] = ()
    once: bool = True
    exact: bool = True


LLAMA = ["q_proj", "v_proj", "down_proj"]
IA3 = ("ia3_l",)
CONFIGS: dict[str, Saved] = {
    "ia3": Saved(peft.IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"]), around_1=IA3),
    "ia3-biases": Saved(
        peft.IA3Config(target_modules=["q_proj", "k_proj", "o_proj", "up_proj"], feedforward_modules=["up_proj"]),
        "qwen2", IA3,
    ),
    "ia3-conv1d": Saved(
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
        "gpt2", IA3,
    ),
    "oft": Saved(peft.OFTConfig(target_modules=LLAMA, oft_block_size=4)),
    "oft-cayley": Saved(peft.OFTConfig(target_modules=["q_proj"], oft_block_size=32, use_cayley_neumann=False)),
    "oft-shared": Saved(peft.OFTConfig(target_modules=LLAMA, oft_block_size=4, block_share=True, num_cayley_neumann_terms=3)),
    "oft-whole": Saved(peft.OFTConfig(target_modules=["down_proj"], r=1, oft_block_size=0)),
    "boft": Saved(peft.BOFTConfig(target_modules=LLAMA, boft_block_size=4), around_1=("boft_s",)),
    "hra": Saved(peft.HRAConfig(target_modules=LLAMA, r=4)),
    "hra-gram-schmidt": Saved(peft.HRAConfig(target_modules=["q_proj", "down_proj"], r=3, apply_GS=True)),
    "hira": Saved(
        peft.HiraConfig(target_modules=LLAMA, r=4, rank_pattern={"layers.1.self_attn.v_proj": 2}), once=False
    ),
    "c3a": Saved(
        peft.C3AConfig(target_modules=["q_proj", "v_proj", "down_proj"], block_size=32, block_size_pattern={"down_proj": 4}),
        once=False, exact=False,
    ),
    "fourierft": Saved(peft.FourierFTConfig(target_modules=LLAMA, n_frequency=50, n_frequency_pattern={"v_proj": 20})),
    "fourierft-conv1d": Saved(
        peft.FourierFTConfig(target_modules=["c_attn"], n_frequency=50, random_loc_seed=5, fan_in_fan_out=True), "gpt2"
    ),
    "waveft": Saved(peft.WaveFTConfig(target_modules=LLAMA, n_frequency=2000, n_frequency_pattern={"v_proj": 20})),
    "waveft-direct": Saved(peft.WaveFTConfig(target_modules=["q_proj"], n_frequency=30, use_idwt=False, scaling=2.0)),
    "waveft-conv1d": Saved(
        peft.WaveFTConfig(target_modules=["c_attn"], n_frequency=50, random_loc_seed=5, fan_in_fan_out=True), "gpt2"
    ),
    "supertuning": Saved(peft.SupertuningConfig(target_modules=LLAMA, sparsity=0.9), once=False),
    "supertuning-supra": Saved(
        peft.SupertuningConfig(target_modules=LLAMA, sparsity=0.9, r=3, lora_alpha=5, select_top=False), once=False
    ),
    "glora": Saved(peft.GloraConfig(target_modules=LLAMA, r=3), once=False),
    "glora-vectors": Saved(
        peft.GloraConfig(
            target_modules=["q_proj", "o_proj"], config_A_B="vector", config_C="none", config_D_E="vector"
        ), "qwen2", once=False,
    ),
    "glora-numbers": Saved(
        peft.GloraConfig(target_modules=["k_proj"], config_A_B="constant", config_C="none", config_D_E="constant"),
        "qwen2", once=False,
    ),
    "road": Saved(peft.RoadConfig(target_modules=["q_proj", "v_proj"], group_size=16), around_1=("alpha",), once=False),
    "road-2": Saved(
        peft.RoadConfig(target_modules=["q_proj", "k_proj"], variant="road_2", group_size=4), "qwen2", ("alpha",), once=False
    ),
    "road-4": Saved(
        peft.RoadConfig(target_modules=["q_proj", "down_proj"], variant="road_4", group_size=64), around_1=("alpha",), once=False
    ),
    "hira-conv1d": Saved(peft.HiraConfig(target_modules=["c_attn"], r=3, fan_in_fan_out=True), "gpt2", once=False),
}  # fmt: skip


class Adapters:
    """Adapters of these configurations, as PEFT saves them, made when first asked for."""

    def __init__(self, root: Path, models: TinyModels) -> None:
        self._root, self._models = root, models

    def folder(self, name: str) -> Path:
        folder, saved = self._root / name, CONFIGS[name]
        if not folder.exists():
            model = load(self._models.folder(saved.model, "fp32"), saved.model)
            save_peft_adapter(model, saved.config, folder, seed=5)
            tensors = load_file(folder / WEIGHTS)
            moved = {
                key: each + 1 if any(part in key for part in saved.around_1) else each for key, each in tensors.items()
            }
            save_file(moved, folder / WEIGHTS, {"format": "pt"})
        return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("relative"), tiny_models)


def merged_by_peft(name: str, base: Path, adapter: Path, out: Path) -> Mapping[str, Any]:
    """The stored tensors of PEFT's merge: of its merge over the base in fp32, rounded once, where it rounds more often."""
    model, saved = CONFIGS[name].model, CONFIGS[name]
    if saved.once:
        return merge_by_peft(load(base, model), adapter, out)
    exact = merge_by_peft(load(base, model).float(), adapter, out)
    dtypes = {key: as_torch(each).dtype for key, each in stored_tensors(base).items()}
    rounded = {key: as_torch(each).to(dtypes[key]) for key, each in exact.items()}
    (out / "rounded").mkdir()
    save_file(rounded, out / "rounded" / "model.safetensors")
    return stored_tensors(out / "rounded")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_has_pefts_bytes_and_is_taken_out_bit_for_bit(
    name: str, dtype: str, adapters: Adapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base, adapter = tiny_models.folder(CONFIGS[name].model, dtype), adapters.folder(name)
    result = loratool.merge(adapter, base, out=tmp_path / "merged", undo=True)
    before, after = stored_tensors(base), stored_tensors(result.out)
    theirs = before | merged_by_peft(name, base, adapter, tmp_path / "peft")
    if CONFIGS[name].exact:
        assert_same_tensors(after, theirs)
    for key in theirs:
        step = torch.finfo(as_torch(after[key]).dtype).eps
        assert torch.allclose(as_torch(after[key]).double(), as_torch(theirs[key]).double(), rtol=step, atol=1e-6)
    weights = {each for each in read_adapter(adapter).changes if each.endswith(".weight")}
    assert sum(after[each].data != before[each].data for each in before) >= len(weights)
    loratool.verify(result.out)
    assert_same_tensors(stored_tensors(loratool.unmerge(result.out, out=tmp_path / "back").out), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_taken_out_with_the_same_bits_on_every_machine(
    name: str, adapters: Adapters, tiny_models: TinyModels
) -> None:
    assert_taken_out_alike(adapters.folder(name), tiny_models.folder(CONFIGS[name].model, "fp32"))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_undo_has_less_than_the_touched_bytes(
    name: str, adapters: Adapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder(CONFIGS[name].model, "bf16")
    merged = loratool.merge(adapters.folder(name), base, out=tmp_path / "merged", undo=True)
    assert merged.undo_file is not None
    share = merged.undo_file.stat().st_size / merged.plan.touched_bytes
    assert share < (0.65 if name == "oft-whole" else 0.45)  # random numbers turn a whole matrix far


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_loads_in_peft_with_the_same_numbers(
    name: str, adapters: Adapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    written = tmp_path / "written"
    write_peft(read_adapter(adapters.folder(name)), written, keep_metadata=False)
    ours, theirs = load_file(written / WEIGHTS), load_file(adapters.folder(name) / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert identify(adapters.folder(name)).kind == name.partition("-")[0]


def test_a_module_without_a_bias_lacks_nothing(adapters: Adapters, tiny_models: TinyModels, tmp_path: Path) -> None:
    changes = read_adapter(adapters.folder("ia3-biases")).changes
    plan = loratool.merge(adapters.folder("ia3-biases"), tiny_models.folder("qwen2"), out=tmp_path / "out").plan
    changed = {target.name for target in plan.targets}
    assert {"model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.k_proj.bias"} <= changed
    assert "model.layers.0.self_attn.o_proj.bias" in set(changes) - changed


def test_a_matrix_that_is_stored_transposed_is_refused_for_rotations(
    adapters: Adapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    rotation = broken(adapters, "hra", saying(target_modules=["c_attn"]), tmp_path / "hra")
    u = torch.ones(64, 4)
    tensors = {
        f"base_model.model.transformer.h.{layer}.attn.c_attn.hra_u": u + torch.eye(64)[:, :4] for layer in range(2)
    }
    save_file(tensors, rotation / WEIGHTS, {"format": "pt"})
    with pytest.raises(LoratoolError, match=r"stored as \(in_features, out_features\)"):
        loratool.merge(rotation, tiny_models.folder("gpt2"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_vector(part: str) -> Change:
    """The tensor has lost its axis of length 1."""

    def flat(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        name = first(tensors, part)
        tensors[name] = tensors[name].flatten().contiguous()

    return flat


def with_first_cut(part: str) -> Change:
    """The tensor has one number less along its first axis."""

    def cut(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        name = first(tensors, part)
        tensors[name] = tensors[name][:-1].contiguous()

    return cut


def with_shape(part: str, *shape: int) -> Change:
    return lambda tensors, config: tensors.update({first(tensors, part): torch.zeros(shape)})


def filled(part: str, number: float) -> Change:
    """All numbers of every such tensor are the same."""
    return lambda tensors, config: [each.fill_(number) for name, each in tensors.items() if part in name]


def singular(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Only three inputs turn, so far that elimination in fp32 leaves no pivot: (0, 1), (0, 2), (1, 2) of a triangle of 32."""
    tensors[first(tensors, "oft_R")].zero_()[:, [0, 1, 31]] = 1e20


def with_first_index(index: int) -> Change:
    return lambda tensors, config: tensors[first(tensors, "q_proj.supertuning_indices")][:1].fill_(index)


def renamed(part: str, other: str) -> Change:
    def rename(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        name = first(tensors, part)
        tensors[name.replace(part, other)] = tensors.pop(name)

    return rename


BROKEN: dict[str, tuple[str, Change, str]] = {
    "ia3: another length": ("ia3", with_last_cut("down_proj.ia3_l"), r"fits a matrix of shape \[any, \d+\]"),
    "ia3: a vector": ("ia3", with_vector("ia3_l"), "neither a row nor a column"),
    "ia3: NaN": ("ia3", with_nan("ia3_l"), "NaN"),
    "ia3: other feed-forward modules": ("ia3", saying(feedforward_modules=[]), "says that it is none of them"),
    "ia3: not a target": ("ia3", saying(target_modules=["q_proj"]), "does not target"),
    "oft: no triangles": ("oft", with_last_cut("oft_R"), "holds no upper triangles"),
    "oft: fewer blocks": ("oft", with_first_cut("oft_R"), r"fits a matrix of shape \[any, \d+\]"),
    "oft: many blocks for all": ("oft", saying(block_share=True), "share one"),
    "oft: shared blocks of another width": ("oft-shared", with_shape("oft_R", 1, 10), "do not divide"),
    "oft: constrained": ("oft", saying(coft=True), "set coft to False"),
    "oft: NaN": ("oft", with_nan("oft_R"), "NaN"),
    "oft: text as terms": (
        "oft",
        saying(num_cayley_neumann_terms="5"),
        "'num_cayley_neumann_terms' in .* the text '5'",
    ),
    "oft: too many terms": ("oft", saying(num_cayley_neumann_terms=10**6), "1000 are the most"),
    "boft: no factors": ("boft", without("boft_s"), "has no boft_s; the file is incomplete"),
    "boft: a butterfly": ("boft", with_shape("down_proj.boft_R", 2, 43, 4, 4), "2 butterfly factors"),
    "boft: other outputs": ("boft", with_first_cut("boft_s"), r"fits a matrix of shape"),
    "boft: NaN": ("boft", with_nan("boft_R"), "NaN"),
    "hra: another rank": ("hra", with_last_cut("hra_u"), "has rank 3 and the configuration says 4"),
    "hra: other inputs": ("hra", with_first_cut("hra_u"), r"fits a matrix of shape \[any, \d+\]"),
    "hra: NaN": ("hra", with_nan("hra_u"), "NaN"),
    "hira: no partner": ("hira", without("hira_B"), "has no hira_B; the file is incomplete"),
    "hira: another rank": ("hira", saying(r=5), "the configuration says 5"),
    "hira: NaN": ("hira", with_nan("hira_A"), "NaN"),
    "c3a: another size": ("c3a", with_last_cut("c3a_kernel"), "has blocks of"),
    "c3a: fewer blocks": ("c3a", with_first_cut("q_proj.c3a_kernel"), "fits a matrix of shape"),
    "c3a: NaN": ("c3a", with_nan("c3a_kernel"), "NaN"),
    "c3a: no size": ("c3a", saying(block_size=0), "'block_size' in"),
    "fourierft: a number less": ("fourierft", with_last_cut("fourierft_spectrum"), "has 49 frequencies"),
    "fourierft: NaN": ("fourierft", with_nan("fourierft_spectrum"), "NaN"),
    "fourierft: no seed": ("fourierft", saying(random_loc_seed=None), "without the right seed"),
    "fourierft: text as scaling": ("fourierft", saying(scaling="1"), "'scaling' in"),
    "waveft: a number less": ("waveft", with_last_cut("q_proj.waveft_spectrum"), "has 1999 coefficients"),
    "waveft: NaN": ("waveft", with_nan("waveft_spectrum"), "NaN"),
    "waveft: another wavelet": ("waveft", saying(wavelet_family="db2"), r"Haar's \(db1\) only"),
    "waveft: no seed": ("waveft", saying(random_loc_seed=-1), "without the right seed"),
    "supertuning: no places": (
        "supertuning",
        without("q_proj.supertuning_indices"),
        "set save_precomputed_indices, and",
    ),
    "supertuning: a value less": ("supertuning", with_last_cut("q_proj.supertuning_values"), "which must be"),
    "supertuning: a place outside": ("supertuning", with_first_index(10**6), "places outside a matrix"),
    "supertuning: NaN": ("supertuning", with_nan("supertuning_values"), "NaN"),
    "supertuning: no partner": ("supertuning-supra", without("lora_B"), "the file is incomplete"),
    "supertuning: another rank": ("supertuning-supra", saying(r=2), "which must be"),
    "supertuning: no rank": ("supertuning-supra", saying(r=None), "has factors, and the configuration has no r"),
    "glora: no partner": ("glora", without("glora_A.Xu"), r"has no glora_A\.Xu"),
    "glora: no term": ("glora", without("glora_D"), "has no glora_D"),
    "glora: other inputs": ("glora", with_last_cut("down_proj.glora_A.Xu"), "A and B of different sizes"),
    "glora: another rank": ("glora", with_last_cut("glora_B.Xd"), "do not fit together"),
    "glora: a bias by the weight": ("glora", renamed("glora_C.zeros", "glora_C.X"), r"config_C"),
    "glora: NaN": ("glora", with_nan("glora_B.Xd"), "NaN"),
    "road: an angle less": ("road", with_last_cut("road_theta"), "which must be"),
    "road: no scales": ("road", without("road_alpha"), "has no road_alpha; the file is incomplete"),
    "road: NaN": ("road", with_nan("road_theta"), "NaN"),
    "road: another variant": ("road", saying(variant="road_3"), "must be one of road_1"),
    "road: large groups": ("road", saying(group_size=48), "groups of 48 outputs"),
    "road: other outputs": ("road", saying(variant="road_2"), "fits a matrix of shape|could land|no whole groups"),
    "oft: too large": ("oft-cayley", singular, "'base_model.*oft_R.weight' in .* cannot be computed in fp32"),
    "hra: no direction": ("hra", filled("hra_u", 0), "cannot hold; its training may have failed"),
    "hira: too large": ("hira", filled("hira_", 1e25), "cannot hold; its training may have failed"),
    "oft: no rotation": ("oft", filled("oft_R", 0), "higher precision, or give --allow-no-op"),
    "c3a: many sizes": (
        "c3a",
        saying(block_size=3, block_size_pattern={f"n{size}": size for size in range(10**4, 10**5)}),
        r"the configuration says '\[3, 1.{1,60}…'; save it again$",
    ),
    "ia3: nothing": ("ia3", lambda tensors, config: tensors.clear(), "holds no IA3 tensors"),
}


@pytest.mark.parametrize("stray", ["text", ["q_proj"], {"a": 1}, True])
def test_an_alpha_of_a_kind_that_has_none_is_ignored_whatever_it_is(
    stray: object, adapters: Adapters, tmp_path: Path
) -> None:
    found = identify(broken(adapters, "ia3", saying(lora_alpha=stray), tmp_path / "stray"))
    assert found.alpha is None


def broken(adapters: Adapters, name: str, change: Change, out: Path) -> Path:
    folder = shutil.copytree(adapters.folder(name), out)
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_refused_with_a_sentence_and_nothing_is_written(
    what: str, adapters: Adapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    name, change, message = BROKEN[what]
    folder = broken(adapters, name, change, tmp_path / "broken")
    with pytest.raises(LoratoolError, match=message):
        loratool.merge(folder, tiny_models.folder(CONFIGS[name].model, "fp32"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_oft_of_peft_0_15_is_the_rotation_that_boft_computes(
    adapters: Adapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """PEFT 0.21 does not load these files. Their formula is BOFT's, with which it merges the same numbers."""
    base, boft = tiny_models.folder("llama", "bf16"), adapters.folder("boft")
    (tmp_path / "oft").mkdir()
    renamed = {
        key.replace("boft_", "oft_").replace("oft_R", "oft_r"): each[0] if "boft_R" in key else each
        for key, each in load_file(boft / WEIGHTS).items()
    }
    save_file(renamed, tmp_path / "oft" / WEIGHTS, {"format": "pt"})
    config = {
        "peft_type": "OFT",
        "target_modules": LLAMA,
        "r": 0,
        "oft_block_size": 4,
        "coft": False,
        "block_share": False,
    }
    (tmp_path / "oft" / "adapter_config.json").write_text(json.dumps(config))
    merged = loratool.merge(tmp_path / "oft", base, out=tmp_path / "merged").out
    theirs = merge_by_peft(load(base, "llama"), boft, tmp_path / "peft")
    assert_same_tensors(stored_tensors(merged), stored_tensors(base) | theirs)
    assert read_adapter(tmp_path / "oft").kind == "oft"

    without_s = {key: each for key, each in renamed.items() if "oft_s" not in key}
    save_file(without_s, tmp_path / "oft" / WEIGHTS, {"format": "pt"})
    with pytest.raises(LoratoolError, match=r"before PEFT 0\.14, OFT rotated outputs"):
        loratool.merge(tmp_path / "oft", base, out=tmp_path / "out")


@pytest.mark.parametrize(("n", "inputs"), [(32, 768), (128, 1024)])
def test_blocks_of_any_size_have_the_bits_of_the_whole_product(n: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randn(inputs // n, n, n, generator=generator)
    weight = torch.randn(128, inputs, generator=generator)
    rotation = Rotation(blocks, blocks.double)
    for start in range(0, 128, 64):
        block = weight[start : start + 64].clone()
        rotation.change(block, range(start, start + 64), torch.empty_like(block))
        whole = torch.mm(torch.block_diag(*blocks), weight.T).T
        assert torch.equal(block, whole[start : start + 64])


def test_inverses_of_rotations_are_exact_to_fp64() -> None:
    q = 0.3 * torch.randn(3, 7, 7, generator=torch.Generator().manual_seed(0))
    q = q - q.mT
    identity = torch.eye(7).double()
    assert torch.allclose(cayley(q).double() @ cayley_inverse(q), identity, atol=1e-6)
    assert torch.allclose(neumann(q, 5).double() @ neumann_inverse(q, 5), identity, atol=1e-5)
    assert torch.allclose(inverted(identity + q.double()) @ (identity + q.double()), identity, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 8), (6, 7), (64, 172)])
def test_haars_transform_has_the_bits_of_pefts(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    places = torch.randperm(size[0] * size[1], generator=generator)[: size[0] * size[1] * 2 // 3]
    rows, columns, c = places // size[1], places % size[1], torch.randn(len(places), generator=generator)
    quarters = torch.zeros(size[0] + size[0] % 2, size[1] + size[1] % 2)
    quarters[rows, columns] = c
    (mean, across), (along, both) = ((each for each in half.chunk(2, 1)) for half in quarters.chunk(2))
    theirs = waverec2d((mean, (across, along, both)), "db1")[: size[0], : size[1]]
    ours = torch.zeros(size)
    down, right, numbers = squares(rows, columns, c, size)
    ours[down, right] = numbers
    assert torch.equal(ours, theirs)
