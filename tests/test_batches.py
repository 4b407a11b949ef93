"""Batches: every sample once an epoch, packed samples blind to one another, and the same plan whenever it is made."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, VOCABULARY

from loratool.running.data import IGNORED, TokenizedSample
from loratool.training.batches import Row, collate, packs_cleanly, plan_epoch, split_validation

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)
MIXTRAL = transformers.MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=100,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
)
CAUSAL = ["llama", "mistral", "qwen2", "gemma", "gpt2", "gpt_neox"]


def sample(line: int, length: int, scored: int | None = None) -> TokenizedSample:
    """A sample of random tokens, the last `scored` of which count."""
    draw = random.Random(line)
    ids = tuple(draw.randrange(VOCABULARY) for _ in range(length))
    first = length - (length if scored is None else scored)
    return TokenizedSample(line, ids, (IGNORED,) * first + ids[first:])


def samples(*lengths: int) -> list[TokenizedSample]:
    return [sample(line, length) for line, length in enumerate(lengths, 1)]


def lines(plan: list[tuple[Row, ...]]) -> list[int]:
    return [each.line for batch in plan for row in batch for each in row.samples]


def tiny(architecture: str, **changes: Any) -> transformers.PreTrainedModel:
    config = ARCHITECTURES[architecture].config()
    return from_config(config, **changes)


def from_config(config: transformers.PreTrainedConfig, **changes: Any) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config, **changes)
        for parameter in model.parameters():
            parameter.data.normal_(1.0 if parameter.data.eq(1).all() else 0.0, 0.15)
    return model.eval()


@given(LENGTHS, st.integers(1, 5), st.sampled_from([None, 40, 64, 100]), st.integers(0, 3))
def test_every_sample_stands_in_an_epoch_exactly_once(
    lengths: list[int], batch_size: int, row_length: int | None, epoch: int
) -> None:
    plan = plan_epoch(samples(*lengths), batch_size=batch_size, row_length=row_length, seed=1, epoch=epoch)

    assert sorted(lines(plan)) == list(range(1, len(lengths) + 1))
    assert all(1 <= len(batch) <= batch_size for batch in plan)
    assert sum(len(batch) < batch_size for batch in plan) <= 1
    if row_length is None:
        assert all(len(row.samples) == 1 for batch in plan for row in batch)
    else:
        assert all(row.tokens <= row_length for batch in plan for row in batch)


@given(LENGTHS, st.sampled_from([None, 64]))
def test_a_plan_is_the_same_whenever_it_is_made(lengths: list[int], row_length: int | None) -> None:
    given_samples = samples(*lengths)
    first = plan_epoch(given_samples, batch_size=2, row_length=row_length, seed=3, epoch=1)
    random.random()

    assert plan_epoch(given_samples, batch_size=2, row_length=row_length, seed=3, epoch=1) == first


def test_plans_stay_what_they_were_in_any_release() -> None:
    alone = plan_epoch(samples(5, 3, 9, 2, 7), batch_size=2, row_length=None, seed=0, epoch=0)
    packed = plan_epoch(samples(5, 3, 9, 2, 7), batch_size=2, row_length=12, seed=0, epoch=0)

    assert [[[s.line for s in row.samples] for row in batch] for batch in alone] == [[[4]], [[3], [2]], [[5], [1]]]
    assert [[[s.line for s in row.samples] for row in batch] for batch in packed] == [[[4]], [[5, 1], [3, 2]]]


@pytest.mark.parametrize("row_length", [None, 60])
def test_epochs_and_seeds_differ_in_order_and_in_company(row_length: int | None) -> None:
    many = samples(*(random.Random(4).randrange(5, 30) for _ in range(200)))
    companies = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (10, 0), (1, 1)):
        plan = plan_epoch(many, batch_size=4, row_length=row_length, seed=seed, epoch=epoch)
        companies.add(frozenset(frozenset(s.line for row in batch for s in row.samples) for batch in plan))

    assert len(companies) == 5


def test_batches_of_like_length_pad_little_and_packed_rows_less() -> None:
    draw = random.Random(8)
    many = samples(*(int(draw.lognormvariate(4.5, 0.6)) % 500 + 4 for _ in range(1500)))

    def waste(row_length: int | None) -> float:
        plan = plan_epoch(many, batch_size=8, row_length=row_length, seed=0, epoch=0)
        width = [max(row.tokens for row in batch) * len(batch) for batch in plan]
        return 1 - sum(len(s.input_ids) for s in many) / sum(width)

    by_chance = 1 - sum(len(s.input_ids) for s in many) / sum(
        8 * max(len(s.input_ids) for s in many[first : first + 8]) for first in range(0, len(many), 8)
    )
    assert by_chance > 0.4
    assert waste(None) < 0.06
    assert waste(512) < 0.02


def test_what_cannot_be_planned_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 2 has 9 tokens, but a row holds 8"):
        plan_epoch(samples(5, 9), batch_size=1, row_length=8, seed=0, epoch=0)
    with pytest.raises(ValueError, match="0 rows"):
        plan_epoch(samples(5), batch_size=0, row_length=None, seed=0, epoch=0)


@given(st.integers(1, 40), st.data())
def test_validation_takes_so_many_samples_from_the_others(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total - 1))
    every = samples(*[3] * total)
    train, held = split_validation(every, count, seed=7)

    assert len(held) == count
    assert Counter(train + held) == Counter(every)
    assert train == sorted(train, key=lambda each: each.line)
    assert split_validation(every, count, seed=7) == (train, held)


def test_validation_depends_on_the_seed_and_leaves_something_to_train_on() -> None:
    every = samples(*[3] * 50)

    assert split_validation(every, 10, seed=0) != split_validation(every, 10, seed=1)
    for count in (-1, 50, 51):
        with pytest.raises(ValueError, match="for validation"):
            split_validation(every, count, seed=0)


def test_a_batch_of_samples_alone_has_a_mask() -> None:
    batch = collate([Row((TokenizedSample(1, (5, 6, 7), (5, IGNORED, 7)),)), Row((sample(2, 2),))])

    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"][0].tolist() == [5, 6, 7]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, sample(2, 2).labels[1], IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_packed_batch_has_positions_that_begin_again_and_no_mask() -> None:
    rows = [Row((TokenizedSample(1, (5, 6), (5, 6)), TokenizedSample(2, (7, 8, 9), (7, 8, 9)))), Row((sample(3, 3),))]
    batch = collate(rows)

    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    assert batch["labels"][0].tolist() == [IGNORED, 6, IGNORED, 8, 9]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]


@given(LENGTHS, st.sampled_from([None, 64]))
def test_as_many_labels_count_as_the_samples_say(lengths: list[int], row_length: int | None) -> None:
    every = [sample(line, length, scored=1 + line % (length - 1)) for line, length in enumerate(lengths, 1)]
    plan = plan_epoch(every, batch_size=3, row_length=row_length, seed=0, epoch=0)

    counted = [int((collate(batch)["labels"] != IGNORED).sum()) for batch in plan]
    assert counted == [sum(row.scored_tokens for row in batch) for batch in plan]
    assert sum(counted) == sum(each.scored_tokens for each in every)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_packed_sample_has_the_loss_and_the_gradients_that_it_has_alone(architecture: str, attention: str) -> None:
    model = tiny(architecture, attn_implementation=attention)
    every = [sample(1, 9, 4), sample(2, 5), sample(3, 13, 6), sample(4, 4, 1), sample(5, 21)]
    rows = [Row((every[0], every[1], every[3])), Row((every[2],)), Row((every[4],))]

    packed = summed_loss(model, rows)
    packed_gradients = gradients(model, packed)
    alone = torch.stack([summed_loss(model, [Row((each,))]) for each in every]).sum()

    assert packs_cleanly(model)
    torch.testing.assert_close(packed, alone, rtol=2e-6, atol=0)
    torch.testing.assert_close(packed_gradients, gradients(model, alone), rtol=1e-4, atol=1e-4)


def test_the_comparison_above_notices_a_sample_that_sees_the_one_before() -> None:
    model = tiny("llama")
    batch = collate([Row((sample(1, 9), sample(2, 9)))])
    batch["position_ids"] = torch.arange(18).unsqueeze(0)

    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    leaking = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
    clean = summed_loss(model, [Row((sample(1, 9), sample(2, 9)))])

    assert abs(float((leaking / clean).detach()) - 1) > 1e-3


def summed_loss(model: transformers.PreTrainedModel, rows: list[Row]) -> torch.Tensor:
    batch = collate(rows)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def gradients(model: transformers.PreTrainedModel, loss: torch.Tensor) -> torch.Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None])


@pytest.mark.parametrize(
    ("config", "clean"),
    [
        (transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4), False),
        (transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2), False),
        (ARCHITECTURES["opt"].config(), False),
        (MIXTRAL, True),
        (ARCHITECTURES["llama"].config(), True),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_model_in_which_samples_would_see_one_another_is_found_out(
    config: transformers.PreTrainedConfig, clean: bool
) -> None:
    model = from_config(config).train()
    frozen = next(iter(model.children())).eval()
    state = torch.get_rng_state()

    assert packs_cleanly(model) is clean
    assert model.training and not frozen.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_not_suspected_for_its_rounding(dtype: torch.dtype) -> None:
    assert packs_cleanly(tiny("llama").to(dtype))
    assert packs_cleanly(tiny("gpt2").to(dtype))
