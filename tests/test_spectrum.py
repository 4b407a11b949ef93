"""`show --spectrum` and `--plot`: the numbers are numpy's, the picture and the tables say what they show."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from rich.cells import cell_len
from safetensors.torch import load_file
from tiny_adapters import save_kohya_dylora, save_plain_adapter

import loratool
from loratool.cli import main
from loratool.cli.family_tree import family_tree
from loratool.cli.rendering import percent
from loratool.cli.spectrum_view import chosen_ranks
from loratool.errors import LoratoolError
from loratool.formats.adapter import path_of
from loratool.ranks.spectrum import groups
from registry import AdapterFacts, AdapterRecord, LineageRecord, Registry, home

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters

SHAPES = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(12)
    for module, shape in {"self_attn.q_proj": (40, 30), "mlp.down_proj": (30, 50)}.items()
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What ``loratool WORDS...`` prints on stdout; it must work."""

    def call(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["loratool", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        assert not left.value.code, printed.err
        return printed.out

    return call


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A catalogued adapter of twelve layers, ``pirate``, with more ranks in one module than in the others."""
    folder = save_plain_adapter(
        tmp_path / "pirate", SHAPES | {"lm_head": (60, 30)}, r=6, alpha_pattern={"down_proj": 3}
    )
    loratool.add(folder, name="pirate")
    return folder


def dense_spectra(folder: Path, scalings: Callable[[str], float]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """The singular values of each dense update, in fp64."""
    factors = {
        name: tensor.double().numpy() for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    modules = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    return {
        module.removeprefix("base_model.model."): scalings(module)
        * np.linalg.svd(factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"], compute_uv=False)
        for module in modules
    }


def test_singular_values_are_those_of_the_scaled_dense_update(adapter: Path) -> None:
    expected = dense_spectra(adapter, lambda module: 0.5 if module.endswith("down_proj") else 2.0)
    found = loratool.spectrum("pirate").values
    assert found.keys() == expected.keys()
    for module, values in found.items():
        assert len(values) == 6
        np.testing.assert_allclose(values, expected[module][:6], rtol=1e-10)


def test_energy_is_that_of_all_modules_of_a_group_together(adapter: Path) -> None:
    expected = dense_spectra(adapter, lambda module: 0.5 if module.endswith("down_proj") else 2.0)
    result = loratool.spectrum(adapter)
    assert [(group.name, group.modules) for group in result.groups] == [
        ("q_proj", 12),
        ("down_proj", 12),
        ("lm_head", 1),
    ]
    for group in (*result.groups, result.whole):
        squares = sum(v[:6] ** 2 for m, v in expected.items() if m.endswith(group.name) or group.name == "all")
        np.testing.assert_allclose(group.energy, np.cumsum(squares) / np.sum(squares), rtol=1e-10)
        assert group.energy[-1] == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(group.values, np.sqrt(squares / group.modules), rtol=1e-10)


def test_modules_of_other_ranks_and_of_rank_0_make_one_group() -> None:
    (group,) = groups({"a.x": (3.0, 4.0), "b.x": (5.0,), "c.x": ()})
    assert group.modules == 3
    assert group.energy == (34 / 50, 1.0)
    (empty,) = groups({"a.x": ()})
    assert (empty.values, empty.energy) == ((), ())
    (zero,) = groups({"a.x": (0.0, 0.0)})
    assert zero.energy == (1.0, 1.0)


def test_the_terminal_shows_every_group_and_every_rank_in_80_columns(
    adapter: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = run("show", "pirate", "--spectrum")
    assert max(map(cell_len, printed.splitlines())) <= 80
    table = printed[printed.index("energy kept") :].splitlines()
    assert table[1].split() == ["rank", "q", "down", "lm_head", "all"]
    assert [line.split()[0] for line in table[2:8]] == ["1", "2", "3", "4", "5", "6"]
    assert table[7].split()[1:] == ["100.0%"] * 4
    whole = loratool.spectrum("pirate").whole
    assert table[4].split()[-1] == f"{whole.energy[2]:.1%}"


def test_many_groups_and_long_names_fit_in_80_columns(tmp_path: Path, run: Callable[..., str]) -> None:
    names = [f"module_with_a_very_long_name_{letter}" for letter in "abcdefghijk"]
    loratool.add(save_plain_adapter(tmp_path / "wide", {f"x.0.{name}": (40, 40) for name in names}, r=32), name="wide")
    printed = run("show", "wide", "--spectrum")
    spectrum = printed[printed.index("singular values") :]
    assert max(map(cell_len, spectrum.splitlines())) <= 80
    assert len(re.findall(r"^  rank", spectrum, re.MULTILINE)) == 2


def test_modules_with_kohyas_names_are_grouped_and_drawn_by_layer(tmp_path: Path, run: Callable[..., str]) -> None:
    modules = ["self_attn.q_proj", "self_attn.out.0"]
    shapes = {f"encoder.layers.{layer}.{module}": (20, 16) for layer in range(11) for module in modules}
    loratool.add(save_kohya_dylora(tmp_path / "flat.safetensors", shapes, r=2, alpha=1.0))
    assert loratool.show("flat").record.target_modules == ["self_attn_out_0", "self_attn_q_proj"]
    lines = run("show", "flat", "--spectrum").splitlines()
    assert any(line.split()[0] == "self_attn_q_proj" and line.endswith("11 modules") for line in lines if line.split())
    loratool.spectrum("flat", plot=tmp_path / "flat.svg")
    picture = (tmp_path / "flat.svg").read_text()
    assert all(f"<!-- {text} -->" in picture for text in ("self_attn_q_proj", "self_attn_out_0", "10"))
    assert "lora_te" not in picture


@pytest.mark.parametrize(
    ("module", "path"),
    [
        ("model.layers.0.self_attn.q_proj", ["model", "layers", "0", "self_attn", "q_proj"]),
        ("lm_head", ["lm_head"]),
        ("lora_te_layers_10_mlp_fc1", ["lora_te_layers", "10", "mlp_fc1"]),
        ("lora_unet_up_blocks_1_0_attn1_to_out_0", ["lora_unet_up_blocks", "1", "0", "attn1_to_out_0"]),
        ("lora_te2_text_projection", ["lora_te2_text_projection"]),
    ],
)
def test_a_flat_name_is_parted_at_the_numbers_inside_it(module: str, path: list[str]) -> None:
    assert list(path_of(module)) == path


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0.0%"), (0.5, "50.0%"), (1.0, "100.0%"), (0.001, "0.1%"), (1e-9, "<0.1%")]
)
def test_what_is_lost_is_called_nothing_only_where_it_is(share: float, text: str) -> None:
    assert percent(share, 1) == text


def test_of_many_ranks_the_telling_ones_are_shown() -> None:
    assert chosen_ranks(4) == [1, 2, 3, 4]
    assert chosen_ranks(16) == list(range(1, 17))
    assert chosen_ranks(64) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert chosen_ranks(100)[-3:] == [64, 96, 100]
    for most in range(17, 300):
        assert chosen_ranks(most) == sorted(set(chosen_ranks(most)))
        assert chosen_ranks(most)[-1] == most


def test_json_has_every_number(adapter: Path, run: Callable[..., str]) -> None:
    found = json.loads(run("show", "pirate", "--spectrum", "--json"))
    result = loratool.spectrum("pirate")
    assert found["spectrum"] == {module: list(values) for module, values in result.values.items()}
    assert found["energy"]["all"] == list(result.whole.energy)
    assert found["name"] == "pirate"
    assert "spectrum" not in json.loads(run("show", "pirate", "--json"))


def test_factors_with_nan_are_refused(tmp_path: Path, tiny_adapters: TinyAdapters) -> None:
    from safetensors.torch import save_file
    from tiny_adapters import copy_with

    copy = copy_with(tiny_adapters.folder("llama"), tmp_path / "copy")
    factors = load_file(copy / "adapter_model.safetensors")
    next(iter(factors.values()))[0, 0] = float("nan")
    save_file(factors, copy / "adapter_model.safetensors")
    with pytest.raises(LoratoolError, match="NaN"):
        loratool.spectrum(copy)


# The picture


def words_of(picture: Path) -> list[str]:
    """What a picture says: matplotlib draws letters as curves, and says which."""
    return re.findall("<!-- (.*?) -->", picture.read_text())


def test_the_picture_names_modules_and_layers_and_the_rank_that_each_needs(adapter: Path, tmp_path: Path) -> None:
    result = loratool.spectrum("pirate", plot=tmp_path / "pirate.svg")
    assert result.plot == tmp_path / "pirate.svg"
    words = words_of(result.plot)
    assert {"pirate", "q_proj", "down_proj", "lm_head", "0", "11", "other", "layer"} <= set(words)
    assert "rank that keeps 90% of the energy (of 6)" in words
    assert "norm of the update (Frobenius)" in words
    needed = [
        next(rank for rank in range(1, 7) if sum(v**2 for v in values[:rank]) >= 0.9 * sum(v**2 for v in values))
        for values in result.values.values()
    ]
    labels = [word for word in words if word.isdecimal()]
    assert sum(labels.count(str(rank)) for rank in set(needed)) >= len(needed)


def test_where_ranks_differ_the_picture_shows_them(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    folder = tiny_adapters.folder("llama", r=3, rank_pattern={"q_proj": 7})
    words = words_of(loratool.spectrum(folder, plot=tmp_path / "x.svg").plot or tmp_path)
    assert "rank" in words
    assert words.count("7") >= 2


def test_stacks_of_layers_with_equal_names_have_rows_of_their_own(tmp_path: Path) -> None:
    shapes = {f"{stack}.block.{layer}.q": (20, 20) for stack in ("encoder", "decoder") for layer in range(2)}
    folder = save_plain_adapter(tmp_path / "t5", shapes)
    words = words_of(loratool.spectrum(folder, plot=tmp_path / "x.svg").plot or tmp_path)
    assert {"encoder.block.q", "decoder.block.q"} <= set(words)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_adapter_gives_the_same_picture(suffix: str, adapter: Path, tmp_path: Path) -> None:
    first, second = (tmp_path / f"{name}{suffix}" for name in ("one", "two"))
    loratool.spectrum("pirate", plot=first)
    loratool.spectrum("pirate", plot=second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])


def test_a_name_is_no_formula_and_drives_nothing(tmp_path: Path) -> None:
    folder = save_plain_adapter(tmp_path / "$\\frac$ \x1b[31m 数", {"x.0.$a_b$": (8, 8)}, target_modules=["$a_b$"])
    result = loratool.spectrum(folder, plot=tmp_path / "x.svg")
    assert "$a_b$" in words_of(result.plot or tmp_path)


def test_a_picture_is_replaced_only_with_force(adapter: Path, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    loratool.spectrum("pirate", plot=picture)
    before = picture.stat().st_ino
    with pytest.raises(LoratoolError, match=r"exists already; choose another --plot, or give --force"):
        loratool.spectrum("pirate", plot=picture)
    assert picture.stat().st_ino == before
    loratool.spectrum("pirate", plot=picture, force=True)
    assert picture.stat().st_ino != before


def test_a_file_that_is_no_picture_is_refused(adapter: Path, tmp_path: Path) -> None:
    for name in ("x.gif", "x", "x.exe"):
        with pytest.raises(LoratoolError, match="is not a name for a picture"):
            loratool.spectrum("pirate", plot=tmp_path / name)


def test_without_matplotlib_the_extra_to_install_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LoratoolError, match=re.escape("pip install 'loratool[plot]'")):
        loratool.spectrum("pirate", plot="x.png")
    assert loratool.spectrum("pirate").values


# The family tree


def born(
    catalogue: Registry, name: str, *parents: AdapterRecord | str, operation: str = "combine", **details: object
) -> AdapterRecord:
    facts = AdapterFacts(kind="lora", sha256=f"{abs(hash(name)):064x}"[-64:], size_bytes=1)
    record, _ = catalogue.adapters.add(name, facts)
    for parent in parents:
        catalogue.lineage.record(record, parent, operation, details=details)
    return record


def tree_of(record: AdapterRecord, width: int = 200) -> list[str]:
    result = loratool.show(record.reference)
    return family_tree(result.record, (*result.ancestors, *result.descendants), width).splitlines()


def test_the_tree_goes_from_the_first_ancestors_to_the_last_children() -> None:
    with Registry.open(home()) as catalogue:
        first = born(catalogue, "first")
        cut = born(catalogue, "cut", first, operation="truncate", rank=4, lost=0.25)
        both = born(catalogue, "both", cut, "tuned", method="svd", rank=2, energy=0.9)
        born(catalogue, "small", both, operation="truncate", rank=1)
        born(catalogue, "other", both, operation="prune")
        born(catalogue, "cousin", first, operation="truncate", rank=2)
    assert tree_of(both) == [
        "first@1",
        "└─ cut@1  truncate, rank 4, lost 25.0%",
        "   └─ both@1 (this)  combine svd, rank 2, energy 0.9, with tuned",
        "      ├─ small@1  truncate, rank 1",
        "      └─ other@1  prune",
    ]
    assert tree_of(first)[0] == "first@1 (this)"
    assert len(tree_of(first)) == 6


def test_what_came_from_two_branches_is_drawn_once() -> None:
    with Registry.open(home()) as catalogue:
        left, right = born(catalogue, "left"), born(catalogue, "right")
        left_cut = born(catalogue, "left-cut", left, operation="truncate")
        right_cut = born(catalogue, "right-cut", right, operation="truncate")
        both = born(catalogue, "both", left_cut, right_cut)
        born(catalogue, "below", both)
    assert tree_of(both) == [
        "left@1",
        "└─ left-cut@1  truncate",
        "   └─ both@1 (this)  combine, with right-cut@1",
        "      └─ below@1  combine",
        "right@1",
        "└─ right-cut@1  truncate",
        "   └─ both@1 (this)  (above)",
    ]


def test_weights_and_figures_of_a_result_stand_in_the_tree(tmp_path: Path) -> None:
    adapters = [save_plain_adapter(tmp_path / name, SHAPES, seed=seed) for seed, name in enumerate(("one", "two"))]
    for adapter in adapters:
        loratool.add(adapter)
    loratool.combine([("one", 0.5), ("two", -1.0)], "ties", density=0.5, out=tmp_path / "both.st")
    loratool.truncate("both", rank=2, scaling="kohya", out=tmp_path / "cut.st")
    assert tree_of(loratool.show("both").record)[:3] == [
        "one@1",
        "└─ both@1 (this)  combine ties, weight 0.5, density 0.5, with -1 x two@1",
        "   └─ cut@1  truncate leading, rank 2, scaling kohya",
    ]


def test_an_adapter_alone_has_no_tree(adapter: Path, run: Callable[..., str]) -> None:
    assert tree_of(loratool.show("pirate").record) == []
    assert "family" not in run("show", "pirate")


def test_a_deep_family_is_drawn_in_part() -> None:
    with Registry.open(home()) as catalogue:
        record = born(catalogue, "g0")
    edge = LineageRecord(
        child_id=0,
        child="",
        parent_id=0,
        parent="",
        parent_sha256=None,
        operation="truncate",
        details=None,
        created_at=record.created_at,
    )
    chain = [
        replace(edge, parent_id=record.id + n, parent=f"g{n}@1", child_id=record.id + n + 1, child=f"g{n + 1}@1")
        for n in range(5000)
    ]
    lines = family_tree(record, chain, 64).splitlines()
    assert lines[:2] == ["g0@1 (this)", "└─ g1@1  truncate"]
    assert lines[-1] == "and 4,961 more"
    assert len(lines) == 41
    assert max(map(len, lines)) <= 64
    assert lines[39].startswith("⋯ ") and lines[39].endswith("└─ g39@1  truncate")


def test_the_branches_of_a_tree_stay_whole_where_its_lines_are_wrapped() -> None:
    with Registry.open(home()) as catalogue:
        first = born(catalogue, "first")
        both = born(catalogue, "both", first, "a-tuned-adapter-of-another", method="svd", rank=2, energy=0.9)
        born(catalogue, "small", both, operation="truncate", rank=1, energy=0.75)
        born(catalogue, "wide", first, both, operation="combine", method="cat")
    assert tree_of(both, 36) == [
        "first@1",
        "└─ both@1 (this)  combine svd, rank",
        "   │  2, energy 0.9, with",
        "   │  a-tuned-adapter-of-another",
        "   ├─ small@1  truncate, rank 1,",
        "   │     energy 0.75",
        "   └─ wide@1  combine cat",
    ]


def test_show_draws_the_tree(adapter: Path, run: Callable[..., str], tmp_path: Path) -> None:
    loratool.combine([("pirate", 2.0)], "cat", out=tmp_path / "twice.st")
    assert "└─ twice@1 (this)  combine cat" in run("show", "twice")
    assert "└─ twice@1  combine cat" in run("show", "pirate")
