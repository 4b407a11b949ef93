"""What the methods do between steps: DyLoRA draws ranks, AdaLoRA shares them out as PEFT's RankAllocator does."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from adaptations import batch, in_peft, peft_name, randomize, tiny, written
from hypothesis import given, settings
from hypothesis import strategies as st

import loratool
from loratool.errors import LoratoolError
from loratool.training.budget import BudgetSchedule, budget_schedule, most_important
from loratool.training.dylora import drawn_rank
from loratool.training.methods import Adaptation, attach
from loratool.training.options import AdaLoRA, DyLoRA, LoRA, Options

if TYPE_CHECKING:
    from tiny_models import TinyModels


def trained(model: Any, adaptation: Adaptation, steps: range, *, rate: float = 0.02) -> None:
    """Take some steps as a training loop does, by plain gradient descent, which has no state."""
    for step in steps:
        adaptation.begin_step(step)
        loss = model(**batch(step)).loss
        penalty = adaptation.penalty()
        (loss if penalty is None else loss + penalty).backward()
        adaptation.after_backward(step)
        with torch.no_grad():
            for factor in adaptation.parameters().values():
                factor.sub_(factor.grad, alpha=rate)  # type: ignore[arg-type]
                factor.grad = None
        adaptation.after_step(step)


def unlabelled() -> dict[str, torch.Tensor]:
    """Tokens without labels, with which PEFT's AdaLoRA that is not trained fails."""
    return {"input_ids": batch()["input_ids"]}


# DyLoRA


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("options", [DyLoRA(rank=4, alpha=6), DyLoRA(rank=4, alpha=6, rslora=True),
                                     DyLoRA(rank=4, alpha=6, scaling_law="kohya")])  # fmt: skip
def test_a_dylora_at_a_rank_is_its_truncation_in_peft(
    options: DyLoRA, rank: int, tiny_models: TinyModels, tmp_path: Path
) -> None:
    model = tiny(tiny_models, "llama")
    adaptation = attach(model, options)
    randomize(adaptation)
    folder = written(adaptation, tmp_path / "adapter")
    adaptation.act_at(rank)
    if rank < 4:
        loratool.truncate(folder, rank=rank, out=tmp_path / "cut")
        folder = tmp_path / "cut"
    theirs = in_peft(tiny(tiny_models, "llama"), folder, trained=False)
    assert torch.allclose(model(**unlabelled()).logits, theirs(**unlabelled()).logits, atol=2e-6)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("update", ["leading", "frozen"])
def test_a_step_has_gradients_for_the_components_of_its_rank_only(
    update: Any, rank: int, tiny_models: TinyModels
) -> None:
    model = tiny(tiny_models, "llama")
    adaptation = attach(model, DyLoRA(rank=4, update=update))
    randomize(adaptation)
    adaptation.act_at(rank)
    model(**batch()).loss.backward()
    expected = [place < rank if update == "leading" else place == rank - 1 for place in range(4)]
    for name, factor in adaptation.parameters().items():
        assert factor.grad is not None
        size = factor.grad.abs().sum(1 if name.endswith(".A") else 0)
        assert (size > 0).tolist() == expected


def test_frozen_components_take_part_and_the_last_has_the_gradient_that_it_has_among_all(
    tiny_models: TinyModels,
) -> None:
    gradients, losses = [], []
    for update in ("leading", "frozen"):
        model = tiny(tiny_models, "llama")
        adaptation = attach(model, DyLoRA(rank=4, update=update))  # type: ignore[arg-type]
        randomize(adaptation)
        adaptation.act_at(3)
        loss = model(**batch()).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: factor.grad for name, factor in adaptation.parameters().items()})
    assert losses[0] == losses[1]
    for name in gradients[0]:
        last = [g[name][2] if name.endswith(".A") else g[name][:, 2] for g in gradients]  # type: ignore[index]
        assert torch.allclose(last[0], last[1], rtol=1e-5, atol=1e-9)


def test_ranks_are_drawn_as_the_distribution_says() -> None:
    draws = 20_000
    for distribution in ("uniform", "geometric"):
        options = DyLoRA(rank=7, least_rank=3, distribution=distribution, geometric_p=0.3)  # type: ignore[arg-type]
        counts = Counter(drawn_rank(options, 1, step) for step in range(draws))
        weights = {rank: 1.0 if distribution == "uniform" else 0.7 ** (rank - 3) for rank in range(3, 8)}
        assert counts.keys() == weights.keys()
        for rank, weight in weights.items():
            share = weight / sum(weights.values())
            assert abs(counts[rank] - draws * share) < 4 * math.sqrt(draws * share * (1 - share))


def test_the_rank_of_a_step_depends_on_seed_and_step_alone(tiny_models: TinyModels) -> None:
    one, other = (attach(tiny(tiny_models, "llama"), DyLoRA(rank=8), targets="q_proj", seed=3) for _ in range(2))
    drawn = []
    for step in range(20):
        one.begin_step(step)
        drawn.append(one.figures()["rank"])
    for step in (19, 4, 0):
        torch.rand(1)
        other.begin_step(step)
        assert other.figures()["rank"] == drawn[step]
    assert drawn != [drawn_rank(DyLoRA(rank=8), 4, step) for step in range(20)]
    assert len(set(drawn)) > 3


def test_an_adapter_acts_at_its_ranks_only(tiny_models: TinyModels) -> None:
    dylora = attach(tiny(tiny_models, "llama"), DyLoRA(rank=4, least_rank=2))
    assert dylora.ranks == (2, 3, 4)
    with pytest.raises(LoratoolError, match="acts at the ranks 2 to 4, and 1 is not one"):
        dylora.act_at(1)
    lora = attach(tiny(tiny_models, "llama"), LoRA(rank=4))
    lora.act_at(4)
    with pytest.raises(LoratoolError, match="acts only at rank 4, not at 2"):
        lora.act_at(2)


# AdaLoRA


def in_pefts_adalora(model: Any, options: AdaLoRA, schedule: BudgetSchedule) -> Any:
    return peft.get_peft_model(
        model,
        peft.AdaLoraConfig(
            task_type="CAUSAL_LM",
            init_r=options.init_r,
            target_r=options.rank,
            tinit=schedule.initial_steps,
            tfinal=schedule.final_steps,
            deltaT=schedule.allocation_steps,
            total_step=schedule.total_steps,
            beta1=options.beta1,
            beta2=options.beta2,
            orth_reg_weight=options.orthogonality,
            target_modules=["q_proj", "v_proj", "down_proj"],
        ),
    )


def test_importance_budget_and_masks_are_those_of_pefts_rank_allocator(tiny_models: TinyModels) -> None:
    options = AdaLoRA(rank=2, initial_rank=5, initial_steps=3, final_steps=6, allocation_steps=2, beta1=0.7, beta2=0.9)
    ours = attach(tiny(tiny_models, "llama"), options, targets="q_proj,v_proj,down_proj", total_steps=25)
    theirs = in_pefts_adalora(tiny(tiny_models, "llama"), options, ours.schedule)  # type: ignore[attr-defined]
    factors = ours.parameters()
    found = dict(theirs.named_parameters())
    generator = torch.Generator().manual_seed(1)
    budgets = []
    for step in range(25):
        for name, factor in factors.items():
            other = found[peft_name(name, "adalora")]
            factor.data.copy_(torch.randn(factor.shape, generator=generator))
            factor.grad = torch.randn(factor.shape, generator=generator)
            other.data.copy_(factor.data)
            other.grad = factor.grad.clone()
        ours.after_backward(step)
        allocator = theirs.base_model.rankallocator
        if step < 19:
            expected = {name: peft_name(name, "adalora").removeprefix("base_model.model.") for name in factors}
            theirs.base_model.update_and_allocate(step)
            for name, other in expected.items():
                sensitivity = allocator.exp_avg_ipt[other]
                uncertainty = allocator.exp_avg_unc[other]
                assert torch.allclose(ours.sensitivity[name], sensitivity, rtol=1e-5)  # type: ignore[attr-defined]
                assert torch.allclose(ours.uncertainty[name], uncertainty, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
        else:
            theirs.base_model.update_and_allocate(step)
        ours.after_step(step)
        for name, factor in factors.items():
            assert torch.equal(factor.data, found[peft_name(name, "adalora")].data), f"{name} at step {step}"
        budgets.append(ours.figures()["budget"])
    assert budgets[:4] == [30] * 4
    assert budgets[-6:] == [12] * 6
    assert sorted(budgets, reverse=True) == budgets
    assert len(set(budgets)) > 5


def test_the_regularization_is_pefts(tiny_models: TinyModels) -> None:
    options = AdaLoRA(rank=2, orthogonality=0.3)
    ours = attach(tiny(tiny_models, "llama"), options, targets="q_proj,v_proj,down_proj", total_steps=25)
    randomize(ours)
    theirs = in_pefts_adalora(tiny(tiny_models, "llama"), options, ours.schedule)  # type: ignore[attr-defined]
    found = dict(theirs.named_parameters())
    for name, factor in ours.parameters().items():
        found[peft_name(name, "adalora")].data.copy_(factor.data)
    without = theirs.base_model.model(**batch()).loss
    wanted = theirs(**batch()).loss - without
    penalty = ours.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    penalty.backward()
    theirs.zero_grad()
    (theirs(**batch()).loss - theirs.base_model.model(**batch()).loss).backward()
    for name, factor in ours.parameters().items():
        if name.endswith(".E"):
            assert factor.grad is None
            continue
        grad = found[peft_name(name, "adalora")].grad
        assert factor.grad is not None
        assert torch.allclose(factor.grad, grad, rtol=1e-4, atol=1e-7)
    assert attach(tiny(tiny_models, "llama"), AdaLoRA(orthogonality=0), total_steps=9).penalty() is None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=3, max_size=3), min_size=1, max_size=5),
       st.integers(0, 15))  # fmt: skip
def test_exactly_the_budget_is_kept_and_nothing_more_important_is_lost(scores: list[list[float]], budget: int) -> None:
    importance = {str(place): torch.tensor(score) for place, score in enumerate(scores)}
    kept = most_important(importance, budget)
    assert sum(int(mask.sum()) for mask in kept.values()) == min(budget, 3 * len(scores))
    best = [float(score) for name, mask in kept.items() for score in importance[name][mask]]
    lost = [float(score) for name, mask in kept.items() for score in importance[name][~mask]]
    assert not best or not lost or min(best) >= max(lost)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 3000), st.integers(1, 9), st.integers(0, 9))
def test_the_default_schedule_falls_from_the_initial_budget_to_the_final_one(steps: int, rank: int, more: int) -> None:
    schedule = budget_schedule(AdaLoRA(rank=rank, initial_rank=rank + more), 7, steps)
    budgets = [schedule.budget(step) for step in range(steps)]
    assert budgets[0] == 7 * (rank + more)
    assert budgets[-1] == 7 * rank
    assert budgets == sorted(budgets, reverse=True)
    assert sum(schedule.allocates(step) for step in range(steps)) >= 1
    assert schedule.allocates(schedule.last_allocation)


@pytest.mark.parametrize("steps", [2, 7, 30])
def test_training_ends_at_the_budget_and_its_file_is_pefts_adalora(
    steps: int, tiny_models: TinyModels, tmp_path: Path
) -> None:
    model = tiny(tiny_models, "llama")
    adaptation = attach(model, AdaLoRA(rank=2), total_steps=steps)
    trained(model, adaptation, range(steps))
    ranks = adaptation.figures()["ranks"]
    assert sum(ranks.values()) == adaptation.figures()["budget"] == 2 * 14
    folder = written(adaptation, tmp_path / "adapter")
    theirs = in_peft(tiny(tiny_models, "llama"), folder, trained=False)
    assert theirs.peft_config["default"].peft_type == "ADALORA"
    assert torch.allclose(model(**unlabelled()).logits, theirs(**unlabelled()).logits, atol=1e-6)
    held = {
        name.removeprefix("base_model.model."): factor.shape[0]
        for name, factor in theirs.named_parameters()
        if "lora_E" in name
    }
    assert {name.removesuffix(".lora_E.default"): rank for name, rank in held.items()} == ranks


@pytest.mark.parametrize("step", [1, 9, 10, 11, 25])
def test_an_adalora_written_in_the_middle_computes_what_it_does(
    step: int, tiny_models: TinyModels, tmp_path: Path
) -> None:
    model = tiny(tiny_models, "llama")
    adaptation = attach(model, AdaLoRA(rank=2, initial_steps=3, final_steps=6, allocation_steps=5), total_steps=30)
    trained(model, adaptation, range(step))
    theirs = in_peft(tiny(tiny_models, "llama"), written(adaptation, tmp_path / "adapter"), trained=False)
    assert torch.allclose(model(**unlabelled()).logits, theirs(**unlabelled()).logits, atol=1e-6)


# All of them


@pytest.mark.parametrize("options", [LoRA(rank=2), DyLoRA(rank=4), DyLoRA(rank=4, update="frozen"), AdaLoRA(rank=2)],
                         ids=["lora", "dylora", "frozen", "adalora"])  # fmt: skip
@pytest.mark.parametrize("at", [5, 12, 21])
def test_parameters_and_buffers_are_all_that_a_run_goes_on_from(
    options: Options, at: int, tiny_models: TinyModels
) -> None:
    def begun() -> tuple[Any, Adaptation]:
        model = tiny(tiny_models, "llama")
        return model, attach(model, options, seed=4, total_steps=25)

    model, whole = begun()
    trained(model, whole, range(at))
    factors = {name: factor.detach().clone() for name, factor in whole.parameters().items()}
    buffers = {name: buffer.clone() for name, buffer in whole.buffers().items()}
    trained(model, whole, range(at, 25))
    other, resumed = begun()
    for name, factor in resumed.parameters().items():
        factor.data.copy_(factors[name])
    resumed.load_buffers(buffers)
    trained(other, resumed, range(at, 25))
    for name, factor in resumed.parameters().items():
        assert torch.equal(factor, whole.parameters()[name]), name
    assert resumed.figures() == whole.figures()


def test_buffers_of_another_adapter_are_refused(tiny_models: TinyModels) -> None:
    lora = attach(tiny(tiny_models, "llama"), LoRA())
    adalora = attach(tiny(tiny_models, "llama"), AdaLoRA(), total_steps=9)
    fewer = attach(tiny(tiny_models, "llama"), AdaLoRA(), targets="q_proj", total_steps=9)
    for adaptation, buffers in ((lora, adalora.buffers()), (adalora, lora.buffers()), (adalora, fewer.buffers())):
        with pytest.raises(LoratoolError, match="holds the state of a different"):
            adaptation.load_buffers(buffers)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: LoRA(rank=0), "the rank is 0 and must be at least 1"),
    (lambda: LoRA(alpha=-1), "alpha is -1 and must be"),
    (lambda: LoRA(alpha=math.nan), "alpha is nan"),
    (lambda: LoRA(dropout=1), "the dropout is 1 and"),
    (lambda: LoRA(initialisation="pissa"), "the initialisation is 'pissa' and must be kaiming or gaussian"),
    (lambda: DyLoRA(rank=4, least_rank=5), "the least rank is 5 and must be from 1 to 4"),
    (lambda: DyLoRA(distribution="poisson"), "the distribution is 'poisson'"),
    (lambda: DyLoRA(geometric_p=1), "p is 1 and must be between 0 and 1"),
    (lambda: DyLoRA(update="all"), "the update is 'all' and must be leading or frozen"),
    (lambda: AdaLoRA(rank=8, initial_rank=7), "the initial rank is 7 and must be at least 8"),
    (lambda: AdaLoRA(beta2=1), "beta2 is 1 and"),
    (lambda: AdaLoRA(orthogonality=-0.1), "orthogonality is -0.1"),
    (lambda: AdaLoRA(final_steps=0), "the number of final steps is 0 and must be at least 1"),
    (lambda: budget_schedule(AdaLoRA(initial_steps=6, final_steps=4), 7, 10), "6 initial and 4 final steps leave none of 10"),
])  # fmt: skip
def test_impossible_choices_are_refused(make: Any, message: str) -> None:
    with pytest.raises(LoratoolError, match=re.escape(message)):
        make()
