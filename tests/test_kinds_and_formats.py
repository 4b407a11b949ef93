"""Every adapter is told what it is, whether loratool computes it or not: its kind, format, ranks, alpha, targets and base.

The files are what the programs themselves save: PEFT and gguf here, the others under ``tests/data/adapters`` (see ``make.py``
there); and for programs that no longer run, names as their sources write them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_adapters import BY_NAME, DATA, MADE, gguf_adapter, named
from safetensors.numpy import save_file
from tiny_adapters import copy_with, save_kohya_dylora, save_peft_adapter, save_single_file
from tiny_models import load

from loratool.checkpoint.gguf import TYPES, read_gguf_header
from loratool.errors import AdapterError, CheckpointError, LoratoolError, UnsupportedError
from loratool.formats.builders import BUILDERS
from loratool.formats.identify import Identity, identify
from loratool.formats.kinds import KINDS, OF_PEFT
from loratool.formats.read import read_adapter
from loratool.formats.table import FORMATS

if TYPE_CHECKING:
    from tiny_models import TinyModels

# PEFT's types

RANKS = {"LORA": 3, "LOHA": 3, "LOKR": 2, "ADALORA": 6, "HRA": 8, "DELORA": 8, "HIRA": 32, "TINYLORA": 2, "VBLORA": 2}
COMPUTED = {kind.peft_type for kind in KINDS.values() if kind.why_not is None}
ALPHAS = {"LORA": 5, "LOHA": 5, "LOKR": 5, "ADALORA": 8}


def test_every_type_of_peft_has_a_row() -> None:
    assert {each.value for each in peft.PeftType} == set(OF_PEFT)


@pytest.mark.parametrize("peft_type", MADE)
def test_an_adapter_of_every_type_of_peft_is_told(peft_type: str, saved_by_peft: Callable[[str], Path]) -> None:
    folder = saved_by_peft(peft_type)
    found = identify(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (found.kind, found.format) == (OF_PEFT[peft_type].name, "peft")
    assert found.alpha == ALPHAS.get(peft_type, found.alpha)
    assert found.rank == RANKS.get(peft_type, found.rank)
    assert found.base_model == config["base_model_name_or_path"]
    assert found.tensor_count > 0
    targets = config.get("target_modules")
    if isinstance(targets, list) and peft_type != "UNILORA":  # whose modules share one vector
        assert set(found.target_modules) >= set(targets)
    assert (found.why_not is None) == (peft_type in COMPUTED)


@pytest.mark.parametrize("peft_type", sorted(set(MADE) - COMPUTED))
def test_what_is_not_computed_is_refused_by_name_with_a_way_out(
    peft_type: str, saved_by_peft: Callable[[str], Path]
) -> None:
    folder = saved_by_peft(peft_type)
    with pytest.raises(UnsupportedError, match=re.escape(OF_PEFT[peft_type].title)) as raised:
        read_adapter(folder)
    assert ";" in str(raised.value)
    assert str(raised.value) == identify(folder).why_not


@pytest.mark.parametrize("peft_type", sorted(set(MADE) - {"LN_TUNING", "TRAINABLE_TOKENS"}))
def test_the_tensors_tell_where_the_configuration_names_no_type(
    peft_type: str, saved_by_peft: Callable[[str], Path], tmp_path: Path
) -> None:
    silent = copy_with(saved_by_peft(peft_type), tmp_path / "silent", peft_type=None)
    told = KINDS[identify(silent).kind]
    assert told.parts == OF_PEFT[peft_type].parts or told.name == "prompt_tuning"


def test_a_type_of_tomorrow_is_told_by_its_own_word(saved_by_peft: Callable[[str], Path], tmp_path: Path) -> None:
    strange = copy_with(saved_by_peft("LORA"), tmp_path / "strange", peft_type="SUPER-LoRA\x1b[31m 2")
    assert identify(strange).kind == "super_lora_31m_2"
    with pytest.raises(UnsupportedError, match=r"SUPER-LoRA\?\[31m 2"):
        read_adapter(strange)


@pytest.mark.parametrize(("says", "holds"), [("IA3", "LORA"), ("LOHA", "LOKR"), ("ADALORA", "LORA"), ("LORA", "VERA")])
def test_a_type_that_the_tensors_contradict_is_refused_with_both(
    says: str, holds: str, saved_by_peft: Callable[[str], Path], tmp_path: Path
) -> None:
    false = copy_with(saved_by_peft(holds), tmp_path / "false", peft_type=says)
    with pytest.raises(AdapterError, match=f"says {OF_PEFT[says].title} .* tensors are {OF_PEFT[holds].title}"):
        identify(false)


def test_every_kind_has_a_builder_or_says_why_it_has_none() -> None:
    assert set(BUILDERS) == {name for name, kind in KINDS.items() if kind.why_not is None}


VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "aLoRA": ("llama", {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, "alora"),
    "KaSA": ("llama", {"kasa_config": peft.tuners.lora.KasaConfig()}, "kasa"),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_a_variant_of_lora_is_told_with_its_rank_alpha_and_targets(
    case: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    architecture, options, kind = VARIANTS[case]
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options))
    base = tiny_models.folder(architecture, "fp32")
    found = identify(save_peft_adapter(load(base, architecture), config, tmp_path / "adapter"))
    assert (found.kind, found.rank, found.alpha, found.adapter) == (kind, 4, 8.0, None)
    assert found.why_not
    assert set(found.target_modules) >= set(options.get("target_modules") or ())


# Other programs


def kind_and_all(found: Identity) -> tuple[Any, ...]:
    return found.format, found.kind, found.rank, found.alpha, found.base_model


OTHERS: dict[str, tuple[Any, ...]] = {
    "lycoris/dora.safetensors": ("lycoris", "dora", 2, 1.0, None),
    "lycoris/full.safetensors": ("lycoris", "full", None, None, None),
    "lycoris/ia3.safetensors": ("lycoris", "ia3", None, None, None),
    "lycoris/oft.safetensors": ("lycoris", "oft", None, None, None),
    "lycoris/boft.safetensors": ("lycoris", "boft", None, None, None),
    "lycoris/glora.safetensors": ("lycoris", "glora", 2, 1.0, None),
    "mlx/lora": ("mlx", "lora", 2, None, "mlx-community/tiny-llama"),
    "mlx/dora": ("mlx", "dora", 2, None, "mlx-community/tiny-llama"),
    "mlx/full": ("mlx", "full", None, None, "mlx-community/tiny-llama"),
    "adapterhub/lora": ("adapterhub", "lora", 2, 4.0, "bert-base-uncased"),
    "adapterhub/dora": ("adapterhub", "dora", 2, 4.0, "bert-base-uncased"),
    "adapterhub/ia3": ("adapterhub", "ia3", None, None, "bert-base-uncased"),
    "adapterhub/bottleneck": ("adapterhub", "bottleneck", None, None, "bert-base-uncased"),
    "adapterhub/prompt_tuning": ("adapterhub", "prompt_tuning", None, None, "bert-base-uncased"),
    "adapterhub/union": ("adapterhub", "mixed", 2, None, "bert-base-uncased"),
}


@pytest.mark.parametrize("path", OTHERS)
def test_what_another_program_saved_is_told(path: str) -> None:
    found = identify(DATA / path)
    assert kind_and_all(found) == OTHERS[path]
    assert found.adapter is None
    with pytest.raises(UnsupportedError, match="format") as raised:
        read_adapter(DATA / path)
    assert str(raised.value) == found.why_not


@pytest.mark.parametrize(("name", "rank", "alpha"), [("loha", 2, 1.0), ("lokr", 3, 3.0)])
def test_a_kind_whose_tensors_lycoris_names_as_peft_does_is_read(name: str, rank: int, alpha: float) -> None:
    found = identify(DATA / "lycoris" / f"{name}.safetensors")
    assert kind_and_all(found) == ("lycoris", name, rank, alpha, None)
    assert found.adapter is not None
    assert found.modules == ("lycoris_block_conv", "lycoris_block_q_proj")


def test_convolutions_of_plain_layers_are_read() -> None:
    found = identify(DATA / "lycoris" / "locon.safetensors")
    assert kind_and_all(found) == ("lycoris", "lora", 2, 1.0, None)
    assert found.adapter is not None
    assert found.modules == ("lycoris_block_conv", "lycoris_block_q_proj")
    shapes = {name: update.shape for name, update in found.adapter.changes.items()}
    assert shapes == {"lycoris_block_conv.weight": (4, 4, 3, 3), "lycoris_block_q_proj.weight": (4, 6)}


def test_diffusers_own_file_is_read_with_the_alphas_of_its_metadata() -> None:
    adapter = read_adapter(DATA / "diffusers" / "unet")
    scalings = {module.rpartition("attn1.")[2]: update.scaling for module, update in adapter.ranked.items()}
    assert scalings == {"to_q": 4 / 2, "to_out.0": 6 / 2}
    assert identify(DATA / "diffusers" / "unet").format == "diffusers"


def test_a_pipelines_file_of_diffusers_has_the_alphas_of_each_component() -> None:
    adapter = read_adapter(DATA / "diffusers" / "pipeline" / "pytorch_lora_weights.safetensors")
    scalings = {
        module.partition(".")[0]: update.scaling for module, update in adapter.ranked.items() if "to_out" not in module
    }
    assert scalings == {"unet": 4 / 2, "text_encoder": 3 / 1}


@pytest.mark.parametrize("case", BY_NAME)
def test_names_and_shapes_alone_tell_a_file(case: str, tmp_path: Path) -> None:
    names, facts, targets = BY_NAME[case]
    found = identify(named(names, tmp_path / "adapter.safetensors"))
    assert kind_and_all(found) == facts
    assert found.target_modules == targets
    assert found.adapter is None
    with pytest.raises(UnsupportedError, match=";"):
        read_adapter(tmp_path / "adapter.safetensors")


READ: dict[str, tuple[dict[str, tuple[int, ...]], str, float]] = {
    "kohya": (
        {"lora_te_x_q.lora_down.weight": (2, 6), "lora_te_x_q.lora_up.weight": (4, 2), "lora_te_x_q.alpha": ()}, "kohya", 0.5
    ),
    "OneTrainer": (
        {"lora_transformer_x_q.lora_down.weight": (2, 6), "lora_transformer_x_q.lora_up.weight": (4, 2),
         "lora_transformer_x_q.alpha": ()}, "onetrainer", 0.5
    ),
    "ComfyUI, lora_A": (
        {"diffusion_model.x.q.lora_A.weight": (2, 6), "diffusion_model.x.q.lora_B.weight": (4, 2)}, "comfyui", 1.0
    ),
    "ComfyUI, lora_down": (
        {"diffusion_model.x.q.lora_down.weight": (2, 6), "diffusion_model.x.q.lora_up.weight": (4, 2),
         "diffusion_model.x.q.alpha": ()}, "comfyui", 0.5
    ),
    "diffusers without metadata": (
        {"transformer.x.to_q.lora_A.weight": (2, 6), "transformer.x.to_q.lora_B.weight": (4, 2)}, "diffusers", 1.0
    ),
    "kohya's letters under dotted names": (
        {"clip_l.x.q.lora_down.weight": (2, 6), "clip_l.x.q.lora_up.weight": (4, 2), "clip_l.x.q.alpha": ()}, "dotted", 0.5
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_a_plain_lora_is_read_whatever_its_letters_are(case: str, tmp_path: Path) -> None:
    names, word, scaling = READ[case]
    found = identify(named(names, tmp_path / "adapter.safetensors"))
    assert (found.format, found.kind, found.rank, found.scaling) == (word, "lora", 2, scaling)
    assert found.adapter is not None
    assert [info.name for info in found.adapter.tensors] == [name for name in names if not name.endswith("alpha")]


def test_a_gpt2_is_not_taken_for_a_diffusion_transformer(tmp_path: Path) -> None:
    names = {"transformer.h.0.attn.c_attn.lora_A.weight": (2, 6), "transformer.h.0.attn.c_attn.lora_B.weight": (4, 2)}
    assert identify(named(names, tmp_path / "adapter.safetensors"), 2).format == "peft"
    with pytest.raises(AdapterError, match="--alpha"):
        identify(tmp_path / "adapter.safetensors")


# GGUF, against the gguf package


def test_a_gguf_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    ours = read_gguf_header(gguf_adapter(tmp_path / "adapter.gguf"))
    theirs = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert {name: (info.start, info.nbytes, info.dtype) for name, info in ours.tensors.items()} == {
        tensor.name: (tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name) for tensor in theirs.tensors
    }
    assert {name: info.shape for name, info in ours.tensors.items()} == {
        tensor.name: tuple(int(side) for side in reversed(tensor.shape)) for tensor in theirs.tensors
    }
    assert {name: ours.metadata[name] for name in ("general.architecture", "adapter.lora.alpha")} == {
        "general.architecture": "llama",
        "adapter.lora.alpha": 8.0,
    }


def test_the_types_of_gguf_are_the_packages_own() -> None:
    theirs = {each.value: (each.name, *gguf.constants.GGML_QUANT_SIZES[each]) for each in gguf.GGMLQuantizationType}
    assert dict(TYPES) == theirs


def test_a_gguf_adapter_is_told(tmp_path: Path) -> None:
    found = identify(gguf_adapter(tmp_path / "adapter.gguf"))
    assert kind_and_all(found) == ("gguf", "lora", 4, 8.0, "ada/llama")
    assert (found.family, found.target_modules, set(found.ranks.values())) == (
        "llama",
        ("attn_k", "attn_q", "token_embd"),
        {4},
    )
    assert identify(gguf_adapter(tmp_path / "silent.gguf", alpha=0.0)).scaling == 1.0
    gguf_adapter(tmp_path / "disguised.safetensors")
    assert identify(tmp_path / "disguised.safetensors").format == "gguf"


def test_a_gguf_model_is_no_adapter(tmp_path: Path) -> None:
    model = gguf_adapter(tmp_path / "model.gguf", general_type="model")
    with pytest.raises(AdapterError, match="is a GGUF model, not an adapter"):
        identify(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return gguf_adapter(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_gguf_file_is_a_clear_error(whole: bytes, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, min(len(content), 12_000) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    try:
        read_gguf_header(file)
    except CheckpointError as error:
        assert len(str(error)) < 700
        assert str(error).isprintable()


HUGE = (1 << 62).to_bytes(8, "little")
LYING: dict[str, bytes] = {
    "tensors": b"GGUF\x03\0\0\0" + HUGE + bytes(8),
    "pairs": b"GGUF\x03\0\0\0" + bytes(8) + HUGE,
    "a key": b"GGUF\x03\0\0\0" + bytes(8) + (1).to_bytes(8, "little") + HUGE,
    "an array": b"GGUF\x03\0\0\0" + bytes(8) + (1).to_bytes(8, "little") + (1).to_bytes(8, "little") + b"k"
    + (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + HUGE,
    "another version": b"GGUF\0\0\0\x03" + bytes(16),
}  # fmt: skip


@pytest.mark.parametrize("what", LYING)
def test_a_gguf_file_that_claims_more_than_it_has_is_refused_at_once(what: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(LYING[what] + bytes(100))
    with pytest.raises(CheckpointError, match=r"'.*x\.gguf' is not a valid GGUF file"):
        read_gguf_header(tmp_path / "x.gguf")


# One format a file


def test_a_file_of_two_formats_is_refused_with_both(tmp_path: Path) -> None:
    names = READ["kohya"][0] | BY_NAME["XLabs"][0]
    with pytest.raises(AdapterError, match=r"mixes two formats.*XLabs.*kohya"):
        identify(named(names, tmp_path / "both.safetensors"))


def test_the_words_of_formats_and_kinds_are_names(tmp_path: Path) -> None:
    words = [*(row.name for row in FORMATS), *KINDS]
    assert len(set(words)) == len(words)
    assert all(re.fullmatch(r"[a-z][a-z0-9_-]{1,31}", word) for word in words)


def test_a_file_of_no_adapter_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match=r"holds no adapter's tensors that loratool knows \('model.norm.weight', \.\.\.\)"
    ):
        identify(named({"model.norm.weight": (4,)}, tmp_path / "model.safetensors"))


ENDINGS = [
    "", ".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_a", ".lora_b", ".hada_w1_a",
    ".dora_scale", ".diff", ".ia3_l", ".processor.to_q_lora.up.weight", ".loras.x.lora_A", ".lora_E", ".base_layer.weight",
]  # fmt: skip
STARTS = ["", "base_model.model.", "lora_unet_", "diffusion_model.", "transformer.", "prompt_embeddings"]
NAMES = st.builds(
    "".join,
    st.tuples(st.sampled_from(STARTS), st.text(st.sampled_from("abq.x_0123"), max_size=9), st.sampled_from(ENDINGS)),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.dictionaries(NAMES, st.lists(st.integers(0, 3), max_size=4).map(tuple), max_size=5),
    alpha=st.none() | st.sampled_from(["rank", 2.0]),
)
def test_any_names_and_shapes_are_told_or_a_clear_error(names: Any, alpha: Any, tmp_path: Path) -> None:
    file = named(names, tmp_path / "x.safetensors")
    try:
        found = identify(file, alpha)
    except LoratoolError as error:
        assert len(str(error)) < 900
    else:
        assert found.kind in KINDS
        assert (found.adapter is None) == (found.why_not is not None)


def test_telling_an_adapter_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from loratool.formats.identify import identify; "
        f"identify(Path({str(DATA / 'lycoris' / 'loha.safetensors')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# Shards


def shards_of(source: Path, folder: Path, pieces: int = 3) -> Path:
    """A PEFT folder whose weights lie in several files under an index."""
    from safetensors.numpy import load_file

    folder.mkdir(parents=True)
    content = load_file(source / "adapter_model.safetensors")
    names = sorted(content, reverse=True)
    parts = [names[start::pieces] for start in range(pieces)]
    files = [f"adapter_model-{number + 1:05d}-of-{pieces:05d}.safetensors" for number in range(pieces)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: content[name] for name in part}, folder / file, {"format": "pt"})
    index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    return folder


def test_a_sharded_adapter_is_one_adapter_however_it_is_cut(
    saved_by_peft: Callable[[str], Path], tmp_path: Path
) -> None:
    source = saved_by_peft("LORA")
    cut = [identify(shards_of(source, tmp_path / str(pieces), pieces)) for pieces in (2, 3)]
    whole = identify(source)
    assert cut[0].sha256 == cut[1].sha256
    for found in cut:
        assert (found.kind, found.ranks, found.scaling) == (whole.kind, whole.ranks, whole.scaling)
        assert found.files.tensors.keys() == whole.files.tensors.keys()


def test_the_fingerprint_of_shards_is_that_of_the_one_file_that_they_make(
    saved_by_peft: Callable[[str], Path], tmp_path: Path
) -> None:
    import hashlib

    from safetensors.numpy import load_file

    found = identify(shards_of(saved_by_peft("LORA"), tmp_path / "cut"))
    joined = b"".join(found.files.content())
    (tmp_path / "joined.safetensors").write_bytes(joined)
    assert hashlib.sha256(joined).hexdigest() == found.sha256
    theirs = load_file(saved_by_peft("LORA") / "adapter_model.safetensors")
    ours = load_file(tmp_path / "joined.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_one_shard_alone_and_an_index_without_its_shards_are_refused(
    saved_by_peft: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shards_of(saved_by_peft("LORA"), tmp_path / "cut")
    shard = folder / "adapter_model-00001-of-00003.safetensors"
    with pytest.raises(AdapterError, match=r"one shard .*'adapter_model\.safetensors\.index\.json'"):
        identify(shard)
    shard.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model-00001-of-00003\.safetensors"):
        identify(folder)


def test_kohyas_and_single_files_stay_what_they_were(saved_by_peft: Callable[[str], Path], tmp_path: Path) -> None:
    kohya = identify(save_kohya_dylora(tmp_path / "k.safetensors", {"a.b": (4, 6)}, r=2, alpha=1.0))
    assert kind_and_all(kohya) == ("kohya", "dylora", 2, 1.0, None)
    single = identify(save_single_file(saved_by_peft("LORA"), tmp_path / "single.safetensors"))
    assert (single.format, single.kind, single.rank, single.alpha) == ("peft", "lora", 3, 5)
