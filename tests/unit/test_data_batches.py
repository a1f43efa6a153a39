"""Steps: every token once per epoch, the same however they are shared out, resumable anywhere."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftplan.data.batches import Batches, Sharing, batches, split
from sftplan.data.collate import IGNORED, MicroBatch
from sftplan.data.conversation import Place
from sftplan.data.mask import Example, masked

PLACE = Place(file="data.jsonl", row=1, line=1)


def example(number: int, prompt: int, response: int) -> Example:
    """Ids that tell the example and the position."""
    ids = [1000 * (number + 1) + at for at in range(prompt + response)]
    return masked([(ids[:prompt], False), (ids[prompt:], True)], PLACE)


LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=25)


def made(lengths: list[tuple[int, int]], *, packing: bool, **options: object) -> Batches:
    examples = [example(i, p, r) for i, (p, r) in enumerate(lengths)]
    settings: dict[str, object] = {"sharing": Sharing(micro_batch=2), "seq_len": 32, **options}
    return batches(examples, packing=packing, **settings)  # type: ignore[arg-type]


def documents(batch: MicroBatch) -> list[list[int]]:
    """The ids between boundaries, padding left out."""
    bounds = batch.cu_seqlens[: batch.num_documents + 1]
    parts = [batch.input_ids[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    return [part for part in parts if part[0] != 0]


@given(lengths=LENGTHS, packing=st.booleans(), seed=st.integers(0, 5))
def test_an_epoch_has_every_target_once_after_its_own_token(
    lengths: list[tuple[int, int]], seed: int, *, packing: bool
) -> None:
    run = made(lengths, packing=packing, seed=seed)
    seen: Counter[int] = Counter()
    for step in run.steps():
        for batch in step.micro_batches:
            for position, target in zip(
                batch.keep[: batch.num_targets], batch.targets[: batch.num_targets], strict=True
            ):
                assert batch.input_ids[position] == target - 1  # never another example's token
                assert batch.positions[position] == (target - 1) % 1000
                seen[target] += 1
        assert step.num_targets == sum(batch.num_targets for batch in step.micro_batches)
        assert step.num_tokens == sum(batch.num_tokens for batch in step.micro_batches)
    expected = [
        token
        for each in run.examples
        for token, trained in zip(each.input_ids, each.trained, strict=True)
        if trained
    ]
    assert seen == Counter(expected)


@given(lengths=LENGTHS, packing=st.booleans(), epochs=st.sampled_from([0.5, 1.0, 2.5]))
def test_all_micro_batches_have_one_shape(
    lengths: list[tuple[int, int]], epochs: float, *, packing: bool
) -> None:
    run = made(lengths, packing=packing, epochs=epochs)
    shape = run.shape
    for step in run.steps():
        for batch in (*step.micro_batches, run.heaviest()):
            assert len(batch.input_ids) == len(batch.positions) == shape.rows * shape.row_len
            assert len(batch.keep) == len(batch.targets) == shape.target_capacity
            assert len(batch.cu_seqlens) == shape.document_capacity + 1
            assert set(batch.targets[batch.num_targets :]) <= {IGNORED}
            assert list(batch.cu_seqlens) == sorted(batch.cu_seqlens)
            assert batch.cu_seqlens[-1] == len(batch.input_ids)
            assert batch.max_document_tokens <= shape.row_len
            assert sorted(documents(batch)) == sorted(
                run.examples[index].input_ids.tolist() for index in batch.examples
            )
            assert sum(label != IGNORED for label in batch.labels()) == batch.num_targets


@given(lengths=LENGTHS, packing=st.booleans())
def test_a_step_is_the_same_however_it_is_shared_out(
    lengths: list[tuple[int, int]], *, packing: bool
) -> None:
    shares = [
        Sharing(micro_batch=4),
        Sharing(micro_batch=1, accumulation=4),
        Sharing(micro_batch=1, accumulation=2, world_size=2),
        Sharing(micro_batch=2, world_size=2),
    ]
    seen = []
    for share in shares:
        run = made(lengths, packing=packing, sharing=share)
        steps = [
            [run.step(0, index, rank=rank) for rank in range(share.world_size)]
            for index in range(run.steps_per_epoch)
        ]
        assert all(len({(s.num_targets, s.num_tokens) for s in ranks}) == 1 for ranks in steps)
        seen.append(
            [
                (
                    ranks[0].num_targets,
                    sorted(i for s in ranks for b in s.micro_batches for i in b.examples),
                )
                for ranks in steps
            ]
        )
    assert all(each == seen[0] for each in seen)


@given(lengths=LENGTHS, packing=st.booleans(), stop=st.integers(0, 40))
def test_a_run_resumes_anywhere(
    lengths: list[tuple[int, int]], stop: int, *, packing: bool
) -> None:
    run = made(lengths, packing=packing, epochs=3.0)
    whole = list(run.steps())
    assert len(whole) == run.num_steps
    stop = min(stop, len(whole) - 1)
    start = (whole[stop].epoch, whole[stop].index)
    assert list(made(lengths, packing=packing, epochs=3.0).steps(start=start)) == whole[stop:]


def test_epochs_differ_and_seeds_differ() -> None:
    run = made([(3, 4)] * 20, packing=False, epochs=2.0)
    other = made([(3, 4)] * 20, packing=False, epochs=2.0, seed=1)

    def order(of: Batches, epoch: int) -> list[tuple[int, ...]]:
        return [
            batch.examples
            for step in of.steps()
            if step.epoch == epoch
            for batch in step.micro_batches
        ]

    assert order(run, 0) != order(run, 1)
    assert order(run, 0) != order(other, 0)


def test_train_on_prompt_targets_everything_but_the_first_token() -> None:
    run = made([(3, 4), (2, 2)], packing=True, train_on_prompt=True)
    assert run.step(0, 0).num_targets == 6 + 3


def test_the_heaviest_micro_batch_has_the_most_targets_of_the_run() -> None:
    run = made([(2, n) for n in range(1, 20)], packing=False)
    most = max(b.num_targets for step in run.steps() for b in step.micro_batches)
    assert run.heaviest().num_targets == most


def test_rows_end_in_padding_that_is_a_document_of_its_own() -> None:
    batch = made([(3, 4)], packing=False, row_len=16).step(0, 0).micro_batches[0]
    assert list(batch.cu_seqlens) == [0, 7, 16, 32]
    assert list(batch.positions[:16]) == [*range(7), *range(9)]
    assert (batch.num_documents, batch.num_tokens, batch.max_document_tokens) == (3, 7, 16)


def test_arrays_become_tensors_without_a_copy() -> None:
    torch = pytest.importorskip("torch")
    batch = made([(3, 4)], packing=True).step(0, 0).micro_batches[0]
    tensor = torch.frombuffer(batch.input_ids, dtype=torch.int64)
    assert tensor.tolist() == batch.input_ids.tolist()
    bounds = torch.frombuffer(batch.cu_seqlens, dtype=torch.int32)
    assert bounds.tolist() == batch.cu_seqlens.tolist()


def test_split_is_fixed_by_the_seed() -> None:
    train, held_out = split(100, fraction=0.1, seed=3)
    assert (len(train), len(held_out)) == (90, 10)
    assert not set(train) & set(held_out)
    assert split(100, fraction=0.1, seed=3) == (train, held_out)
    assert split(100, fraction=0.1, seed=4) != (train, held_out)
