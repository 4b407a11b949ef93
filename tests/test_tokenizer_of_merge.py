"""Whose tokenizer and chat template a merged model gets, with real tokenizers, and that the base's come back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import save_peft_adapter
from tiny_chat_model import save_tiny_chat_model
from tiny_models import digest

import loratool
from loratool.cli import cli
from loratool.errors import LoratoolError, VerificationError

if TYPE_CHECKING:
    from hub_stand_in import HubStandIn

OTHER_TEMPLATE = "{% for message in messages %}{{ message['content'] }}!{% endfor %}"
SAYING = [{"role": "user", "content": "ahoy"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model with room for more tokens, untied, with its tokenizer; and an adapter of it without a tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    save_tiny_chat_model(root / "small")
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "small", dtype=torch.bfloat16)
    model.resize_token_embeddings(len(tokenizer_of(root / "small")) + 6)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(root / "base")
    tokenizer_of(root / "small").save_pretrained(root / "base")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    save_peft_adapter(model, config, root / "adapter", save_embedding_layers=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    save_peft_adapter(loaded, config, root / "embedding")
    return root


def tokenizer_of(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def more_tokens(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<think>", "</think>"])


def other_template(tokenizer: Any) -> None:
    tokenizer.chat_template = OTHER_TEMPLATE


def other_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|im_start|>"


CHANGES: dict[str, Callable[[Any], None]] = {
    "added tokens": more_tokens, "a chat template": other_template, "an eos_token": other_end,
}  # fmt: skip


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "base", tmp_path / "base")


def adapter(
    made: Path, folder: Path, change: Callable[[Any], None] = lambda tokenizer: None, of: str = "adapter"
) -> Path:
    """An adapter, of no tokens or of embeddings, with the base's tokenizer changed so, as a training saves it."""
    shutil.copytree(made / of, folder)
    tokenizer = tokenizer_of(made / "base")
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold one tokenizer, as transformers sees it."""
    left, right = tokenizer_of(one), tokenizer_of(other)
    texts = ["ahoy <think> matey</think> <|im_end|>"]
    return bool(
        left.get_vocab() == right.get_vocab()
        and left(texts)["input_ids"] == right(texts)["input_ids"]
        and left.special_tokens_map == right.special_tokens_map
        and left.apply_chat_template(SAYING, tokenize=False) == right.apply_chat_template(SAYING, tokenize=False)
    )


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_that_says_otherwise_comes_along(change: str, made: Path, base: Path, tmp_path: Path) -> None:
    trained = adapter(made, tmp_path / "pirate", CHANGES[change])
    merged = loratool.merge(trained, into=base, out=tmp_path / "out")
    assert same(merged.out, trained) and not same(merged.out, base)
    assert merged.to_json()["tokenizer"]["from"] == str(trained / "adapter_model.safetensors")
    assert any("those of 'pirate'" in note and "--tokenizer base" in note for note in merged.notes)
    manifest = json.loads((merged.out / "loratool.json").read_text())
    assert manifest["changed_files"] and {each["source"] for each in manifest["changed_files"].values()} <= {
        "pirate",
        "",
    }
    assert loratool.verify(merged.out).replayed == "base"
    kept = loratool.merge(trained, into=base, out=tmp_path / "kept", tokenizer="base")
    assert same(kept.out, base) and kept.to_json()["tokenizer"]["from"] == "base"


def test_what_only_another_version_wrote_differently_does_not(made: Path, base: Path, tmp_path: Path) -> None:
    trained = adapter(made, tmp_path / "pirate")
    content = json.loads((trained / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (trained / "tokenizer.json").write_text(json.dumps(content | {"truncation": None, "padding": None}, indent=4))
    config = json.loads((trained / "tokenizer_config.json").read_text())
    config = config | {
        "padding_side": "left",
        "model_max_length": 512,
        "chat_template": (trained / "chat_template.jinja").read_text(),
    }
    (trained / "tokenizer_config.json").write_text(json.dumps(config))
    (trained / "chat_template.jinja").unlink()
    merged = loratool.merge(trained, into=base, out=tmp_path / "out")
    assert digest(merged.out)["tokenizer.json"] == digest(base)["tokenizer.json"]
    assert merged.to_json()["tokenizer"] == {"from": "base", "files": [], "left_out": [], "differences": []}
    asked = loratool.merge(trained, into=base, out=tmp_path / "asked", tokenizer="adapter")
    assert digest(asked.out)["tokenizer.json"] == digest(trained)["tokenizer.json"]


def test_trained_embeddings_bring_theirs(made: Path, base: Path, tmp_path: Path) -> None:
    trained = adapter(made, tmp_path / "pirate", of="embedding")
    merged = loratool.merge(trained, into=base, out=tmp_path / "out")
    assert merged.to_json()["tokenizer"]["from"] != "base" and same(merged.out, trained)


def test_the_catalogue_keeps_it(made: Path, base: Path, tmp_path: Path) -> None:
    trained = adapter(made, tmp_path / "pirate", more_tokens)
    loratool.add(trained)
    kept = shutil.move(trained, tmp_path / "elsewhere")
    merged = loratool.merge("pirate", into=base, out=tmp_path / "out")
    assert same(merged.out, kept) and merged.to_json()["tokenizer"]["from"] == "pirate@1"


def test_it_is_pulled_from_the_hub(hub: HubStandIn, made: Path, base: Path, tmp_path: Path) -> None:
    trained = adapter(made, tmp_path / "pirate", more_tokens)
    files = {file.name: file.read_bytes() for file in trained.iterdir()}
    hub.create("ada/pirate").put(files)
    hub.create("ada/model").put(files | {"config.json": b"{}", "model.safetensors": b"the base, whose tokenizer it is"})
    loratool.pull("ada/pirate")
    assert same(loratool.merge("pirate", into=base, out=tmp_path / "out").out, trained)
    loratool.pull("ada/model", name="other")
    assert same(loratool.merge("other", into=base, out=tmp_path / "other").out, base)


@pytest.mark.parametrize("catalogued", [False, True])
def test_an_exported_folder_has_it_and_is_replaced_with_it(catalogued: bool, made: Path, tmp_path: Path) -> None:
    trained = adapter(made, tmp_path / "pirate", more_tokens)
    if catalogued:
        loratool.add(trained)
    source = "pirate" if catalogued else trained
    out = loratool.export(source, tmp_path / "out")
    assert same(out, trained)
    assert loratool.show(out).record.sha256 == loratool.show(source).record.sha256
    (out / "mine.txt").write_text("mine")
    with pytest.raises(LoratoolError, match=r"holds 'mine\.txt'"):
        loratool.export(source, out, force=True)
    (out / "mine.txt").unlink()
    shutil.rmtree(loratool.export(made / "adapter", tmp_path / "bare"))
    loratool.export(made / "adapter", out, force=True)
    assert not (out / "tokenizer.json").exists()


def test_an_export_of_an_export_lists_only_its_own_files(made: Path, tmp_path: Path) -> None:
    first = loratool.export(adapter(made, tmp_path / "pirate", more_tokens), tmp_path / "first")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (first / name).unlink(missing_ok=True)
    loratool.add(first, name="second")
    second = loratool.export("second", tmp_path / "second")
    assert json.loads((first / "loratool.json").read_text())["files"]
    assert "files" not in json.loads((second / "loratool.json").read_text())


def test_it_is_pushed_without_the_local_path_in_it_and_pulled_again(
    hub: HubStandIn, made: Path, base: Path, tmp_path: Path
) -> None:
    trained = adapter(made, tmp_path / "pirate", more_tokens)
    config = json.loads((trained / "tokenizer_config.json").read_text()) | {"name_or_path": str(base)}
    (trained / "tokenizer_config.json").write_text(json.dumps(config))
    loratool.add(trained, name="pirate")
    assert loratool.push("pirate", "ada/pirate", base_model="none").sent
    pushed = {path: blob.data for path, blob in hub.repositories["ada/pirate"].head.files.items()}
    assert pushed["tokenizer.json"] == (trained / "tokenizer.json").read_bytes()
    assert json.loads(pushed["tokenizer_config.json"]) == config | {"name_or_path": "base"}
    assert not [path for path, data in pushed.items() if str(tmp_path).encode() in data]
    assert not loratool.push("pirate", "ada/pirate", base_model="none").sent
    loratool.remove("pirate")
    loratool.pull("ada/pirate", name="pulled")
    assert same(loratool.merge("pulled", into=base, out=tmp_path / "out").out, trained)


def test_a_chat_template_alone_comes_along(made: Path, base: Path, tmp_path: Path) -> None:
    trained = shutil.copytree(made / "adapter", tmp_path / "pirate")
    (trained / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    merged = loratool.merge(trained, into=base, out=tmp_path / "out")
    assert tokenizer_of(merged.out).apply_chat_template(SAYING, tokenize=False) == "ahoy!"
    assert tokenizer_of(merged.out).get_vocab() == tokenizer_of(base).get_vocab()
    config = {"chat_template": OTHER_TEMPLATE + "?"}
    (trained / "chat_template.jinja").unlink()
    (trained / "tokenizer_config.json").write_text(json.dumps(config))
    merged = loratool.merge(trained, into=base, out=tmp_path / "again")
    assert tokenizer_of(merged.out).apply_chat_template(SAYING, tokenize=False) == "ahoy!?"


@pytest.mark.parametrize("options", [{"undo": True}, {}, {"quantize": "nf4"}, {"in_place": True}], ids=str)
def test_the_bases_files_come_back_bit_for_bit(options: dict[str, Any], made: Path, base: Path, tmp_path: Path) -> None:
    (base / "added_tokens.json").write_text("{}")  # which the adapter's has not
    (base / "chat_template.jinja").unlink()  # which the base has not
    before = digest(base)
    trained = adapter(made, tmp_path / "pirate", more_tokens)
    where = {} if "in_place" in options else {"out": tmp_path / "out"}
    merged = loratool.merge(trained, into=base, **where, **options)
    assert same(merged.out, trained) and not (merged.out / "added_tokens.json").exists()
    shutil.rmtree(trained)
    loratool.verify(merged.out)
    if "undo" in options:
        shutil.rmtree(base)
    back = loratool.unmerge(merged.out, **({"in_place": True} if "in_place" in options else {"out": tmp_path / "back"}))
    assert digest(back.out) == before and back.inexact == ()


def test_two_merges_in_place_come_out_one_after_the_other(made: Path, base: Path, tmp_path: Path) -> None:
    states = [digest(base)]
    for name, change in (("one", more_tokens), ("two", other_template)):
        loratool.merge(adapter(made, tmp_path / name, change), into=base, in_place=True, again=True, tokenizer="adapter",
                       allow_no_op=True)  # fmt: skip
        states.append(digest(base))
    for state in reversed(states[:-1]):
        loratool.unmerge(base, in_place=True)
        assert digest(base) == state


def test_arithmetic_says_that_the_tokenizer_stays(made: Path, base: Path, tmp_path: Path) -> None:
    trained = adapter(made, tmp_path / "pirate", more_tokens)
    merged = loratool.merge(trained, into=base, out=tmp_path / "out").out
    shutil.rmtree(base)
    back = loratool.unmerge(merged, out=tmp_path / "back", approximate=True)
    assert any("'tokenizer.json' stays as the merge wrote it" in note for note in back.notes) and same(
        back.out, trained
    )


def test_a_tokenizer_that_was_changed_since_is_no_longer_what_was_merged(
    made: Path, base: Path, tmp_path: Path
) -> None:
    merged = loratool.merge(adapter(made, tmp_path / "pirate", more_tokens), into=base, out=tmp_path / "out").out
    (merged / "tokenizer.json").write_text((base / "tokenizer.json").read_text())
    with pytest.raises(VerificationError, match=r"tokenizer\.json"):
        loratool.verify(merged)
    assert any(
        "the base's own file replaces it" in note for note in loratool.unmerge(merged, out=tmp_path / "back").notes
    )


def test_adapters_with_different_tokenizers_are_refused_unless_it_is_decided(
    made: Path, base: Path, tmp_path: Path
) -> None:
    one, two = adapter(made, tmp_path / "one", more_tokens), adapter(made, tmp_path / "two", other_template)
    tensors = load_file(two / "adapter_model.safetensors")
    save_file(
        {name: tensor * 2 for name, tensor in tensors.items()}, two / "adapter_model.safetensors", {"format": "pt"}
    )
    weights = [(one, 0.5), (two, 0.25)]
    with pytest.raises(
        LoratoolError, match=r"'one' and 'two' were trained with different tokenizers .*--tokenizer base"
    ):
        loratool.merge(weights, into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first = loratool.merge(weights, into=base, out=tmp_path / "first", tokenizer="adapter")
    assert same(first.out, one)
    assert same(loratool.merge(weights, into=base, out=tmp_path / "none", tokenizer="base").out, base)
    shutil.copyfile(one / "tokenizer.json", two / "tokenizer.json")
    shutil.copyfile(one / "chat_template.jinja", two / "chat_template.jinja")
    shutil.copyfile(one / "tokenizer_config.json", two / "tokenizer_config.json")
    assert same(loratool.merge(weights, into=base, out=tmp_path / "both").out, one)


def test_what_cannot_be_is_refused(made: Path, base: Path, tmp_path: Path) -> None:
    def many(tokenizer: Any) -> None:
        tokenizer.add_tokens([f"<{number}>" for number in range(9)])

    def refuses(trained: Path, message: str, **options: Any) -> None:
        with pytest.raises(LoratoolError, match=message):
            loratool.merge(trained, into=base, out=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refuses(adapter(made, tmp_path / "many", many), "has tokens up to number .* embeddings for .*--tokenizer base")
    damaged = adapter(made, tmp_path / "damaged", more_tokens)
    (damaged / "tokenizer.json").write_text("[" * 500)
    refuses(damaged, "tokenizer of 'damaged' cannot be read .*--tokenizer base")
    loratool.merge(damaged, into=base, dry_run=True, tokenizer="base")
    refuses(made / "adapter", "has a tokenizer of its own", tokenizer="adapter")


def test_a_link_out_of_the_adapters_folder_is_not_followed(made: Path, base: Path, tmp_path: Path) -> None:
    trained = adapter(made, tmp_path / "pirate", more_tokens)
    (tmp_path / "secret").write_text("s3cret")
    (trained / "chat_template.jinja").unlink()
    (trained / "chat_template.jinja").symlink_to(tmp_path / "secret")
    loratool.add(trained)
    for name in (trained, "pirate"):
        out = loratool.merge(name, into=base, out=tmp_path / f"out-{Path(name).name}-{isinstance(name, str)}").out
        assert not any(b"s3cret" in file.read_bytes() for file in out.rglob("*") if file.is_file())


def test_the_command_says_it(made: Path, base: Path, tmp_path: Path) -> None:
    trained = str(adapter(made, tmp_path / "pirate", more_tokens))
    words = ["merge", trained, "--into", str(base), "--dry-run"]
    assert "tokenizer" in CliRunner().invoke(cli, words).output
    printed = json.loads(CliRunner().invoke(cli, [*words, "--json", "--tokenizer", "base"]).stdout)
    assert printed["tokenizer"]["from"] == "base"
