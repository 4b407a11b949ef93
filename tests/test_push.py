"""An adapter on the Hub: PEFT's layout, a card, one commit a push and none where nothing differs."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from hub_stand_in import Cut, Event, Failure, HubStandIn
from huggingface_hub import ModelCard, constants, snapshot_download
from markdown_it import MarkdownIt
from tiny_adapters import (
    TinyAdapters,
    copy_with,
    save_kohya_dylora,
    save_peft_adalora,
    save_peft_adapter,
    save_single_file,
)
from tiny_models import TinyModels, load

import loratool
from loratool.errors import HubError, LoratoolError, NotFoundError
from loratool.hub.readme import BEGIN, END

BASE = "org/tiny-llama"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(hub: HubStandIn, tiny_models: TinyModels) -> Path:
    """A base that is catalogued as ``tiny`` and known to be on the Hub."""
    hub.create(BASE)
    folder = tiny_models.folder("llama", "fp32")
    loratool.base_add("tiny", folder, hub_id=BASE)
    return folder


@pytest.fixture
def pirate(base: Path, tiny_adapters: TinyAdapters) -> Path:
    """The folder of an adapter that is catalogued as ``pirate``."""
    folder = tiny_adapters.folder("llama", task_type="CAUSAL_LM")
    loratool.add(folder, name="pirate", base="tiny", tags=["speech"])
    return folder


def files(hub: HubStandIn, repository: str = "ada/pirate") -> dict[str, bytes]:
    return {path: blob.data for path, blob in hub.repositories[repository].head.files.items()}


def test_what_is_pushed_is_what_peft_loads(hub: HubStandIn, base: Path, pirate: Path) -> None:
    result = loratool.push("pirate", "ada/pirate")
    snapshot = Path(snapshot_download("ada/pirate"))
    assert (snapshot / WEIGHTS).read_bytes() == (pirate / WEIGHTS).read_bytes()
    assert json.loads((snapshot / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    facts = json.loads((snapshot / "loratool.json").read_text())
    assert facts["base_fingerprint"] == loratool.base_show("tiny").record.fingerprint
    inputs = torch.arange(8)[None]
    ours, theirs = (
        peft.PeftModel.from_pretrained(load(base, "llama"), folder)(inputs).logits for folder in (snapshot, pirate)
    )
    assert torch.equal(ours, theirs)
    assert result.created and result.sent and not result.private
    assert result.commit == hub.repositories["ada/pirate"].head.oid
    (location,) = [each for each in loratool.show("pirate").record.locations if each.kind == "hub"]
    assert (location.repo, location.revision) == ("ada/pirate", result.commit)


def test_one_commit_a_push_and_none_for_the_same(hub: HubStandIn, pirate: Path) -> None:
    first = loratool.push("pirate", "ada/pirate")
    uploads = hub.count("PUT", "/objects/")
    again = loratool.push("pirate", "ada/pirate")
    assert [each.title for each in hub.repositories["ada/pirate"].history] == ["Push pirate@1", "initial commit"]
    assert not again.sent and again.commit == first.commit
    assert {each.state for each in again.files} == {"same"}
    assert hub.count("PUT", "/objects/") == uploads
    loratool.push("pirate", "ada/pirate", license="mit", message="A license")
    assert hub.repositories["ada/pirate"].head.title == "A license"
    assert hub.count("PUT", "/objects/") == uploads


def test_bare_push_takes_the_newest_and_the_users_name(
    hub: HubStandIn, pirate: Path, tiny_adapters: TinyAdapters
) -> None:
    loratool.add(tiny_adapters.folder("llama", seed=7), name="newest", base="tiny")
    result = loratool.push()
    assert (result.source, result.repository) == ("newest@1", "ada/newest")
    assert loratool.push("pirate", "other").repository == "ada/other"


def test_the_card(hub: HubStandIn, pirate: Path) -> None:
    card = ModelCard(loratool.push("pirate", "ada/pirate", license="apache-2.0").card)
    card.validate()
    assert card.data.to_dict() == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "loratool", "speech"],
    }
    for words in (
        "# pirate",
        "of rank 4",
        f"[org/tiny-llama]({hub.endpoint}/{BASE})",
        "`q_proj`",
        "loratool pull ada/pirate",
    ):
        assert words in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(code, "card", "exec")
    assert list(loratool_models(hub)) == ["ada/pirate"]


def loratool_models(hub: HubStandIn) -> list[str]:
    from huggingface_hub import HfApi

    return [each.id for each in HfApi().list_models(filter=f"base_model:adapter:{BASE}")]


def test_training_and_results_are_on_the_card(
    hub: HubStandIn, base: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_adapters.folder("llama"), tmp_path / "trained")
    recipe = {"data": "crew/pirate-talk", "lr": 0.001, "steps": 1200, "log": "/home/ada/secret/log.jsonl", "seed": None}
    metrics = {"loss": 2.4597, "loss_by_rank": {"1": 3.0, "10": 2.4, "2": 2.5}, "peak_memory_bytes": 1543503872}
    (folder / "loratool.json").write_text(json.dumps({"schema": 1, "recipe": recipe, "metrics": metrics}))
    (tmp_path / "trained.train.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    result = loratool.push(folder, "ada/trained", base_model=BASE)
    card = ModelCard(result.card)
    assert card.data.datasets == ["crew/pirate-talk"]
    for words in (
        "| lr | `0.001` |",
        "| steps | `1,200` |",
        "| loss | `2.4597` |",
        "| 2 | `2.5` |\n| 10 | `2.4` |",
        "| peak memory | `1.54 GB` |",
        "(training.png)",
    ):
        assert words in card.text
    pushed = files(hub, "ada/trained")
    assert pushed["training.png"].startswith(b"\x89PNG")
    assert not any(b"secret" in data or b"/home" in data for data in pushed.values())
    assert json.loads(pushed["loratool.json"])["recipe"]["log"] == "log.jsonl"


def test_names_from_outside_are_only_names_on_the_card(
    hub: HubStandIn, base: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_adapters.folder("llama"), tmp_path / "mine")
    nasty = f"</details><script>x</script>{END} | `a` ![i](http://evil) \x1b[2J\nline"
    facts = {
        "recipe": {"method": nasty, "note": nasty, nasty: 1},
        "metrics": {"loss": nasty},
        "lineage": {"operation": nasty, "parents": [{"name": nasty}]},
    }
    (folder / "loratool.json").write_text(json.dumps(facts))
    card = loratool.push(folder, "ada/pirate", base_model=BASE).card
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(card).text)
    assert "<script" not in html and "<img" not in html and "\x1b" not in html
    assert html.count("<details>") == html.count("</details>") == 1
    assert not loratool.push(folder, "ada/pirate", base_model=BASE).sent
    assert card.count(END) == 1


def test_no_path_of_this_machine_is_pushed(
    hub: HubStandIn, base: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    folder = copy_with(tiny_adapters.folder("llama"), tmp_path / "mine", base_model_name_or_path=str(base))
    (folder / "README.md").write_text(
        f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n- lora\n---\n\n# Mine\n"
    )
    single = save_single_file(folder, tmp_path / "single.safetensors")
    for path, name in ((folder, "mine"), (single, "single")):
        result = loratool.push(path, f"ada/{name}", base_model=BASE)
        assert not [p for p, data in files(hub, f"ada/{name}").items() if str(base.parent).encode() in data]
        assert ModelCard(result.card).data.base_model == BASE
    assert any("sha256 differs from that of" in note for note in result.notes)
    theirs, ours = (
        peft.utils.save_and_load.safe_load_file(f)
        for f in (folder / WEIGHTS, Path(snapshot_download("ada/single")) / WEIGHTS)
    )
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_a_hand_written_readme_is_kept(hub: HubStandIn, pirate: Path) -> None:
    loratool.push("pirate", "ada/pirate")
    repository = hub.repositories["ada/pirate"]
    text = files(hub)["README.md"].decode()
    by_hand = text.replace("# pirate", "# Arr\n\nMine own words.").replace("rank 4", "rank 99") + "\nAnd more.\n"
    by_hand = by_hand.replace(
        "---\nbase_model", "---\n# a comment\nlanguage: en\npipeline_tag: text2text-generation\nbase_model", 1
    )
    repository.put({"README.md": by_hand.encode()})
    assert loratool.push("pirate", "ada/pirate").sent
    kept = files(hub)["README.md"].decode()
    assert kept == by_hand.replace("rank 99", "rank 4")
    repository.put({"README.md": b"---\nlicense: mit\n---\nOnly words.\r\n"})
    loratool.push("pirate", "ada/pirate")
    card = ModelCard(files(hub)["README.md"].decode())
    assert card.data.license == "mit" and card.data.base_model == BASE
    assert card.text.startswith("Only words.") and card.text.count(BEGIN) == card.text.count(END) == 1
    assert not loratool.push("pirate", "ada/pirate").sent


@pytest.mark.parametrize(
    ("readme", "words"),
    [
        (b"---\n- a\n- b\n---\n", "instead of keys with values"),
        (b"---\na: [\n---\n", "cannot be read"),
        (BEGIN.encode() + b"\n", "once, or neither"),
        (b"\xff\xfe", "not UTF-8"),
        (b"---\nlicense: beer\n---\n", "does not accept"),
        (b"---\n1: 2\n---\n", "does not accept"),
    ],
)
def test_a_readme_that_cannot_be_renewed_is_refused(hub: HubStandIn, pirate: Path, readme: bytes, words: str) -> None:
    repository = hub.create("ada/pirate")
    repository.put({"README.md": readme})
    with pytest.raises(HubError, match=words):
        loratool.push("pirate", "ada/pirate")
    assert len(repository.history) == 2


def test_a_template_of_peft_is_replaced(hub: HubStandIn, base: Path, tiny_adapters: TinyAdapters) -> None:
    folder = tiny_adapters.folder("llama", task_type="CAUSAL_LM")
    assert "More Information Needed" in (folder / "README.md").read_text()
    assert "More Information" not in loratool.push(folder, "ada/pirate", base_model=BASE).card


def test_a_dry_run_without_a_network_shows_the_files_and_the_card(
    hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loratool.push("pirate", "ada/pirate", dry_run=True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    result = loratool.push("pirate", "ada/pirate", dry_run=True)
    assert [(each.path, each.state) for each in result.files] == [(each.path, each.state) for each in expected.files]
    assert "of rank 4" in result.card and not result.sent
    assert "the Hub was not asked which files it has: http://127.0.0.1:9 cannot be reached" in result.notes
    with pytest.raises(HubError, match="write owner/pirate"):
        loratool.push("pirate", dry_run=True)


def test_dry_run_sends_nothing(hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = loratool.push("pirate", "ada/pirate", dry_run=True)
    assert {each.path: each.state for each in result.files} == dict.fromkeys(
        ["README.md", "adapter_config.json", WEIGHTS, "loratool.json"], "new"
    )
    assert "of rank 4" in result.card and not result.sent
    assert "ada/pirate" not in hub.repositories
    assert not [each for each in hub.asked if each.method != "GET" and "validate-yaml" not in each.path]
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert loratool.push("pirate", "ada/pirate", dry_run=True).card == result.card
    assert len(hub.asked) == asked
    with pytest.raises(HubError, match="loratool push needs the network"):
        loratool.push("pirate", "ada/pirate")


def test_branches_pull_requests_and_privacy(hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match="to propose anything to"):
        loratool.push("pirate", "ada/pirate", create_pr=True)
    assert loratool.push("pirate", "ada/pirate", private=True).private
    repository = hub.repositories["ada/pirate"]
    assert repository.private
    loratool.push("pirate", "ada/pirate", revision="next", license="mit")
    assert len(repository.history) == 2 and len(repository.log(repository.find("next"))) == 3
    assert not loratool.push("pirate", "ada/pirate", revision="next").sent
    assert loratool.push("pirate", "ada/pirate", revision="same").commit == repository.find("same").oid
    assert len(repository.log(repository.find("same"))) == 2
    with pytest.raises(HubError, match="has no branch 'gone'"):
        loratool.push("pirate", "ada/pirate", revision="gone", create_pr=True)

    hub.create("org/pirate").put({"notes.txt": b"arr"})
    proposed = loratool.push("pirate", "org/pirate", create_pr=True)
    assert proposed.pull_request == f"{hub.endpoint}/org/pirate/discussions/1"
    assert all(place.repo != "org/pirate" for place in loratool.show("pirate").record.locations)
    again = loratool.push("pirate", "org/pirate", create_pr=True)
    assert (again.sent, again.pull_request) == (False, proposed.pull_request)
    hub.repositories["org/pirate"].pull_requests[1] = "closed"
    assert loratool.push("pirate", "org/pirate", create_pr=True).sent
    with pytest.raises(HubError, match="and is public; leave --private out"):
        loratool.push("pirate", "org/pirate", private=True)
    with pytest.raises(HubError, match="--create-pr"):
        loratool.push("pirate", "org/pirate")


def test_a_public_repository_is_asked_for(hub: HubStandIn, pirate: Path) -> None:
    asked = []

    def answer(question: str) -> bool:
        asked.append(question)
        return len(asked) > 1

    with pytest.raises(HubError, match="nothing was pushed"):
        loratool.push("pirate", "ada/pirate", confirm=answer)
    assert not hub.repositories.keys() & {"ada/pirate"}
    loratool.push("pirate", "ada/pirate", confirm=answer)
    loratool.push("pirate", "ada/pirate", license="mit", confirm=answer)
    loratool.push("pirate", "ada/secret", private=True, confirm=answer)
    assert len(asked) == 2


def test_the_base_on_the_hub(
    hub: HubStandIn,
    tiny_models: TinyModels,
    tiny_adapters: TinyAdapters,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loratool.base_add("local", tiny_models.folder("llama", "fp32"))
    folder = copy_with(tiny_adapters.folder("llama"), tmp_path / "mine", base_model_name_or_path="models/llama")
    loratool.add(folder, name="pirate", base="local")
    with pytest.raises(HubError, match=r"loratool base add local .* --hub-id owner/name"):
        loratool.push("pirate", "ada/pirate")
    assert "ada/pirate" not in hub.repositories
    with pytest.raises(HubError, match="not the name of a repository"):
        loratool.push("pirate", "ada/pirate", base_model="/models/llama")
    unknown = loratool.push("pirate", "ada/one", base_model="org/nowhere")
    assert any("no model 'org/nowhere'" in note for note in unknown.notes)
    assert not loratool.push("pirate", "ada/one").sent  # the card there says it
    none = loratool.push("pirate", "ada/two", base_model="none")
    assert "base_model" not in ModelCard(none.card).data.to_dict()
    assert json.loads(files(hub, "ada/two")["adapter_config.json"])["base_model_name_or_path"] is None
    hub.create("models/llama")
    (tmp_path / "models" / "llama").mkdir(parents=True)
    with monkeypatch.context() as here:
        here.chdir(tmp_path)
        with pytest.raises(HubError, match="recorded as 'models/llama'"):
            loratool.push("pirate", "ada/three")
    recorded = loratool.push("pirate", "ada/three")
    assert ModelCard(recorded.card).data.base_model == "models/llama"
    hub.create("org/real")
    hub.moved["org/old"] = "org/real"
    loratool.base_add("local", tiny_models.folder("llama", "fp32"), hub_id="org/old")
    assert ModelCard(loratool.push("pirate", "ada/four").card).data.base_model == "org/real"


def test_other_kinds_are_pushed_as_peft_loads_them(
    hub: HubStandIn, base: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    model = load(base, "llama")
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if name.endswith("q_proj")}
    file = save_kohya_dylora(tmp_path / "dy.safetensors", shapes, r=4, alpha=8.0)
    with pytest.raises(HubError, match="catalogue its base from files"):
        loratool.push(file, "ada/dy", base_model=BASE)
    loratool.add(file, name="dy", base="tiny")
    result = loratool.push("dy", "ada/dy")
    card = ModelCard(result.card)
    assert card.data.tags == ["lora", "dylora", "loratool"]
    assert "DyLoRA adapter of rank 1 to 4" in card.text and "loratool truncate dy --rank 2" in card.text
    snapshot = snapshot_download("ada/dy")
    loaded = peft.PeftModel.from_pretrained(load(base, "llama"), snapshot)
    raw = peft.utils.save_and_load.safe_load_file(file)
    key = next(iter(shapes))
    flat = "lora_te_" + key.replace(".", "_")
    layer = loaded.get_submodule(f"base_model.model.{key}")
    expected = raw[f"{flat}.lora_up.weight"] @ raw[f"{flat}.lora_down.weight"] * (8.0 / 4)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


def test_the_card_of_a_kind_that_is_no_lora_says_what_it_is(hub: HubStandIn, base: Path, tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = save_peft_adapter(load(base, "llama"), config, tmp_path / "hadamard")
    loratool.add(folder, name="hadamard", base="tiny")
    loratool.push("hadamard", "ada/hadamard")
    card = ModelCard(files(hub, "ada/hadamard")["README.md"].decode())
    assert card.data.tags == ["loha", "loratool"]
    assert "A LoHa adapter of rank 3 for" in card.text
    assert "| alpha | 6 (scaling 2) |" in card.text and "(2 modules) |" in card.text
    assert peft.PeftConfig.from_pretrained(snapshot_download("ada/hadamard")).peft_type == "LOHA"


def test_an_adalora_and_a_child_of_it(hub: HubStandIn, base: Path, tmp_path: Path) -> None:
    inputs = torch.arange(8)[None]
    folder = save_peft_adalora(load(base, "llama"), tmp_path / "ada", task_type="CAUSAL_LM")
    loratool.add(folder, name="full", base="tiny")
    card = ModelCard(loratool.push("full", "ada/full").card)
    assert card.data.tags == ["lora", "adalora", "loratool"] and "loratool prune --as lora" in card.text
    snapshots = [snapshot_download("ada/full"), folder]
    ours, theirs = (peft.PeftModel.from_pretrained(load(base, "llama"), each)(inputs).logits for each in snapshots)
    assert torch.equal(ours, theirs)

    loratool.prune("full", average_rank=2, as_="lora", out=tmp_path / "small", name="small")
    card = ModelCard(loratool.push("small", "ada/small").card)
    assert "Made by `loratool prune` from `full" in card.text
    facts = json.loads(files(hub, "ada/small")["loratool.json"])
    assert facts["lineage"]["operation"] == "prune"
    assert facts["lineage"]["parents"][0]["sha256"] == loratool.show("full").record.sha256
    peft.PeftModel.from_pretrained(load(base, "llama"), snapshot_download("ada/small"))


def test_faults_of_a_push_pass_or_are_said(hub: HubStandIn, hub_waits: list[float], pirate: Path) -> None:
    hub.faults += [
        Failure("POST", "/preupload/", status=429, headers={"Retry-After": "3"}),
        Failure("POST", "/objects/batch"),
        Cut("PUT", "/objects/"),
    ]
    loratool.push("pirate", "ada/pirate")
    assert hub_waits == [4.0, 1, 1]
    assert len(hub.repositories["ada/pirate"].history) == 2
    hub.faults[:] = [Failure("POST", "/commit/", status=500, message="Down")]
    with pytest.raises(HubError, match=r"500 \(Down\); the fault is the Hub's"):
        loratool.push("pirate", "ada/pirate", license="mit")
    assert len(hub.repositories["ada/pirate"].history) == 2
    assert loratool.push("pirate", "ada/pirate", license="mit").sent


def test_a_commit_that_came_in_between_is_not_overwritten(hub: HubStandIn, pirate: Path) -> None:
    repository = hub.create("ada/pirate")
    hub.faults.append(Event("POST", "/preupload/", happen=lambda: repository.put({"README.md": b"mine"})))
    with pytest.raises(HubError, match="there is a new commit in the meantime"):
        loratool.push("pirate", "ada/pirate")
    assert files(hub)["README.md"] == b"mine"
    assert loratool.push("pirate", "ada/pirate").sent
    assert files(hub)["README.md"].startswith(b"---\n") and b"mine" in files(hub)["README.md"]


def test_who_may_not_push(hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match="rights to create"):
        loratool.push("pirate", "org/pirate")
    with pytest.raises(HubError, match="not the name of a repository"):
        loratool.push("pirate", "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrong")
    with pytest.raises(HubError, match="401") as refused:
        loratool.push("pirate", "ada/pirate")
    assert "wrongwrong" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        loratool.push("pirate")
    with pytest.raises(HubError, match="hf auth login"):
        loratool.push("pirate", "ada/pirate")
    assert loratool.push("pirate", "ada/pirate", dry_run=True).files
    with pytest.raises(LoratoolError, match="--merged pushes a model"):
        loratool.push("pirate", "ada/pirate", merged=True, alpha=2.0)


def test_a_token_is_never_pushed(hub: HubStandIn, base: Path, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_adapters.folder("llama"), tmp_path / "mine")
    (folder / "README.md").write_text(f"Use my token: {hub.token}\n")
    with pytest.raises(HubError, match="holds your token and would publish it") as refused:
        loratool.push(folder, "ada/pirate", base_model=BASE)
    assert hub.token not in str(refused.value)
    (folder / "README.md").unlink()
    (folder / "loratool.json").write_text(json.dumps({"recipe": {"tracker": f"--token {hub.token}"}}))
    with pytest.raises(HubError, match="holds your token and would publish it"):
        loratool.push(folder, "ada/pirate", base_model=BASE)


def test_what_huggingface_hub_logs_of_an_upload_holds_no_secret(
    hub: HubStandIn, hub_waits: list[float], pirate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = io.StringIO()
    (handler,) = logging.getLogger("huggingface_hub").handlers
    monkeypatch.setattr(handler, "stream", seen)
    monkeypatch.setattr(handler, "filters", [])
    hub.faults += [Failure("PUT", "/objects/", status=503), Failure("POST", "/preupload/", status=429)]
    loratool.push("pirate", "ada/pirate")
    logging.getLogger("huggingface_hub.lfs").warning("PUT %s/x?X-Amz-Signature=1 as %s", hub.storage, hub.token)
    assert "503" in seen.getvalue() and "/x as hf_" in seen.getvalue()
    assert "?" not in seen.getvalue() and hub.token not in seen.getvalue()


def test_an_empty_catalogue_has_nothing_to_push(hub: HubStandIn) -> None:
    with pytest.raises(NotFoundError, match="no adapter to push"):
        loratool.push()
    with pytest.raises(NotFoundError, match="loratool push ADAPTER ada/pirate"):
        loratool.push("ada/pirate")
    with pytest.raises(NotFoundError, match="loratool truncate"):
        loratool.push("dylora@rank=4", "ada/pirate")
