"""Two processes that train together, data parallel or with FSDP2, give what one gives, but for fp32's last digits.

This file is also the program that torchrun and ``accelerate launch`` start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiny_models import TinyModels

RUNS: dict[str, dict[str, Any]] = {
    "lora": {"accumulate": 2},
    "dylora": {"method": "dylora", "rank": 4},
    "adalora": {"method": "adalora", "rank": 2},
    "small": {"batch_size": 3, "accumulate": 2, "pack": True},
}
"""``small`` leaves a process without a share in some passes."""

LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node", "2"),
    "accelerate": (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
    ),
    "fsdp2": (
        "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    ),
}  # fmt: skip


def train_all(work: Path, names: list[str]) -> None:
    """Train every run into a folder of that name, and say of this process what it holds of the base."""
    from loratool.library import train as trainer
    from loratool.library.training_runs.progress import SilentTraining

    class Watching(SilentTraining):
        def begin_steps(self, done: int, steps: int) -> None:
            print("begun", flush=True)

    original = trainer.prepare
    held = {}

    def prepare(*arguments: Any) -> Any:
        training = original(*arguments)
        kinds = {type(each).__name__ for each in training.model.parameters() if not each.requires_grad}
        ours = sum(getattr(each, "_local_tensor", each).numel() for each in training.model.parameters())
        held[training.recipe.adapter.method] = [training.processes.count, sorted(kinds), ours]
        return training

    trainer.prepare = prepare
    for name in names:
        result = trainer.train(
            work / "base", work / "cats.jsonl", name=name, out=work / "out" / f"{name}.safetensors", steps=5, lr=1e-2,
            validation=3, device="cpu", **RUNS[name],
        )  # fmt: skip
        assert result.record.name == name
    (work / f"held-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    train_all(Path(sys.argv[1]), sys.argv[2].split(","))


@pytest.fixture
def work(tmp_path: Path, tiny_models: TinyModels) -> Path:
    from test_eval import CHATML, tiny_tokenizer, with_tokenizer, write_lines

    with_tokenizer(tiny_models.folder("llama", "bf16"), tmp_path / "base", tiny_tokenizer(template=CHATML))
    samples = [{"prompt": f"{'what ' * (n % 5)}sat", "completion": f"{'a cat ' * (n % 3)}dog"} for n in range(20)]
    write_lines(tmp_path / "cats.jsonl", *samples)
    return tmp_path


@pytest.fixture
def alone(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Train a run in this process; its tensors and the losses of its steps."""

    def trained(name: str) -> dict[str, Any]:
        from loratool.library.train import train

        monkeypatch.setenv("LORATOOL_HOME", str(work / "home-alone"))
        result = train(
            work / "base", work / "cats.jsonl", name=name, out=work / "alone" / f"{name}.safetensors", steps=5, lr=1e-2,
            validation=3, device="cpu", **RUNS[name],
        )  # fmt: skip
        return left(result.out)

    return trained


def left(adapter: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    log = adapter.with_name(f"{adapter.stem}.train.jsonl").read_text().splitlines()
    return {"tensors": load_file(adapter), "losses": [line["loss"] for line in map(json.loads, log) if "lr" in line]}


@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        ("torchrun", ["lora", "dylora", "adalora", "small"]),
        ("accelerate", ["lora"]),
        ("fsdp2", ["lora", "adalora", "small"]),
    ],
)
def test_two_processes_give_the_result_of_one(
    launcher: str, names: list[str], work: Path, alone: Callable[[str], dict[str, Any]]
) -> None:
    import torch

    root = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": f"{root}:{root}/tests",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], __file__, str(work), ",".join(names)],
        env=environment, cwd=work, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for name in names:
        ours, expected = left(work / "out" / f"{name}.safetensors"), alone(name)
        assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert ours["tensors"].keys() == expected["tensors"].keys()
        for key, tensor in expected["tensors"].items():
            torch.testing.assert_close(ours["tensors"][key], tensor, rtol=1e-3, atol=2e-5)
    for rank in (0, 1):
        held = json.loads((work / f"held-{rank}.json").read_text())
        whole = 107_712
        for count, kinds, numbers in held.values():
            assert count == 2
            if launcher == "fsdp2":
                assert kinds == ["DTensor"]
                assert numbers < 0.8 * whole
            else:
                assert kinds == ["Parameter"]
                assert numbers > whole
