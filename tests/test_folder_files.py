"""What of a base's folder comes into a model that is made of it, what goes to the Hub, and what may be edited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from tiny_models import digest, load

import loratool
from loratool.checkpoint.file_role import NAMES, FileRole, role_of
from loratool.checkpoint.links import leads_outside
from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, OutputError, VerificationError

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

COMMIT, HASH = "ab" * 20, "cd" * 32


@pytest.fixture
def base(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")


@pytest.fixture
def adapter(tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_adapters.folder("llama"), tmp_path / "adapter")


def logits(folder: Path) -> torch.Tensor:
    return load(folder, "llama")(torch.arange(8)[None]).logits


# Roles.

ROLES = {
    FileRole.OWN: ("loratool.json", "loratool-undo/0123456789ab/undo.st"),
    FileRole.ADAPTER: ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    FileRole.TRAINED_BESIDE: (
        "head_config.json", "non_lora_trainables.bin", "non_lora_state_dict.bin", "trainable_params.bin",
        "new_embeddings.safetensors", "mm_projector.bin", "pytorch_model_head.bin", "value_head.safetensors",
        "2_Dense/model.safetensors", "learned_embeds.safetensors", "style_emb.safetensors", "vit.safetensors",
    ),
    FileRole.TRAINING_STATE: (
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "trainer_state.json",
        "global_step10/mp_rank_00_model_states.pt", "checkpoint-10/optimizer.pt", "zero_to_fp32.py", "scaler.pt",
    ),
    FileRole.MODEL_WEIGHTS: (
        "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
        "unet/diffusion_pytorch_model.safetensors", "consolidated.00.pth", "model.fp16.safetensors",
    ),
    FileRole.CONVERTED: ("model-Q4_K_M.gguf", "onnx/model.onnx", "pytorch_lora_weights.safetensors"),
    FileRole.OTHER_WEIGHTS: ("extra.bin", "Voice.PT"),
    FileRole.CONFIGURATION: (
        "config.json", "model_index.json", "preprocessor_config.json", "unet/config.json", "scheduler/scheduler_config.json",
        "1_Pooling/config.json",
    ),
    FileRole.TOKENIZER: (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "merges.txt",
        "tokenizer.model", "spiece.model", "tokenizer_2/vocab.json", "qwen.tiktoken", "tekken.json", "tokenizer.model.v3",
    ),
    FileRole.CHAT_TEMPLATE: ("chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja"),
    FileRole.CODE: ("modeling_own.py", "own/tokenization_own.py"),
    FileRole.EDITABLE: ("README.md", "LICENSE", "generation_config.json", "notes.txt", "images/a.png", ".gitattributes"),
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_a_file_is_known_by_its_name(role: FileRole) -> None:
    assert {name: role_of(name) for name in ROLES[role]} == dict.fromkeys(ROLES[role], role)


def test_every_row_of_the_table_decides_some_name() -> None:
    assert {role for role, _ in NAMES} <= ROLES.keys()


def test_what_transformers_and_peft_save_is_known(tiny_models: TinyModels, adapter: Path) -> None:
    saved = {path.name for folder in (tiny_models.folder("llama"), adapter) for path in folder.iterdir()}
    assert not {name for name in saved if role_of(name) is FileRole.OTHER_WEIGHTS}
    assert {name for name in saved if role_of(name) is FileRole.ADAPTER} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


# An adapter in the base's folder.


@pytest.fixture
def with_adapter(base: Path, adapter: Path, tiny_models: TinyModels) -> Path:
    """A base in whose folder somebody trained: its adapter lies there, and names another base."""
    for file in adapter.iterdir():
        if file.name != "README.md":
            shutil.copyfile(file, base / file.name)
    config = json.loads((base / "adapter_config.json").read_text())
    elsewhere = str(tiny_models.folder("llama", "fp32"))
    (base / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": elsewhere}))
    return base


MAKE: dict[str, Callable[..., Path]] = {
    "merge": lambda base, adapter, out: loratool.merge([adapter], into=base, out=out).out,
    "merge, quantized": lambda base, adapter, out: loratool.merge([adapter], into=base, out=out, quantize="nf4").out,
    "quantize": lambda base, adapter, out: loratool.quantize(base, out=out).out,
}


@pytest.mark.parametrize("how", MAKE)
def test_a_model_made_of_the_base_does_not_inherit_the_adapter(
    how: str, with_adapter: Path, adapter: Path, tmp_path: Path
) -> None:
    out = MAKE[how](with_adapter, adapter, tmp_path / "out")
    assert not list(out.glob("adapter_*"))
    assert not [name for name in json.loads((out / "loratool.json").read_text())["files"] if "adapter_" in name]


def test_transformers_loads_what_was_merged(
    with_adapter: Path, adapter: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    result = loratool.merge([adapter], into=with_adapter, out=tmp_path / "out")
    assert any("'adapter_config.json' and 1 more of an adapter" in note for note in result.notes)
    plain = loratool.merge([adapter], into=tiny_models.folder("llama", "bf16"), out=tmp_path / "plain").out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(result.out, dtype="auto", local_files_only=True)
    assert torch.equal(loaded(torch.arange(8)[None]).logits, logits(plain))


def test_the_base_comes_back_without_the_adapter_too(with_adapter: Path, adapter: Path, tmp_path: Path) -> None:
    for number, options in enumerate(({"undo": True}, {"quantize": "nf4"})):
        merged = loratool.merge([adapter], into=with_adapter, out=tmp_path / f"out-{number}", **options).out
        back = loratool.unmerge(merged, out=tmp_path / f"back-{number}").out
        expected = {name: value for name, value in digest(with_adapter).items() if not name.startswith("adapter_")}
        assert digest(back) == expected


def test_such_a_base_is_not_changed_in_place(with_adapter: Path, adapter: Path) -> None:
    before = digest(with_adapter)
    with pytest.raises(OutputError, match=r"also holds 'adapter_config.json'.*--out"):
        loratool.merge([adapter], into=with_adapter, in_place=True)
    assert digest(with_adapter) == before


def test_an_adapters_file_is_not_taken_for_a_models_weights(base: Path, adapter: Path) -> None:
    shutil.copyfile(adapter / "adapter_model.safetensors", base / "adapter_model.safetensors")
    (base / "model.safetensors").rename(base / "weights.safetensors")
    assert "model.norm.weight" in Checkpoint.open(base).tensors
    (base / "weights.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        loratool.merge([adapter], into=base)


# Links.


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "home" / "secret"
    file.parent.mkdir()
    file.write_text("s3cret")
    return file


def holds_secret(folder: Path) -> bool:
    return any(b"s3cret" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("how", MAKE)
@pytest.mark.parametrize("name", ["notes.txt", "deep/er/notes", "README.md", "optimizer.pt"])
def test_what_a_link_out_of_the_folder_leads_to_is_not_copied(
    how: str, name: str, base: Path, adapter: Path, secret: Path, tmp_path: Path
) -> None:
    (base / name).parent.mkdir(parents=True, exist_ok=True)
    (base / name).symlink_to(secret)
    out = MAKE[how](base, adapter, tmp_path / "out")
    assert not holds_secret(out) and not (out / name).exists()


def test_that_is_said(base: Path, adapter: Path, secret: Path, tmp_path: Path) -> None:
    (base / "notes.txt").symlink_to(secret)
    notes = loratool.merge([adapter], into=base, out=tmp_path / "out").notes
    assert any("'notes.txt': left out, as a link that leads out of the base's folder" in note for note in notes)
    merged = shutil.copytree(tmp_path / "out", tmp_path / "copy")
    (merged / "notes.txt").symlink_to(secret)
    back = loratool.unmerge(merged, out=tmp_path / "back")
    assert any("'notes.txt': left out" in note for note in back.notes) and not holds_secret(back.out)


@pytest.mark.parametrize("how", MAKE)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "modeling_own.py", "preprocessor_config.json"]
)
def test_a_link_for_what_the_model_needs_is_refused(
    how: str, name: str, base: Path, adapter: Path, secret: Path, tmp_path: Path
) -> None:
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match="leads out of the model's folder"):
        MAKE[how](base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_inside_the_folder_is_followed(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "real.txt").write_text("mine")
    (base / "linked.txt").symlink_to("real.txt")
    out = loratool.merge([adapter], into=base, out=tmp_path / "out").out
    assert (out / "linked.txt").read_text() == "mine"


def in_cache(root: Path, commit: str = COMMIT, blob: str = HASH) -> Path:
    """A file of a snapshot in huggingface_hub's cache, a link to its blob."""
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / blob).write_text("content")
    file = root / "snapshots" / commit / "unet" / "config.json"
    file.parent.mkdir(parents=True)
    file.symlink_to(Path("../../../blobs") / blob)
    return file


def test_links_of_the_hubs_cache_are_known_by_their_shape(tmp_path: Path) -> None:
    for number, folder_of in enumerate((lambda file: file.parents[1], lambda file: file.parent)):
        file = in_cache(tmp_path / str(number) / "models--a--b", blob=HASH if number else "ef" * 20)
        assert not leads_outside(file, folder_of(file))
    (tmp_path / "linked").symlink_to(tmp_path / "1")
    file = tmp_path / "linked" / "models--a--b" / "snapshots" / COMMIT / "unet" / "config.json"
    assert not leads_outside(file, file.parents[1])


def test_what_only_looks_like_one_leads_outside(tmp_path: Path, secret: Path) -> None:
    for commit, blob in (("main", HASH), (COMMIT, "secret"), (COMMIT[:-1], HASH)):
        file = in_cache(tmp_path / f"{commit}-{blob}", commit, blob)
        assert leads_outside(file, file.parents[1])
    file = in_cache(tmp_path / "a blob that is a link")
    (tmp_path / "a blob that is a link" / "blobs" / HASH).unlink()
    (tmp_path / "a blob that is a link" / "blobs" / HASH).symlink_to(secret)
    assert leads_outside(file, file.parents[1])
    other = in_cache(tmp_path / "models--other")
    file = in_cache(tmp_path / "models--mine")
    file.unlink()
    file.symlink_to(other.resolve())
    assert leads_outside(file, file.parents[1])


# What a user may edit.


def test_verify_tells_what_is_edited_from_what_decides(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("README.md", "chat_template.jinja", "LICENSE"):
        (base / name).write_text("of the base")
    merged = loratool.merge([adapter], into=base, out=tmp_path / "out").out
    (merged / "README.md").write_text("of mine")
    (merged / "generation_config.json").write_text("{}")
    (merged / "chat_template.jinja").write_text("{{ mine }}")
    (merged / "LICENSE").unlink()
    (merged / "notes.txt").write_text("mine")
    result = loratool.verify(merged)
    assert result.edited == ("LICENSE", "README.md", "chat_template.jinja", "generation_config.json")
    assert (result.added, result.replayed) == (("notes.txt",), "base")
    assert {"edited", "added"} <= result.to_json().keys()
    assert result.files == len(json.loads((merged / "loratool.json").read_text())["files"]) - 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_what_decides_is_an_error(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = loratool.merge([adapter], into=base, out=tmp_path / "out").out
    content = (merged / name).read_text()
    (merged / name).write_text(content + " ")
    with pytest.raises(VerificationError, match=name):
        loratool.verify(merged)
    (merged / name).write_text(content)
    (merged / "adapter_config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"adapter_config\.json"):
        loratool.verify(merged)
