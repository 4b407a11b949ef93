"""Every adapter that is told is catalogued, computed or not, and refused by name where its numbers are asked for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from hub_adapters import publish
from other_adapters import BY_NAME, DATA, MADE, gguf_adapter, named
from safetensors.numpy import load_file, save_file

import loratool
from loratool.cli import cli
from loratool.errors import AdapterError, LoratoolError, OutputError, PlacementError, UnsupportedError
from loratool.formats.identify import identify
from loratool.formats.kinds import KINDS, OF_PEFT

if TYPE_CHECKING:
    from hub_stand_in import HubStandIn
    from other_adapters import PeftTypes
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

NOT_COMPUTED = sorted(each for each in MADE if OF_PEFT[each].why_not)
SAVED = ("lycoris/loha.safetensors", "lycoris/lokr.safetensors", "mlx/lora", "mlx/full", "adapterhub/lora",
         "adapterhub/bottleneck", "adapterhub/union")  # fmt: skip
OTHERS = [path for path in SAVED if identify(DATA / path).why_not]
BY_INPUT, LATER, BY_BASE, BESIDE = "LILY", "POLY", "PSOFT", "PREFIX_TUNING"
"""Types of PEFT that no merge can compute."""

ROW = OF_PEFT[BY_INPUT]
COMPUTING = ("merge", "eval", "combine", "truncate", "prune", "show --spectrum", "push")


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files if file.suffix in (".safetensors", ".json", ".gguf")}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def assert_is_kept(path: Path, base: Path, folder: Path) -> None:
    """The adapter at `path` is catalogued with its facts, and every command that works on it does so."""
    told = identify(path)
    assert told.why_not is not None
    added = loratool.add(path, name="mine", tags=["kept"])
    record = added.record
    assert (record.kind, record.sha256, record.rank, record.alpha) == (told.kind, told.sha256, told.rank, told.alpha)
    assert (record.format, record.tensor_count) == (told.format, told.tensor_count)
    assert (record.base_model, record.parameter_count) == (told.base_model, told.parameter_count)
    assert tuple(record.target_modules or ()) == told.target_modules
    assert any("not computed" in note for note in added.notes)
    assert not loratool.add(path, name="mine").new
    assert [each.reference for each in loratool.list_adapters(kind=told.kind, tag="kept")] == ["mine@1"]
    assert [each.reference for each in loratool.list_adapters(kind="dylora")] == []

    shown = loratool.show("mine").to_json()
    refused = {name: outcome for name, outcome in shown["commands"].items() if outcome != "works"}
    assert set(refused) == set(COMPUTING)
    assert set(refused.values()) == {told.why_not.replace(f"'{told.files.source}'", "'mine@1'")}
    assert loratool.show(path).record.reference == "mine@1"
    with pytest.raises(UnsupportedError) as raised:
        loratool.merge("mine", into=base, out=folder / "merged")
    assert str(raised.value) == refused["merge"]
    assert not (folder / "merged").exists()

    loratool.export("mine", folder / "out")
    assert contents(folder / "out") == contents(path)
    loratool.remove("mine")
    assert loratool.list_adapters() == ()
    loratool.restore("mine")
    assert loratool.list_adapters()[0].tags == ("kept",)
    assert loratool.doctor(deep=True).findings == ()


@pytest.mark.parametrize("peft_type", NOT_COMPUTED)
def test_every_type_of_peft_is_kept_as_it_is(
    peft_type: str, saved_by_peft: PeftTypes, tiny_models: TinyModels, tmp_path: Path
) -> None:
    assert_is_kept(saved_by_peft(peft_type), tiny_models.folder("llama", "fp32"), tmp_path)


@pytest.mark.parametrize("path", OTHERS)
def test_what_other_programs_saved_is_kept_as_it_is(path: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    assert_is_kept(DATA / path, tiny_models.folder("llama", "fp32"), tmp_path)


@pytest.mark.parametrize("case", BY_NAME)
def test_what_is_told_by_its_names_alone_is_kept_as_it_is(case: str, tmp_path: Path) -> None:
    names, (form, kind, rank, alpha, _), targets = BY_NAME[case]
    file = named(names, tmp_path / "mine.safetensors")
    record = loratool.add(file).record
    assert (record.format, record.kind, record.rank, record.alpha) == (form, kind, rank, alpha)
    assert tuple(record.target_modules or ()) == targets
    loratool.export("mine", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_gguf_adapter_is_kept_as_it_is(tiny_models: TinyModels, tmp_path: Path) -> None:
    file = gguf_adapter(tmp_path / "pirate.gguf")
    assert_is_kept(file, tiny_models.folder("llama", "fp32"), tmp_path)
    loratool.export("mine", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()
    with pytest.raises(OutputError, match=r"in a \.gguf file"):
        loratool.export("mine", tmp_path / "again.safetensors")


def test_a_file_whose_name_not_every_disk_takes_is_kept_under_another(tmp_path: Path) -> None:
    file = shutil.copy(DATA / "adapterhub" / "bottleneck" / "adapter.safetensors", tmp_path / "a: b?.safetensors")
    loratool.add(file, name="mine")
    loratool.export("mine", tmp_path / "out")
    assert contents(tmp_path / "out") == {"adapter_model.safetensors": file.read_bytes()}


def test_shards_are_kept_as_the_one_file_that_they_make(saved_by_peft: PeftTypes, tmp_path: Path) -> None:
    folder = shutil.copytree(saved_by_peft(BY_INPUT), tmp_path / "sharded")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    names = sorted(tensors)
    shards = {name: f"adapter_model-{1 + place % 2:05}-of-00002.safetensors" for place, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in names if shards[name] == shard}, folder / shard)
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    record = loratool.add(folder).record
    assert record.kind == ROW.name
    loratool.export("sharded", tmp_path / "out")
    back = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in names)


# Names, bases, versions


def test_the_base_is_found_by_its_name_and_compared_by_names(
    saved_by_peft: PeftTypes, tiny_models: TinyModels, tmp_path: Path
) -> None:
    llama, gpt2 = tiny_models.folder("llama", "fp32"), tiny_models.folder("gpt2", "fp32")
    added = loratool.add(saved_by_peft(BY_INPUT), base=llama)
    assert added.record.base
    assert any("only the names of its modules were compared" in note for note in added.notes)
    recorded = loratool.add(saved_by_peft(LATER))
    assert recorded.record.base == added.record.base
    with pytest.raises(PlacementError, match=r"layers\.0\.self_attn\.q_proj.*\n?.*nearest|is it the right base"):
        loratool.add(saved_by_peft(BY_BASE), base=gpt2)
    assert {each.kind for each in loratool.list_adapters(base=llama)} == {ROW.name, OF_PEFT[LATER].name}


def test_one_that_its_names_cannot_be_compared_of_is_tied_with_a_note(tiny_models: TinyModels) -> None:
    added = loratool.add(DATA / "adapterhub" / "bottleneck", name="mine", base=tiny_models.folder("llama", "fp32"))
    assert any("was not compared" in note for note in added.notes)


def test_versions_generic_names_and_copies_are_as_for_others(saved_by_peft: PeftTypes, tmp_path: Path) -> None:
    named_folder = shutil.copytree(saved_by_peft(BY_INPUT), tmp_path / "ada-lily" / "checkpoint-500")
    assert loratool.add(named_folder).record.reference == "ada-lily@1"
    changed = shutil.copytree(named_folder, tmp_path / "later" / "ada-lily")
    tensors = load_file(changed / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, changed / "adapter_model.safetensors")
    assert loratool.add(changed).record.reference == "ada-lily@2"
    copied = loratool.add(named_folder, name="copy")
    assert any("same weights as ada-lily@1" in note for note in copied.notes)
    with pytest.raises(AdapterError, match="not a version of ada-lily@2: that one targets q_proj, this one no modules"):
        loratool.add(shutil.copytree(saved_by_peft(BESIDE), tmp_path / "other" / "ada-lily"))


def test_an_alpha_is_refused_where_nothing_is_computed(saved_by_peft: PeftTypes, hub: HubStandIn) -> None:
    with pytest.raises(AdapterError, match="leave --alpha out"):
        loratool.add(saved_by_peft(BY_INPUT), alpha=4)
    publish(hub, "ada/mine", saved_by_peft(BY_INPUT))
    with pytest.raises(AdapterError, match="leave --alpha out"):
        loratool.pull("ada/mine", alpha=4)
    assert loratool.list_adapters() == ()


# The command line


def test_list_and_show_on_the_command_line(saved_by_peft: PeftTypes, tiny_models: TinyModels) -> None:
    assert "Added mine@1" in run("add", str(saved_by_peft(BY_INPUT)), "--name", "mine")
    assert "mine" in run("list", "--kind", ROW.name)
    card = run("show", "mine")
    assert "export, tag, remove" in card
    assert "merge, eval, combine, truncate, prune, show --spectrum, push" in card
    assert "depends on each input" in card
    run("add", str(DATA / "adapterhub" / "bottleneck"))
    assert "AdapterHub" in run("show", "bottleneck")
    assert json.loads(run("show", "mine", "--json"))["commands"]["export"] == "works"
    base = str(tiny_models.folder("llama", "fp32"))
    commands = (
        ["merge", "mine", "--into", base],
        ["truncate", "mine", "--rank", "1"],
        ["prune", "mine", "--budget", "1"],
        ["combine", "mine", "mine", "--method", "cat", "--out", "x"],
        ["show", "mine", "--spectrum"],
        ["push", "mine", "me/mine", "--dry-run"],
        ["eval", base, "--adapter", "mine", "--data", "x"],
    )
    for command in commands:
        result = CliRunner().invoke(cli, command)
        assert isinstance(result.exception, UnsupportedError), (command, result.output)
        assert str(result.exception).startswith(f"'mine@1' is {ROW.title} ({BY_INPUT}): {ROW.why_not}")


def test_show_says_which_commands_work_on_one_that_is_computed(tiny_adapters: TinyAdapters) -> None:
    loratool.add(tiny_adapters.folder("llama"), name="plain")
    commands = loratool.show("plain").commands
    assert {name for name, outcome in commands.items() if outcome != "works"} == {"prune"}
    assert "no triplets" in commands["prune"]


def test_one_that_is_not_catalogued_is_shown_and_exported(saved_by_peft: PeftTypes, tmp_path: Path) -> None:
    result = loratool.show(saved_by_peft(LATER))
    assert (result.record.kind, result.record.version) == (OF_PEFT[LATER].name, 0)
    assert result.commands["export"] == "works"
    loratool.export(saved_by_peft(LATER), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(saved_by_peft(LATER))
    with pytest.raises(OutputError, match=r"adapter_config\.json"):
        loratool.export(saved_by_peft(LATER), tmp_path / "out.safetensors")


# The Hub


@pytest.mark.parametrize("of", ["a type of PEFT", "a folder of another program"])
def test_one_on_the_hub_is_pulled_and_kept_as_it_is(
    of: str, hub: HubStandIn, saved_by_peft: PeftTypes, tmp_path: Path
) -> None:
    folder = saved_by_peft(BY_INPUT) if of == "a type of PEFT" else DATA / "adapterhub" / "bottleneck"
    publish(hub, "ada/mine", folder)
    told = identify(folder)
    shown = loratool.show("ada/mine")
    assert shown.record.kind == told.kind
    assert shown.commands["merge"].startswith("'ada/mine")
    pulled = loratool.pull("ada/mine")
    assert (pulled.record.reference, pulled.record.kind, pulled.new) == ("mine@1", told.kind, True)
    assert pulled.record.sha256 == told.sha256
    assert not loratool.pull("ada/mine").new
    loratool.export("mine", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    with pytest.raises(UnsupportedError, match=re.escape(KINDS[told.kind].title)):
        loratool.truncate("ada/mine", rank=1)


def test_a_gguf_file_on_the_hub_is_pulled_by_its_path(hub: HubStandIn, tmp_path: Path) -> None:
    file = gguf_adapter(tmp_path / "pirate.gguf")
    hub.create("ada/many").put({"pirate.gguf": file.read_bytes(), "README.md": b"# Many"})
    record = loratool.pull("ada/many", path="pirate.gguf", name="pirate").record
    assert (record.format, record.sha256) == ("gguf", identify(file).sha256)


# Lost and found


def test_a_lost_catalogue_is_made_again_with_them(
    saved_by_peft: PeftTypes, home_of_its_own: Path, tmp_path: Path
) -> None:
    loratool.add(saved_by_peft(BY_INPUT), name="mine", tags=["kept"])
    loratool.add(gguf_adapter(tmp_path / "pirate.gguf"))
    before = {each.reference: loratool.show(each.reference).record for each in loratool.list_adapters()}
    for file in home_of_its_own.glob("registry.db*"):
        file.unlink()
    loratool.doctor(rebuild=True)
    after = {each.reference: loratool.show(each.reference).record for each in loratool.list_adapters()}
    assert after.keys() == before.keys() == {"mine@1", "pirate@1"}
    for name, record in after.items():
        for column in ("kind", "sha256", "format", "family", "tensor_count", "ranks", "alpha", "tags"):
            assert getattr(record, column) == getattr(before[name], column)


# What is broken


def broken(tensors: dict[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    first = next(iter(tensors))
    if how == "nan":
        return tensors | {first: np.full_like(tensors[first], np.nan)}
    if how == "empty":
        return tensors | {first: np.empty((0, *tensors[first].shape[1:]), np.float32)}
    return {"something.else.weight": np.ones((2, 2), np.float32)}


@pytest.mark.parametrize(
    ("how", "message"), [("nan", "NaN"), ("empty", "empty"), ("others", "has no tensor of that kind")]
)
@pytest.mark.parametrize("peft_type", [BY_INPUT, LATER, BESIDE])
def test_one_with_broken_content_is_refused_and_not_catalogued(
    peft_type: str, how: str, message: str, saved_by_peft: PeftTypes, home_of_its_own: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved_by_peft(peft_type), tmp_path / "broken")
    file = folder / "adapter_model.safetensors"
    save_file(broken(load_file(file), how), file)
    with pytest.raises(AdapterError, match=message):
        loratool.add(folder)
    assert loratool.list_adapters() == ()
    assert list((home_of_its_own / "store").glob("??/*")) == []


@pytest.mark.parametrize("damage", ["cut", "head", "config"])
def test_one_with_damaged_files_is_refused_and_not_catalogued(
    damage: str, saved_by_peft: PeftTypes, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved_by_peft(BY_INPUT), tmp_path / "broken")
    file = folder / "adapter_model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "head":
        (folder / "head_config.json").write_text("no JSON")
    else:
        (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(LoratoolError):
        loratool.add(folder)
    assert loratool.list_adapters() == ()


def test_words_of_a_stranger_are_kept_short_and_plain(tmp_path: Path, home_of_its_own: Path) -> None:
    folder = shutil.copytree(DATA / "adapterhub" / "bottleneck", tmp_path / "mine")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"model_type": "\x1b[31m" + "x" * 999}))
    family = loratool.add(folder).record.family
    assert family is not None
    assert len(family) <= 255
    assert family.isprintable()
