"""`loratool train`: the curve of a plain torch loop, the same bytes for the same seed, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file
from test_eval import CHATML, tiny_tokenizer, with_tokenizer, write_lines
from torch.nn.functional import cross_entropy

import loratool
from loratool.cli import main
from loratool.errors import DataError, LoratoolError, OutputError
from loratool.library.places.training_run import run_folder
from loratool.library.train import TrainingStopped, TrainResult
from loratool.library.training_runs.picture import draw_training
from loratool.library.training_runs.progress import SilentTraining
from loratool.running.data import IGNORED, read_data, tokenize_data
from loratool.running.loss import summed_loss
from loratool.training.batches import Row, collate, plan_epoch, split_validation
from loratool.training.log import read_log
from loratool.training.methods import attach
from loratool.training.recipe import differences
from registry import RegistryError, home

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiny_models import TinyModels

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")
WORDS = ["the", "cat", "dog", "mat", "sat", "on", "a", "what"]
STEPS, LR = 8, 1e-2


@pytest.fixture(scope="module")
def base(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    return with_tokenizer(tiny_models.folder("llama", "bf16"), folder, tiny_tokenizer(template=CHATML))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty prompts and completions of two to eight words."""
    draw = random.Random(1)

    def words() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 8)))

    file = tmp_path_factory.mktemp("data") / "cats.jsonl"
    return write_lines(file, *({"prompt": words(), "completion": f"{words()}!"} for _ in range(40)))


@pytest.fixture
def run(base: Path, data: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """Train for a few steps on the CPU, by default into ``<name>.safetensors`` in the test's folder."""

    def trained(name: str = "cat", **options: Any) -> TrainResult:
        settings = {"base": base, "data": data, "steps": STEPS, "batch_size": 8, "lr": LR, "validation": 4} | options
        settings.setdefault("device", "cpu")
        settings.setdefault("out", tmp_path / f"{name}.safetensors")
        return loratool.train(name=name, **settings)

    return trained


class InterruptedAt(SilentTraining):
    """Presses Ctrl-C once in each of these steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = set(steps)

    def stepped(self, report: Any) -> None:
        if report.step in self.steps:
            self.steps.remove(report.step)
            os.kill(os.getpid(), signal.SIGINT)


def steps_of(result: TrainResult) -> list[dict[str, Any]]:
    return [entry for entry in read_log(result.log) if "lr" in entry]


def untimed(result: TrainResult) -> list[dict[str, Any]]:
    """The whole log, but for what equal runs do not have in common."""
    measured = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return [{key: value for key, value in entry.items() if key not in measured} for entry in read_log(result.log)]


def dense(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# What a run comes to


def test_a_trained_adapter_is_catalogued_with_its_base_its_recipe_and_its_loss(
    base: Path, data: Path, run: Callable[..., TrainResult]
) -> None:
    record = loratool.base_add("llama", base)
    result = run(base="llama", steps=20)
    shown = loratool.show("cat").record
    assert shown == result.record
    assert (shown.kind, shown.rank, shown.alpha, shown.base) == ("lora", 8, 16, "llama")
    assert shown.base_fingerprint == record.fingerprint
    assert shown.recipe == result.recipe.to_json()
    assert shown.recipe["steps"] == 20
    assert shown.recipe["samples"] == 40
    assert shown.metrics == result.outcome.to_json()
    assert shown.metrics.keys() >= {"loss", "perplexity", "tokens_per_second", "peak_memory_bytes"}
    assert result.outcome.loss < result.outcome.loss_before - 0.5
    assert result.outcome.perplexity == pytest.approx(math.exp(result.outcome.loss))


def test_the_loss_that_is_said_is_that_of_eval_on_the_samples_held_out(
    base: Path, data: Path, run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    result = run()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    lines = data.read_text().splitlines(keepends=True)
    _, held_out = split_validation(tokenize_data(read_data(data), tokenizer, 64), 4, 0)
    kept = tmp_path / "held-out.jsonl"
    kept.write_text("".join(lines[sample.line - 1] for sample in held_out))
    measured = loratool.eval(base, kept, adapter="cat", device="cpu")
    assert measured.score.loss == pytest.approx(result.outcome.loss, rel=1e-5)
    assert measured.without_adapter is not None
    assert measured.without_adapter.loss == pytest.approx(result.outcome.loss_before, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"schedule": "linear", "warmup": 0, "clip": 0.0}], ids=str)
def test_the_curve_is_that_of_a_plain_torch_loop_with_peft(
    base: Path, data: Path, run: Callable[..., TrainResult], options: dict[str, Any]
) -> None:
    result = run(keep="last", weight_decay=0.1, **options)
    recipe = result.recipe
    samples = tokenize_data(read_data(data), transformers.AutoTokenizer.from_pretrained(base), 64)
    training, _ = split_validation(samples, 4, 0)
    model = peft.get_peft_model(
        dense(base), peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    ours = attach(dense(base), recipe.adapter, seed=0).parameters()
    theirs = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for name, parameter in theirs.items():
        module, _, letter = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".lora_")
        parameter.data.copy_(ours[f"{module}.{letter}"].data)
    optimizer = torch.optim.AdamW(theirs.values(), lr=1.0, weight_decay=0.1)
    batches = [
        batch
        for epoch in range(3)
        for batch in plan_epoch(training, batch_size=8, row_length=None, seed=0, epoch=epoch)
    ]
    curve = []
    model.train()
    for step in range(STEPS):
        batch = collate(batches[step])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), recipe.clip)
        warmup = recipe.warmup
        if step < warmup:
            factor = (step + 1) / (warmup + 1)
        else:
            done = (step - warmup) / (STEPS - warmup)
            factor = 1 - done if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = LR * factor
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    assert [entry["loss"] for entry in steps_of(result)] == pytest.approx(curve, rel=1e-5)
    written = load_file(result.out)
    for name, parameter in theirs.items():
        torch.testing.assert_close(written[name.replace(".default.", ".")], parameter.data, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["lora", "dylora", "adalora"])
def test_peft_gives_every_methods_adapter_the_loss_of_eval(
    method: str, base: Path, data: Path, run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    result = run(method=method, rank=4, out=tmp_path / "folder", steps=12)
    assert result.record.kind == method
    model = peft.PeftModel.from_pretrained(dense(base), tmp_path / "folder").eval()
    samples = tokenize_data(read_data(data), transformers.AutoTokenizer.from_pretrained(base), 64)
    summed = tokens = 0.0
    for sample in samples:
        with torch.no_grad():  # without labels: PEFT's AdaLoRA wants to train where it is given some
            logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1]
        summed += float(cross_entropy(logits, torch.tensor(sample.labels[1:]), ignore_index=IGNORED, reduction="sum"))
        tokens += sample.scored_tokens
    ours = loratool.eval(base, data, adapter="cat", device="cpu").score.loss
    assert ours == pytest.approx(summed / tokens, rel=1e-3)
    assert ours < loratool.eval(base, data, device="cpu").score.loss


def test_a_dylora_says_its_loss_at_every_rank_and_draws_them(run: Callable[..., TrainResult], base: Path) -> None:
    result = run(method="dylora", rank=4, steps=12)
    assert list(result.outcome.loss_by_rank) == [1, 2, 3, 4]
    assert result.outcome.loss_by_rank[4] == pytest.approx(result.outcome.loss, rel=1e-6)
    assert {entry["rank"] for entry in steps_of(result)} <= {1, 2, 3, 4}
    assert result.plot is not None
    assert result.plot.read_bytes().startswith(b"\x89PNG")


def test_an_adalora_ends_at_its_budget_and_logs_its_ranks(run: Callable[..., TrainResult]) -> None:
    result = run(method="adalora", rank=2, initial_rank=4, steps=20, initial_steps=2, final_steps=5, allocation_steps=1)
    ranks = result.record.ranks
    assert ranks is not None
    assert sum(ranks.values()) == 2 * 14
    logged = [sum(entry["ranks"].values()) for entry in steps_of(result) if "ranks" in entry]
    assert logged[0] == 4 * 14
    assert logged[-1] == 2 * 14
    assert logged == sorted(logged, reverse=True)
    pruned = loratool.prune("cat", budget=14, out=result.out.with_name("pruned.st"))
    assert (pruned.criterion, sum(pruned.ranks.values())) == ("importance", 14)
    with pytest.raises(LoratoolError, match="budget near the end"):
        run("best", method="adalora", keep="best")


def test_the_command_says_the_average_rank_of_an_adalora_and_how_to_merge_it(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--base", base, "--data", data, "--name", "cat", "--out", tmp_path / "cat.st", "--device", "cpu")
    options = ("--method", "adalora", "--rank", 2, "--initial-rank", 4, "--steps", 20, "--final-steps", 5)
    monkeypatch.setattr("sys.argv", ["loratool", "train", *map(str, (*words, *options))])
    with pytest.raises(SystemExit, match="0"):
        main()
    ranks = loratool.show("cat").record.ranks
    assert ranks is not None
    spread = f"{min(ranks.values())} to {max(ranks.values())}"
    said = capsys.readouterr().out
    assert f"adalora, rank 2 on average ({spread}), on" in said
    assert f"loratool merge cat --into {base}\n" in said  # the base is not in the catalogue


def test_ranks_are_drawn_as_steps_to_the_end_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [{"step": step, "loss": 1.0, "lr": 0.1} for step in range(1, 11)]
    steps[0]["ranks"], steps[3]["ranks"] = {"a": 3, "b": 3}, {"a": 1, "b": 3}
    log = write_lines(tmp_path / "log.jsonl", *steps)
    figure = Figure()
    monkeypatch.setattr("loratool.library.training_runs.picture.drawn", lambda *_, **__: contextlib.nullcontext(figure))
    draw_training(log, tmp_path / "ranks.png", "ranks", loss_by_rank={}, force=False)
    (average,) = figure.axes[1].lines
    assert average.get_drawstyle() == "steps-post"
    assert [list(points) for points in average.get_data()] == [[1, 4, 10], [3, 2, 2]]


def test_the_best_evaluation_is_kept_or_the_last(run: Callable[..., TrainResult]) -> None:
    """At a rate that spoils what was learned, the best is not the last."""
    options = {"schedule": "constant", "lr": 0.1, "steps": 8, "eval_every": 2}
    best, last = run("best", **options), run("last", keep="last", **options)
    losses = [entry["validation_loss"] for entry in read_log(best.log) if "validation_loss" in entry]
    assert len(losses) == 5
    assert best.outcome.loss == min(losses[1:]) < losses[-1] == last.outcome.loss
    assert best.record.sha256 != last.record.sha256


# The same, however it is computed


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(run: Callable[..., TrainResult]) -> None:
    first, again, other = run("a", dropout=0.1), run("b", dropout=0.1), run("c", dropout=0.1, seed=1)
    assert first.record.sha256 != other.record.sha256
    ours, theirs = first.out.read_bytes(), again.out.read_bytes()
    assert ours == theirs


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"accumulate": 8}, {"gradient_checkpointing": True}, {"pack": True}], ids=str
)
def test_passes_checkpointing_and_packing_do_not_change_the_loss_of_a_whole_epoch(
    options: dict[str, Any], run: Callable[..., TrainResult]
) -> None:
    """All samples in one step, so that the order does not matter."""
    plain = steps_of(run("plain", batch_size=36, steps=3))
    other = steps_of(run("other", batch_size=36, steps=3, **options))
    assert [entry["loss"] for entry in other] == pytest.approx([entry["loss"] for entry in plain], rel=1e-5)


def test_logits_are_made_for_tokens_that_count_alone(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = torch.nn.functional.cross_entropy

    def counting(logits: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if logits.requires_grad:
            seen.append(len(logits))
        return original(logits, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", counting)
    heads = []
    linear = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self.out_features == 131 and torch.is_grad_enabled() and x.requires_grad:
            heads.append(x.shape[:-1].numel())
        return linear(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    result = run(steps=2)
    read = sum(entry["tokens"] for entry in steps_of(result))
    assert heads == seen
    assert 0 < sum(heads) < read


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox", "mistral", "qwen2", "gemma"])
def test_the_loss_of_a_step_is_transformers_own_for_every_architecture(
    architecture: str, tiny_models: TinyModels, data: Path, tmp_path: Path
) -> None:
    folder = with_tokenizer(
        tiny_models.folder(architecture, "fp32"), tmp_path / architecture, tiny_tokenizer(template=CHATML)
    )
    model = dense(folder).eval()
    samples = tokenize_data(read_data(data), transformers.AutoTokenizer.from_pretrained(folder), 64)[:5]
    batch = collate([Row((sample,)) for sample in samples])
    expected = model(**batch).loss * sum(sample.scored_tokens for sample in samples)
    assert summed_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-6)
    result = loratool.train(folder, data, name="cat", out=tmp_path / "cat", steps=2, lr=LR, validation=4, device="cpu")
    assert loratool.eval(folder, data, adapter=result.out, device="cpu").gap is not None


# Interrupted, and gone on


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.2},
        {"method": "dylora"},
        {"method": "adalora", "validation": 0},
        {"quantize": "nf4", "pack": True},
    ],
    ids=str,
)
def test_a_run_that_was_interrupted_ends_with_the_bytes_of_one_that_was_not(
    options: dict[str, Any], run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(out=tmp_path / "whole.safetensors", **options)
    monkeypatch.setenv("LORATOOL_HOME", str(tmp_path / "home"))
    with pytest.raises(TrainingStopped, match=r"after step 3 of 8.*loratool train --name cat --resume"):
        run(progress=InterruptedAt(3), **options)
    assert loratool.list() == ()
    with pytest.raises(TrainingStopped, match="after step 6 of 8"):
        loratool.train(name="cat", resume=True, progress=InterruptedAt(6))
    result = loratool.train(name="cat", resume=True)
    assert result.out == tmp_path / "cat.safetensors"
    assert result.out.read_bytes() == whole.out.read_bytes()
    assert untimed(result) == untimed(whole)
    assert not run_folder("cat").path.exists()


@pytest.mark.parametrize("method", ["lora", "dylora", "adalora"])
def test_the_learning_rate_is_by_default_a_thousandth(method: str, run: Callable[..., TrainResult]) -> None:
    result = run(method=method, lr=None)
    assert result.recipe.lr == 1e-3
    assert max(entry["lr"] for entry in steps_of(result)) == 1e-3


def test_epochs_are_times_through_the_samples(run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(steps=None, epochs=3).recipe.steps == 3 * math.ceil(36 / 8)
    planned: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        planned.append(options["epoch"])
        return plan_epoch(*arguments, **options)

    monkeypatch.setattr("loratool.library.training_runs.inputs.plan_epoch", counted)
    with pytest.raises(TrainingStopped, match=r"step 1 of 5,000;"):
        run("long", steps=None, epochs=1000, progress=InterruptedAt(1))
    assert planned == [0]


def test_what_truncate_cuts_is_counted_and_said(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    samples = [{"text": "the cat sat"}] * 5 + [{"text": "the cat sat on a mat " * 3}] * 2
    file = write_lines(tmp_path / "long.jsonl", *samples)
    with pytest.raises(DataError, match=r"line 6 of .* is 22 tokens long and 10 are allowed"):
        run(data=file, max_length=10, validation=1)
    result = run(data=file, max_length=10, validation=1, truncate=True, steps=1)
    assert "2 of 7 samples were cut to 10 tokens" in result.notes
    file = write_lines(tmp_path / "one.jsonl", *samples[:6])
    result = run("one", data=file, max_length=10, validation=1, truncate=True, steps=1)
    assert "1 of 6 samples was cut to 10 tokens" in result.notes


def test_a_run_goes_on_only_with_what_it_began_with(
    run: Callable[..., TrainResult], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoratoolError, match="no run 'cat' to go on with"):
        run(resume=True)
    with pytest.raises(TrainingStopped):
        run(progress=InterruptedAt(2))
    for options, named in (
        ({"lr": 0.5, "rank": 4}, "--rank was '8', --alpha was '16.0', --lr was '0.01'"),
        ({"steps": 99}, "--steps was '8'"),
        ({"seed": 5}, "--seed was '0'"),
        ({"data": write_lines(tmp_path / "other.jsonl", *([{"text": "a cat sat"}] * 40))}, "--data was 'cats.jsonl'"),
    ):
        with pytest.raises(LoratoolError, match="started with other choices") as caught:
            loratool.train(name="cat", resume=True, **options)
        assert named in str(caught.value)
    with pytest.raises(LoratoolError, match=r"not finished \(step 2 is kept\).*--resume.*--force"):
        run()
    assert run_folder("cat").kept_step() == 2
    assert run(force=True).record.version == 1


def test_a_loss_that_is_no_number_stops_the_run_with_the_last_good_state_kept(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def overflowing(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return summed_loss(*arguments) * (float("nan") if len(calls) == 4 else 1)

    with monkeypatch.context() as patched:
        patched.setattr("loratool.training.loop.summed_loss", overflowing)
        with pytest.raises(
            LoratoolError, match=r"the loss is nan at step 4, so the step was not made.*smaller --lr and --force"
        ):
            run(method="adalora", rank=2)
    assert loratool.list() == ()
    assert list(tmp_path.iterdir()) == []
    assert run_folder("cat").kept_step() == 3
    gone_on = loratool.train(name="cat", resume=True)
    assert gone_on.record.sha256 == run("whole", method="adalora", rank=2).record.sha256


def test_too_little_memory_says_what_takes_less(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(*arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("loratool.training.loop.summed_loss", overflowing)
    with pytest.raises(LoratoolError, match=r"too little memory for a step of 8 samples.*--accumulate"):
        run()


def test_a_rate_that_spoils_everything_is_named(run: Callable[..., TrainResult]) -> None:
    def spoilt() -> TrainResult:
        return run(lr=1000.0, clip=0.0, schedule="constant", warmup=0, eval_every=1, alpha=1e30)

    with pytest.raises(LoratoolError, match=r"(after|at) step \d.*smaller --lr"):
        spoilt()


def test_a_state_that_cannot_be_written_is_a_clear_error_and_the_one_before_is_kept(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    import loratool.checkpoint.staging as staging

    original, calls = staging.sync_file, []

    def full(file: Path) -> None:
        if "state.safetensors" in file.name:
            calls.append(file)
            if len(calls) == 3:
                raise OSError(28, os.strerror(28), str(file))
        original(file)

    monkeypatch.setattr(staging, "sync_file", full)
    with pytest.raises(OutputError, match=r"No space left.*free some space; the state of step 2 is kept, go on with"):
        run(save_every=1)
    assert run_folder("cat").kept_step() == 2
    assert loratool.list() == ()
    loratool.train(name="cat", resume=True)
    assert [record.name for record in loratool.list()] == ["cat"]


def test_an_adapter_that_cannot_be_written_can_be_written_later_without_training_again(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OutputError("the disk is full; free some space")

    with monkeypatch.context() as patched:
        patched.setattr("loratool.library.training_runs.output.bring_up", full)
        with pytest.raises(
            LoratoolError, match=r"is trained, but the disk is full.*'loratool train --name cat --resume'"
        ):
            run()
    assert loratool.list() == ()
    assert list(tmp_path.iterdir()) == []
    assert len(steps_of(loratool.train(name="cat", resume=True))) == STEPS


def test_without_matplotlib_the_picture_is_left_out_with_a_note(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(steps=2)
    assert result.record.reference == "cat@1"
    assert (result.plot, result.out.exists(), result.log.exists()) == (None, True, True)
    assert any("no picture was drawn" in note and "loratool[plot]" in note for note in result.notes)


def test_two_processes_do_not_train_one_name_at_once(run: Callable[..., TrainResult]) -> None:
    class Meddling(SilentTraining):
        def stepped(self, report: Any) -> None:
            with pytest.raises(OutputError, match="another process is training 'cat'"):
                run(force=True)

    assert run(steps=1, progress=Meddling()).record.reference == "cat@1"


def test_a_state_that_was_damaged_is_refused_and_force_begins_anew(run: Callable[..., TrainResult]) -> None:
    with pytest.raises(TrainingStopped):
        run(progress=InterruptedAt(2))
    state = run_folder("cat").state
    state.write_bytes(state.read_bytes()[:-100])
    for options in ({"resume": True}, {}):
        with pytest.raises(
            LoratoolError, match="is not the state of a training run; remove its folder and train again"
        ):
            run(**options)
    assert len(steps_of(run(force=True))) == STEPS


# QLoRA


def test_a_base_in_nf4_is_trained_as_it_is_and_a_dense_one_is_quantized_on_load(
    base: Path, run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    dense_base = loratool.base_add("llama", base)
    quantized = loratool.quantize("llama", out=tmp_path / "nf4", name="llama-nf4")
    on_load = run("on-load", base="llama", quantize="nf4")
    beside = run("beside", base="llama-nf4")
    plain = run("plain", base="llama")
    assert steps_of(on_load)[0]["loss"] == pytest.approx(steps_of(beside)[0]["loss"], abs=1e-6)
    assert on_load.record.sha256 != plain.record.sha256
    assert (on_load.recipe.quantize, beside.recipe.quantize) == ("nf4", None)
    assert (on_load.record.base, on_load.record.base_fingerprint) == ("llama", dense_base.fingerprint)
    assert (beside.record.base, beside.record.base_fingerprint) == ("llama-nf4", quantized.output_fingerprint)
    for name in ("on-load", "beside"):
        for into in ("llama", "llama-nf4"):
            loratool.merge(name, into=into, out=tmp_path / f"{name}-{into}", dry_run=True)
    again = run("again", base="llama-nf4", quantize="nf4")
    assert any("in NF4 already" in note for note in again.notes)


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--rank is '0'"),
        ({"lr": float("nan")}, "--lr is 'nan'"),
        ({"lr": -1.0}, "--lr is '-1.0' and must be above 0"),
        ({"out": "/proc/cat.safetensors"}, "cannot write to '/proc'"),
        ({"steps": 0}, "--steps"),
        ({"epochs": 2}, "--steps and --epochs"),
        ({"least_rank": 2}, "--least-rank is for --method dylora"),
        ({"initial_rank": 2}, "--initial-rank is for --method adalora"),
        ({"batch_size": 2, "accumulate": 3}, "--accumulate"),
        ({"max_length": 1}, "--max-length"),
        ({"max_length": 65}, "64 tokens at most"),
        ({"max_length": 8}, "line 1 of"),
        ({"validation": 40}, "leaves none of the samples"),
        ({"validation": 0, "keep": "best"}, "--keep best needs"),
        ({"targets": "q_prj"}, "q_prj"),
        ({"targets": "embed_tokens"}, "embed_tokens"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"base": "nowhere"}, "nowhere"),
        ({"method": "dora"}, "--method is 'dora'"),
        ({"colour": "red"}, "no option 'colour'"),
        ({"quantize": "int8"}, "--quantize"),
        ({"name": "../up"}, "up"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_left(
    options: dict[str, Any], message: str, run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    with pytest.raises((LoratoolError, RegistryError)) as caught:
        run(**options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert not list((home() / "runs").glob("*"))
    assert loratool.list() == ()


def test_a_name_and_an_output_that_are_taken_are_refused_before_training(
    run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    run()
    with pytest.raises(LoratoolError, match=r"'cat@1' already.*--force for its next version"):
        run(out=tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="exists already"):
        run("dog", out=tmp_path / "cat.safetensors")
    (tmp_path / "bird.train.jsonl").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run("bird")
    again = run(force=True, seed=3)
    assert again.record.version == 2


def test_a_base_that_changed_or_lacks_its_tokenizer_is_refused(
    tiny_models: TinyModels, run: Callable[..., TrainResult], tmp_path: Path, data: Path
) -> None:
    folder = with_tokenizer(tiny_models.folder("llama", "fp32"), tmp_path / "llama", tiny_tokenizer())
    loratool.base_add("mine", folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = write_lines(tmp_path / "chat.jsonl", {"messages": turns})
    with pytest.raises(DataError, match="no chat template"):
        run(base="mine", data=chats, validation=0)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(LoratoolError, match="not those that were catalogued"):
        run(base="mine")
    bare = tiny_models.folder("gpt2", "fp32")
    with pytest.raises(LoratoolError, match="cannot load the tokenizer"):
        run(base=bare)


# The command line


def test_the_command_says_what_is_missing_with_an_example(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loratool.base_add("llama", base)
    monkeypatch.setattr("sys.argv", ["loratool", "train"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert (
        "--base, --data and --name are missing; such as: loratool train --base llama --data my.jsonl --name mine"
        in said
    )


def test_the_command_trains_says_what_it_learned_and_prints_json(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--base", str(base), "--data", str(data), "--steps", "4", "--lr", "0.01", "--device", "cpu"]
    for extra in (["--name", "cat"], ["--name", "dog", "--json", "--method", "dylora", "--rank", "2"]):
        monkeypatch.setattr("sys.argv", ["loratool", "train", *words, *extra])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        said = capsys.readouterr()
        if "--json" in extra:
            printed = json.loads(said.out)
            assert printed["name"] == "dog"
            assert printed["loss_by_rank"].keys() == {"1", "2"}
            assert Path(printed["out"]).exists()
        else:
            assert "before" in said.out
            assert "Next: loratool show cat" in said.out
            assert "step 4 of 4: held-out loss" in said.err
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{suffix}" for name in ("cat", "dog") for suffix in (".safetensors", ".train.jsonl", ".train.png")
    }


def test_an_interrupted_command_says_how_to_go_on(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loratool.cli import training_bar

    monkeypatch.setattr(training_bar.TrainingBar, "stepped", lambda self, report: os.kill(os.getpid(), signal.SIGINT))
    words = ["--base", str(base), "--data", str(data), "--steps", "4", "--device", "cpu", "--name", "cat"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["loratool", "train", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert "Go on with 'loratool train --name cat --resume'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_recipes_differ_by_the_names_of_options() -> None:
    assert differences(
        {"lr": 1, "base_fingerprint": "a", "base": "x"}, {"lr": 2, "base_fingerprint": "b", "base": "y"}
    ) == [
        "lr",
        "base",
    ]
