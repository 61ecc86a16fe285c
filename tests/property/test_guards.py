"""Guards under any losses, any cut of the samples, any torn file: what is a spike, who is named, what the loader counts, what memory advice keeps."""
import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.data.packing import PackedDataset, pack_rows
from fengshen.data.sampler import GlobalBatchSampler, TrainLoader
from fengshen.training.guards import (
    FIRST,
    FLOOR,
    ON_NAN,
    WARMUP,
    Guards,
    Part,
    ceiling,
    figure,
    lighter,
    listed,
    memory_advice,
    offenders,
    probe,
    ran_out,
)
from fengshen.training.module import finite_or_nan

settings.register_profile("house", deadline=None)  # a loaded machine is not a failure
settings.load_profile("house")
losses = st.lists(st.floats(0, 20), min_size=WARMUP, max_size=100)


# Spikes


@given(losses, st.floats(-5, 5))
def test_a_ceiling_is_above_the_middle_and_moves_with_it(values, shift):
    top = ceiling(values)
    assert top >= sorted(values)[len(values) // 2 - (len(values) % 2 == 0)] + FLOOR - 1e-9
    assert ceiling([v + shift for v in values]) == pytest.approx(top + shift, abs=1e-6)


@given(losses, st.floats(1, 10))
def test_a_larger_factor_allows_more(values, factor):
    assert ceiling(values, factor) <= ceiling(values, factor + 1)


@given(st.floats(0, 20), st.integers(WARMUP, 100))
def test_a_flat_loss_is_no_spike(value, count):
    assert value < ceiling([value] * count) < value + 2 * FLOOR


@given(st.lists(st.floats(0, 20), max_size=WARMUP - 1))
def test_nothing_is_a_spike_at_the_start(values):
    assert ceiling(values) == math.inf


@given(losses, st.lists(st.floats(100, 1e6), max_size=10))
def test_a_fifth_of_spikes_does_not_hide_the_next(values, spikes):
    "The estimates are of the middle: wild values that are few move the ceiling by the spread of the others at most."
    assert ceiling(values + spikes) <= max(values) + max(FLOOR, 6 * 1.4826 * (max(values) - min(values))) + 1e-9


# Names


parts = st.lists(st.tuples(st.sampled_from([1.0, math.nan, math.inf]), st.sets(st.integers(0, 99), min_size=1, max_size=4)), min_size=1, max_size=6)


@given(parts)
def test_the_guilty_are_named_or_all_of_them(cut):
    step = [Part(torch.tensor(loss), numbers, set(), 1) for loss, numbers in cut]
    guilty = set().union(*(n for loss, n in cut if not math.isfinite(loss)))
    assert offenders(step, lambda p: not math.isfinite(p.loss)) == sorted(guilty or set().union(*(n for _, n in cut)))


class Samples(list):
    "Number i has i % 5 scored tokens behind the first one."

    line, file, files = [3 * i + 1 for i in range(100)], [i % 2 for i in range(100)], ["a", "b"]
    lengths = [5] * 100

    def __getitem__(self, i):
        i = list.__getitem__(self, i)
        return dict(input_ids=[i] * 5, labels=[i] + [i] * (i % 5) + [-100] * (4 - i % 5))


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=40)
def test_the_loader_names_every_sample_once_and_the_silent_ones(size, micro, accumulate, world, packed):
    data = Samples(range(size))
    data.lengths = [5] * size
    dataset = PackedDataset(data, 12) if packed else data
    collate = (lambda rows: pack_rows(rows, 12, 0)) if packed else (lambda rows: dict(num_labels=0))
    batches = []
    for rank in range(world):
        loader = TrainLoader(dataset, GlobalBatchSampler(len(dataset), micro, accumulate, rank, world), collate)
        batches += list(loader)
        assert loader.waited > 0
    seen = [n for batch in batches for n in batch["numbers"]]
    assert sorted(seen) == list(range(size))
    assert set().union(*(b["unlabelled"] for b in batches)) == {i for i in range(size) if i % 5 == 0}
    assert all(b["unlabelled"] <= b["numbers"] for b in batches)
    assert loader.lines(seen) == [f"{file}:{3 * i + 1}" for first, file in enumerate("ab") for i in range(first, size, 2)]
    data.files = ["a"]
    assert loader.lines([n - n % 2 for n in seen]) == [3 * i + 1 for i in range(0, size, 2)], "one file needs no name"


@given(st.lists(st.integers(1, 10**6), max_size=30), st.integers(1, 9))
def test_a_list_of_samples_is_short(numbers, most):
    words = listed(dict(lines=numbers, samples=[1]), most)
    assert words.startswith("lines" if numbers else "samples") and words.count(",") < most + 2  # one in "and 1,000 more"


# The file


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_figure_is_json_and_reads_back(value):
    back = float(json.loads(json.dumps(figure(value), allow_nan=False)))
    assert back == value or (math.isnan(back) and math.isnan(value))


def lone(step=1, **more):
    strategy = SimpleNamespace(reduce=lambda x, reduce_op: x, broadcast=lambda x: x)
    return SimpleNamespace(global_step=step, is_global_zero=True, precision="32-true", strategy=strategy, callbacks=[], lr_scheduler_configs=[],
                           accumulate_grad_batches=1, optimizers=[], **more)


def test_a_torn_line_is_cut_off(tmp_path):
    (tmp_path / "guards.jsonl").write_text('{"step": 1}\n{"step": 2, "gua')
    Guards(tmp_path).note(lone(3), "nan", "skip", [4])
    assert [json.loads(line)["step"] for line in (tmp_path / "guards.jsonl").read_text().splitlines()] == [1, 3]


def test_only_the_main_process_writes(tmp_path):
    other = lone()
    other.is_global_zero = False
    assert Guards(tmp_path).note(other, "nan", "skip", [4])["samples"] == [4] and not (tmp_path / "guards.jsonl").exists()


# Decisions


@given(st.lists(st.booleans(), max_size=30), st.integers(0, 3))
def test_patience_is_counted_in_a_row(tmp_path_factory, steps, patience):
    "True is a broken step: the run stops exactly where one more than `patience` of them follow each other."
    guards, trainer = Guards(tmp_path_factory.getbasetemp(), on_nan="skip", patience=patience), lone()
    trainer.is_global_zero = False
    module = SimpleNamespace(when_read=lambda then: then(), step_figures=lambda: dict(loss=math.nan if broken else 1.0, grad_norm=1.0, unlabelled=0), parameters=lambda: iter(()), device="cpu")
    guards.on_train_start(trainer, module)
    row = 0
    for broken in steps:
        row = row + 1 if broken else 0
        if row > patience:
            with pytest.raises(ValueError, match="is not finite"):
                guards.on_train_batch_end(trainer, module, dict(loss=torch.tensor(math.nan)), dict(num_labels=1), 0)
            break
        guards.on_train_batch_end(trainer, module, dict(loss=torch.tensor(1.0)), dict(num_labels=1), 0)
    assert guards.in_row == row


def test_counts_go_through_a_checkpoint(tmp_path):
    first = Guards(tmp_path)
    first.losses.extend([1.0, 2.0])
    first.in_row, first.skipped, first.rollbacks, first.unlabelled = 1, 2, 3, 4
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Guards(tmp_path)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize("on_nan", ON_NAN)
@pytest.mark.parametrize("applied", [True, False])
def test_a_step_that_deepspeed_has_applied_is_not_said_to_be_skipped(tmp_path, on_nan, applied):
    "Without ZeRO its engine does not look at the norm."
    trainer = lone()
    trainer.strategy.deepspeed_engine = SimpleNamespace(was_step_applied=lambda: applied)
    did, why = Guards(tmp_path, on_nan=on_nan).decide(trainer)
    assert did == ("stop" if applied and on_nan == "skip" else on_nan) and bool(why) == (did != on_nan)


@given(st.floats(allow_nan=True, allow_infinity=True, width=32))
def test_only_a_loss_that_is_not_finite_changes_its_factor(value):
    loss = torch.tensor(value)
    factor = 1.25 + finite_or_nan(loss)
    assert float(factor) == 1.25 if math.isfinite(value) else bool(factor.isnan())


def test_weights_that_stay_are_told_and_weights_that_move_are_not(tmp_path, capsys):
    for rate, told in ((0.0, True), (0.1, False)):
        layer, trainer, guards = torch.nn.Linear(3, 2), lone(), Guards(tmp_path)
        layer.device = "cpu"
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
        guards.on_train_start(trainer, layer)
        guards.lr = 0.1  # what the schedule said
        for _ in range(FIRST):
            layer(torch.ones(3)).sum().backward()
            optimizer.step()
            guards.watch_movement(trainer, layer, dict(grad_norm=1.0))
        assert ("no weight has changed" in capsys.readouterr().out) == told
    assert len(probe(layer)) == 8


def test_steps_at_a_learning_rate_of_nothing_do_not_count(tmp_path, capsys):
    layer, trainer, guards = torch.nn.Linear(3, 2), lone(), Guards(tmp_path)
    guards.on_train_start(trainer, layer)
    for _ in range(2 * FIRST):
        guards.watch_movement(trainer, layer, dict(grad_norm=0.0))
    assert not capsys.readouterr().out and not guards.norms


# Memory


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8))
def test_advice_keeps_the_global_batch(micro, accumulate, world):
    trainer = SimpleNamespace(datamodule=SimpleNamespace(micro_batch=micro), accumulate_grad_batches=accumulate, world_size=world, strategy=SimpleNamespace())
    ways = lighter(trainer, SimpleNamespace(gradient_checkpointing=True))
    assert ways[-1].startswith("--trainer.strategy zero3_offload") and len(ways) == (2 if micro > 1 else 1)
    if micro > 1:
        words = ways[0].split()
        less, more = int(words[1]), int(words[3])
        assert less < micro and less * more == micro * accumulate and f"{micro * accumulate * world} rows" in ways[0]


def test_what_counts_as_running_out():
    assert ran_out(torch.OutOfMemoryError("x")) and ran_out(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(caught.value), "what torch says on this machine"
    assert not ran_out(RuntimeError("shape mismatch")) and not ran_out(ValueError("out of memory"))


def test_the_frames_of_the_step_are_let_go():
    "They hold its tensors, and whoever tries again in the same process needs the memory."
    def step():
        held = torch.ones(8)
        seen.append(weakref.ref(held))
        raise torch.OutOfMemoryError("out of memory")

    seen, trainer = [], SimpleNamespace(datamodule=None, accumulate_grad_batches=1, strategy=SimpleNamespace(offload_param="cpu"), global_step=3, world_size=1)
    with pytest.raises(ValueError, match="after step 3.*data.max_length") as refusal:
        with memory_advice(trainer, SimpleNamespace(gradient_checkpointing=True)):
            step()
    assert seen[0]() is None and refusal.value.__suppress_context__
