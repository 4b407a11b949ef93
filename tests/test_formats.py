"""Reading and writing adapters: what PEFT saves, what others save, what must be refused, and back again."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapters import copy_with, save_peft_adapter, save_single_file
from tiny_models import digest, stored_in_file

from loratool.checkpoint.header import header_bytes
from loratool.errors import AdapterError, LoratoolError, NotFoundError, UnsupportedError
from loratool.formats.adapter import Adapter
from loratool.formats.read import read_adapter
from loratool.formats.write import write_peft, write_single_file

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


class Attention(torch.nn.Module):
    """Two linear layers under the names that LoRA targets most."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(6, 10, bias=False)
        self.v_proj = torch.nn.Linear(6, 4, bias=False)


class Layer(torch.nn.Module):
    """One layer with an attention and a linear layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.down_proj = torch.nn.Linear(10, 6, bias=False)


class Tower(torch.nn.Module):
    """A model whose modules are named like a transformer's, small enough to build hundreds of times."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(layers))
        self.head = torch.nn.Linear(6, 8, bias=False)


def saved_by_peft(folder: Path, **lora: Any) -> dict[str, tuple[int, float]]:
    """Save an adapter of `Tower` as PEFT does, and return each module's rank and scaling as PEFT loads it again.

    Not as PEFT trained it: saving sorts the patterns, and the first that matches counts.
    """
    save_peft_adapter(
        Tower(), peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | lora)), folder
    )
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in peft.PeftModel.from_pretrained(Tower(), folder).base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def read_by_loratool(path: Path, alpha: float | None = None) -> dict[str, tuple[int, float]]:
    """The rank and scaling of each module as loratool reads them."""
    return {name: (update.rank, update.scaling) for name, update in read_adapter(path, alpha).ranked.items()}


# Numbers, against PEFT

LORA_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a scaling that is no power of two": {"r": 3, "lora_alpha": 7},
    "a fraction as alpha": {"lora_alpha": 0.3},
    "a negative alpha": {"lora_alpha": -8},
    "rsLoRA": {"r": 3, "lora_alpha": 7, "use_rslora": True},
    "ranks by name": {"rank_pattern": {"q_proj": 2, "down_proj": 5}, "target_modules": ["q_proj", "down_proj"]},
    "ranks by path": {"rank_pattern": {"layers.1.self_attn.q_proj": 7}},
    "ranks from the beginning": {"rank_pattern": {"^layers.0.self_attn.q_proj": 1}},
    "ranks by the whole name, escaped": {"rank_pattern": {r"^layers\.1\.self_attn\.q_proj": 7, "q_proj": 3}},
    "ranks by pattern": {"rank_pattern": {r"layers\.[02]\..*_proj": 2}, "target_modules": "all-linear"},
    "the first pattern wins": {"rank_pattern": {".*_proj": 5, "v_proj": 3}, "target_modules": ["q_proj", "v_proj"]},
    "a name is no part of another": {"rank_pattern": {"proj": 9}, "target_modules": ["q_proj", "v_proj"]},
    "alphas by name": {"alpha_pattern": {"v_proj": 5}, "target_modules": ["q_proj", "v_proj"]},
    "alphas and ranks": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 20}},
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "targets by pattern": {"target_modules": r".*layers\.[12]\.self_attn\.(q|v)_proj"},
    "all linear layers": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "some left out": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
    "left out by pattern": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
    "a target by its whole name": {"target_modules": ["head", "layers.0.down_proj"]},
}


@pytest.mark.parametrize("case", LORA_CONFIGS)
def test_modules_ranks_and_scalings_are_pefts_own(case: str, tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path / "adapter", **LORA_CONFIGS[case])
    assert theirs
    assert read_by_loratool(tmp_path / "adapter") == theirs


NAMES = st.sampled_from(
    ["q_proj", "v_proj", "down_proj", "head", "layers.1.self_attn.q_proj", "^layers.2", r"layers\.\d"]
)
PATTERNS = st.builds(lambda head, tail: head + tail, NAMES, st.sampled_from(["", r"\.self_attn\.v_proj", ".*"]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    r=st.integers(1, 9),
    alpha=st.one_of(st.integers(1, 64), st.floats(0.01, 100, allow_nan=False)),
    rslora=st.booleans(),
    ranks=st.dictionaries(PATTERNS, st.integers(1, 9), max_size=3),
    alphas=st.dictionaries(PATTERNS, st.integers(1, 64), max_size=3),
)
def test_any_pattern_of_ranks_and_alphas_gives_pefts_scalings(
    r: int, alpha: float, rslora: bool, ranks: dict[str, int], alphas: dict[str, int], tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    lora = {"r": r, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": ranks, "alpha_pattern": alphas}
    try:
        theirs = saved_by_peft(tmp_path / "adapter", target_modules="all-linear", **lora)
    except RuntimeError as error:
        assert "size mismatch" in str(error)  # the patterns' order, lost when it was saved, gave another rank
        with pytest.raises(AdapterError, match="its configuration says"):
            read_adapter(tmp_path / "adapter")
    else:
        assert read_by_loratool(tmp_path / "adapter") == theirs


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_a_real_models_adapter_is_read_as_peft_holds_it(architecture: str, tiny_adapters: TinyAdapters) -> None:
    folder = tiny_adapters.folder(architecture)
    adapter = read_adapter(folder)
    tensors = load_file(folder / WEIGHTS)
    assert adapter.parameter_count == sum(tensor.numel() for tensor in tensors.values())
    assert {f"{PREFIX}{module}.lora_A.weight" for module in adapter.ranked} == {k for k in tensors if ".lora_A." in k}
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.dtype) == ("lora", 4, 8.0, "F32")
    assert adapter.notes == ()


# Files of other shapes


def test_a_directory_its_weights_file_and_a_single_file_are_the_same_adapter(tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path / "adapter", use_rslora=True, rank_pattern={"layers.0.self_attn.q_proj": 2})
    save_single_file(tmp_path / "adapter", tmp_path / "single.safetensors")
    shutil.copyfile(tmp_path / "single.safetensors", tmp_path / "single.st")
    for path in ("adapter", f"adapter/{WEIGHTS}", "single.safetensors", "single.st"):
        assert read_by_loratool(tmp_path / path) == theirs
    assert [read_adapter(tmp_path / path).name for path in ("adapter", "single.st")] == ["adapter", "single"]


@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("infix", ["", ".default", ".my_adapter"], ids=["no name", "default", "my_adapter"])
def test_names_with_and_without_prefix_and_adapter_name_are_read(prefix: str, infix: str, tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path / "adapter")

    def rename(key: str) -> str:
        return prefix + key.removeprefix(PREFIX).replace(".weight", f"{infix}.weight")

    copy_with(tmp_path / "adapter", tmp_path / "renamed", rename)
    assert read_by_loratool(tmp_path / "renamed") == theirs
    write_peft(read_adapter(tmp_path / "renamed"), tmp_path / "back")
    assert stored_in_file(tmp_path / "back" / WEIGHTS) == stored_in_file(tmp_path / "adapter" / WEIGHTS)


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    first = {key.replace(".weight", ".one.weight"): tensor for key, tensor in tensors.items() if "layers.0" in key}
    second = {key.replace(".weight", ".two.weight"): tensor for key, tensor in tensors.items() if "layers.1" in key}
    save_file(first | second, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(AdapterError, match="several adapters"):
        read_adapter(tmp_path / "adapter")


def bare_file(path: Path, ranks: Mapping[str, int]) -> Path:
    """A file of factors and nothing else."""
    tensors = {}
    for module, rank in ranks.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, 6)
        tensors[f"{module}.lora_B.weight"] = torch.randn(10, rank)
    save_file(tensors, path)
    return path


def test_a_bare_file_needs_alpha_and_says_so(tmp_path: Path) -> None:
    file = bare_file(tmp_path / "bare.safetensors", {"layers.0.q_proj": 4, "layers.1.q_proj": 4})
    with pytest.raises(AdapterError, match="--alpha"):
        read_adapter(file)
    adapter = read_adapter(file, 6.0)
    assert {update.scaling for update in adapter.ranked.values()} == {6.0 / 4}
    assert len(adapter.notes) == 1
    assert "alpha is 6" in adapter.notes[0]


def test_a_bare_file_of_uneven_ranks_scales_each_module_by_its_own_rank_and_is_read_by_peft(tmp_path: Path) -> None:
    ranks = {"layers.0.self_attn.q_proj": 2, "layers.1.self_attn.q_proj": 5, "layers.2.self_attn.q_proj": 3}
    file = bare_file(tmp_path / "bare.safetensors", ranks)
    adapter = read_adapter(file, 7)
    assert read_by_loratool(file, 7) == {module: (rank, 7 / rank) for module, rank in ranks.items()}
    write_peft(adapter, tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(Tower(), tmp_path / "peft").base_model.model
    tensors = load_file(file)
    for module, rank in ranks.items():
        layer = loaded.get_submodule(module)
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 7 / rank)
        assert torch.equal(layer.lora_A["default"].weight, tensors[f"{module}.lora_A.weight"])
        assert torch.equal(layer.lora_B["default"].weight, tensors[f"{module}.lora_B.weight"])


def test_alpha_for_an_adapter_that_says_another_is_refused_with_both(tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "adapter", lora_alpha=8)
    save_single_file(tmp_path / "adapter", tmp_path / "single.st")
    for path in ("adapter", "single.st", f"adapter/{WEIGHTS}"):
        with pytest.raises(AdapterError, match=r"its configuration says 8 .* --alpha says 9; leave --alpha out"):
            read_adapter(tmp_path / path, 9.0)
        assert read_adapter(tmp_path / path, 8.0).alpha == 8


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="lora_alpha"):
        read_adapter(bare_file(tmp_path / "bare.st", {"q_proj": 2}), alpha)


def test_keys_of_the_configuration_that_lora_does_not_know_are_noted_without_control_characters(tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path / "adapter")
    copy_with(tmp_path / "adapter", tmp_path / "more", **{"a_key_of_tomorrow": 1, "b\x1b[31m": 2})
    adapter = read_adapter(tmp_path / "more")
    assert read_by_loratool(tmp_path / "more") == theirs
    (note,) = adapter.notes
    assert "a_key_of_tomorrow" in note
    assert note.isprintable()


# What is refused


class Bomb:
    """An object that leaves a mark where its pickle is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "lora.pth", "lora.ckpt", "lora.pkl"])
def test_a_pickle_is_refused_with_advice_and_not_loaded(name: str, tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    file = tmp_path / "adapter" / name
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    for path in (tmp_path / "adapter", file):
        with pytest.raises(AdapterError, match=r"is a pickle.*save_pretrained"):
            read_adapter(path)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_is_not_even_opened(tmp_path: Path) -> None:
    """Whoever opens this pipe waits for ever, since nobody writes to it."""
    saved_by_peft(tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    os.mkfifo(tmp_path / "adapter" / "adapter_model.bin")
    for path in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.bin"):
        with pytest.raises(AdapterError, match="is a pickle"):
            read_adapter(path)


def test_a_pickle_under_another_name_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(AdapterError, match="not a valid safetensors file"):
        read_adapter(tmp_path / "adapter.safetensors")
    assert not (tmp_path / "exploded").exists()


def test_safetensors_beside_a_pickle_are_taken(tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert read_by_loratool(tmp_path / "adapter") == theirs


BROKEN_CONFIGS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "JSON is broken at line 1"),
    "empty": ("", "JSON is broken at line 1"),
    "a list": ("[]", "JSON is not an object"),
    "not UTF-8": ("\udcff", "JSON is not UTF-8"),
    "a key twice": ('{"r": 4, "r": 5, "lora_alpha": 8}', "'r' occurs twice"),
    "NaN": ('{"r": 4, "lora_alpha": NaN}', "NaN is not JSON"),
    "no rank": ('{"lora_alpha": 8}', "'r'"),
    "rank 0": ('{"r": 0, "lora_alpha": 8}', "'r'"),
    "a rank that is no whole number": ('{"r": 4.5, "lora_alpha": 8}', "'r'"),
    "a rank that is true": ('{"r": true, "lora_alpha": 8}', "'r'"),
    "another rank": ('{"r": 5, "lora_alpha": 8}', "rank 4 and its configuration says 5"),
    "no alpha": ('{"r": 4}', r"does not state its alpha \(lora_alpha\).*--alpha"),
    "alpha as text": ('{"r": 4, "lora_alpha": "8"}', "'lora_alpha'"),
    "alpha out of range": ('{"r": 4, "lora_alpha": 1e999}', "1e999', which is beyond"),
    "targets that are numbers": ('{"r": 4, "lora_alpha": 8, "target_modules": [1]}', "target_modules"),
    "patterns as a list": ('{"r": 4, "lora_alpha": 8, "rank_pattern": [4]}', "rank_pattern"),
    "a pattern that is none": ('{"r": 4, "lora_alpha": 8, "rank_pattern": {"(": 4}}', "not a valid pattern"),
    "a pattern that takes for ever": (
        '{"r": 4, "lora_alpha": 8, "target_modules": "(?:(?:[a-z_0-9.]|[a-z]|[a-z_]|[a-z.])+)+[0-9A-Z]"}',
        "takes too long",
    ),
    "layers as text": ('{"r": 4, "lora_alpha": 8, "layers_to_transform": "all"}', "layers_to_transform"),
    "rsLoRA as text": ('{"r": 4, "lora_alpha": 8, "use_rslora": "yes"}', "use_rslora"),
    "another type": ('{"r": 4, "lora_alpha": 8, "peft_type": "IA3"}', "IA3"),
    "DoRA": ('{"r": 4, "lora_alpha": 8, "use_dora": true}', "DoRA, has no lora_magnitude_vector"),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_a_broken_configuration_is_refused_by_what_is_wrong_in_it(case: str, tmp_path: Path) -> None:
    text, message = BROKEN_CONFIGS[case]
    saved_by_peft(tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(AdapterError, match=message) as raised:
        read_adapter(tmp_path / "adapter")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("value", ["r", "lora_alpha", "rank_pattern", "bias", "use_dora"])
def test_a_fault_of_the_configuration_is_said_of_its_file_and_not_of_the_weights(value: str, tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "adapter")
    copy_with(tmp_path / "adapter", tmp_path / "bad", **{value: "None"})
    with pytest.raises(AdapterError, match=CONFIG) as raised:
        read_adapter(tmp_path / "bad")
    assert WEIGHTS not in str(raised.value)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_directory_without_one_of_its_files_is_refused_by_its_name(missing: str, tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "adapter")
    (tmp_path / "adapter" / missing).unlink()
    with pytest.raises(LoratoolError, match=missing):
        read_adapter(tmp_path / "adapter")


def test_nothing_there_is_said_to_be_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no adapter"):
        read_adapter(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("metadata", ["{", "[]", "null", '{"r": 4, "r": 4}'])
def test_a_single_file_whose_configuration_is_no_json_object_is_refused(metadata: str, tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "adapter")
    save_file(load_file(tmp_path / "adapter" / WEIGHTS), tmp_path / "x.st", {"adapter_config": metadata})
    with pytest.raises(AdapterError, match="adapter_config"):
        read_adapter(tmp_path / "x.st")


def test_a_factor_without_its_partner_is_refused(tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "adapter")
    for factor in "AB":
        tensors = load_file(tmp_path / "adapter" / WEIGHTS)
        del tensors[f"{PREFIX}layers.1.self_attn.q_proj.lora_{factor}.weight"]
        copy = shutil.copytree(tmp_path / "adapter", tmp_path / f"without-{factor}")
        save_file(tensors, copy / WEIGHTS)
        with pytest.raises(AdapterError, match=rf"layers\.1\.self_attn\.q_proj.*no lora_{factor}"):
            read_adapter(copy)


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [
        ((4, 6), (10, 5)),
        ((4,), (10, 4)),
        ((4, 6, 1), (10, 4)),
        ((0, 6), (10, 0)),
        ((4, 6), (4, 10)),
        ((4, 6, 3), (10, 4, 3)),
        ((4, 6, 3), (10, 5, 1)),
        ((4, 6, 3, 3), (10, 4, 1)),
        ((4, 6, 1, 1, 1, 1), (10, 4, 1, 1, 1, 1)),
    ],
)
def test_factors_that_do_not_fit_together_are_refused(
    shape_a: tuple[int, ...], shape_b: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {"q_proj.lora_A.weight": torch.zeros(shape_a), "q_proj.lora_B.weight": torch.zeros(shape_b)}
    save_file(tensors, tmp_path / "x.st")
    with pytest.raises(AdapterError, match="q_proj"):
        read_adapter(tmp_path / "x.st", 8)


@pytest.mark.parametrize(
    ("key", "feature"),
    [
        ("q_proj.psoft_R", "PSOFT"),
        ("q_proj.lora_diag", "KaSA"),
        ("q_proj.lily_A", "Lily"),
    ],
)
def test_a_bare_file_of_another_format_is_refused_by_its_name(key: str, feature: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(4, 4)}, tmp_path / "x.st")
    with pytest.raises(UnsupportedError, match=feature):
        read_adapter(tmp_path / "x.st", 8)


def test_a_file_without_lora_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.st")
    with pytest.raises(AdapterError, match="no LoRA tensors"):
        read_adapter(tmp_path / "x.st", 8)


# Written, and read again

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@st.composite
def adapter_files(draw: st.DrawFn) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """A bare safetensors file of random bytes, with a configuration that fits it and facts beside it."""
    r, alpha = draw(st.integers(1, 5)), draw(st.integers(1, 40) | st.floats(0.1, 40))
    modules = draw(st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True))
    key = draw(
        st.sampled_from(["base_model.model.{}.lora_{}.weight", "{}.lora_{}.weight", "{}.lora_{}.default.weight"])
    )
    ranks = {f"layers.{number}.q_proj": draw(st.sampled_from([r, r + 1])) for number in modules}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module, rank in ranks.items():
        dtype, rows, columns = (
            draw(st.sampled_from(sorted(DTYPE_BYTES))),
            draw(st.integers(1, 9)),
            draw(st.integers(1, 9)),
        )
        shapes[key.format(module, "A")] = (dtype, (rank, columns))
        shapes[key.format(module, "B")] = (dtype, (rows, rank))
    names = draw(st.permutations(sorted(shapes)))
    data = b"".join(
        draw(st.binary(min_size=size, max_size=size))
        for size in (DTYPE_BYTES[dtype] * shape[0] * shape[1] for dtype, shape in map(shapes.__getitem__, names))
    )
    config = {"r": r, "lora_alpha": alpha, "peft_type": "LORA", "use_rslora": draw(st.booleans())} | {
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "base_model_name_or_path": draw(st.none() | st.text(st.characters(codec="utf-8"), max_size=9)),
    }
    facts = draw(
        st.dictionaries(st.sampled_from(["recipe", "kind", "ключ"]), st.none() | st.integers() | st.text(), max_size=2)
    )
    return header_bytes({name: shapes[name] for name in names}, {}) + data, config, facts


def content(adapter: Adapter) -> dict[str, Any]:
    """All that an adapter is, wherever it is stored."""
    tensors = stored_in_file(adapter.file)
    return {
        "config": dict(adapter.config),
        "facts": dict(adapter.facts),
        "updates": {
            module: (update.scaling, tensors[update.a.name], tensors[update.b.name])
            for module, update in adapter.ranked.items()
        },
    }


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=adapter_files())
def test_an_adapter_written_as_one_file_and_as_a_directory_is_the_same_one(
    parts: tuple[bytes, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    weights, config, facts = parts
    for left in ("adapter", "back", "again"):
        shutil.rmtree(tmp_path / left, ignore_errors=True)
    for left in ("one.st", "two.st"):
        (tmp_path / left).unlink(missing_ok=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / WEIGHTS).write_bytes(weights)
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    if facts:
        (tmp_path / "adapter" / "loratool.json").write_text(json.dumps(facts))
    adapter = read_adapter(tmp_path / "adapter")
    write_single_file(adapter, tmp_path / "one.st")
    single = read_adapter(tmp_path / "one.st")
    write_peft(single, tmp_path / "back")
    assert content(adapter) == content(single) == content(read_adapter(tmp_path / "back"))
    write_single_file(read_adapter(tmp_path / "back"), tmp_path / "two.st")
    assert (tmp_path / "one.st").read_bytes() == (tmp_path / "two.st").read_bytes()
    write_peft(read_adapter(tmp_path / "back"), tmp_path / "again")
    assert digest(tmp_path / "back") == digest(tmp_path / "again")


def test_equal_adapters_give_equal_bytes_whatever_the_order_of_their_keys(tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "one", target_modules=["q_proj", "v_proj", "down_proj"])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    (tmp_path / "two" / CONFIG).write_text(json.dumps(dict(reversed(config.items()))))
    for name in ("one", "two"):
        write_single_file(read_adapter(tmp_path / name), tmp_path / f"{name}.st")
    assert (tmp_path / "one.st").read_bytes() == (tmp_path / "two.st").read_bytes()


def test_a_single_file_is_what_safetensors_and_peft_read(tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    write_single_file(read_adapter(tmp_path / "adapter"), tmp_path / "one.st")
    with safe_open(tmp_path / "one.st", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        config = json.loads(file.metadata()["adapter_config"])
    assert config == json.loads((tmp_path / "adapter" / CONFIG).read_text())
    ours, theirs = load_file(tmp_path / "one.st"), load_file(tmp_path / "adapter" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_directory_written_from_pefts_keeps_its_sha256(tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    write_peft(adapter, tmp_path / "copy")
    assert read_adapter(tmp_path / "copy").sha256 == adapter.sha256
    assert (tmp_path / "copy" / WEIGHTS).read_bytes() == (tmp_path / "adapter" / WEIGHTS).read_bytes()


def test_an_output_that_exists_is_kept_without_force(tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    (tmp_path / "mine.st").write_text("mine")
    before = digest(tmp_path)
    for write, name in ((write_peft, "mine"), (write_single_file, "mine.st")):
        with pytest.raises(LoratoolError, match="exists already"):
            write(adapter, tmp_path / name)
    with pytest.raises(LoratoolError, match="did not write"):
        write_peft(adapter, tmp_path / "mine", force=True)
    assert digest(tmp_path) == before
