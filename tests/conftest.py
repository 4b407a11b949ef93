"""What every test runs under: no network, a home of its own, one arithmetic thread a process.

The environment is set before any test module is imported, since torch and huggingface_hub read it once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub_stand_in import HubStandIn
    from other_adapters import PeftTypes
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers side by side: threads that wait for each other at barriers starve a small machine.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MKL_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def home_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point LORATOOL_HOME at an empty folder and clear what the user's shell may say about the registry."""
    home = tmp_path_factory.mktemp("loratool-home")
    monkeypatch.setenv("LORATOOL_HOME", str(home))
    monkeypatch.delenv("LORATOOL_REGISTRY", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    return home


@pytest.fixture
def signals_as_in_a_terminal() -> Iterator[None]:
    """Handle Ctrl-C, SIGTERM and SIGHUP as Python does, here and in the processes that are started.

    A shell has what runs in its background, and nohup what it runs, ignore some of them, and those pass that on.
    """
    plain = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in plain.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Random tiny models on disk, each built once a session. Read them only; copy one before changing it."""
    from tiny_models import TinyModels

    return TinyModels(tmp_path_factory.mktemp("tiny-models"))


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> TinyAdapters:
    """Random PEFT adapters for the tiny models, each built once a session. Read them only."""
    from tiny_adapters import TinyAdapters

    return TinyAdapters(tmp_path_factory.mktemp("tiny-adapters"), tiny_models)


@pytest.fixture(scope="session")
def saved_by_peft(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> PeftTypes:
    """A folder of an adapter of any type of PEFT's, as PEFT saves it, each built once a session. Read them only."""
    from other_adapters import PeftTypes

    return PeftTypes(tmp_path_factory.mktemp("types"), tiny_models)


@pytest.fixture
def hub_waits() -> list[float]:
    """The seconds that huggingface_hub would have waited between its attempts, in order."""
    return []


@pytest.fixture
def hub(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, hub_waits: list[float]
) -> Iterator[HubStandIn]:
    """A stand-in of the Hub that huggingface_hub takes for it, with an empty cache; nobody waits between attempts."""
    import huggingface_hub
    from hub_stand_in import HubStandIn
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    home = tmp_path_factory.mktemp("hf-home")
    with HubStandIn() as stand_in:
        for name, value in stand_in.environment(home).items():
            monkeypatch.setenv(name, value)
        # huggingface_hub has read its environment long ago.
        for name, value in {
            "ENDPOINT": stand_in.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", stand_in.endpoint)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=hub_waits.append))
        yield stand_in
        _http.close_session()
