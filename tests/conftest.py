"""What every test runs under: no network, a home of its own, one arithmetic thread a process.

The environment is set before any test module is imported, since torch and huggingface_hub read it once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
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
