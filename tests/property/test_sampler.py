"The sampler under any sizes, splits and stops, and under a real Lightning trainer."

import itertools
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.data.batch import pad_rows
from fengshen.data.blend import Blend, Permutation
from fengshen.data.sampler import EvalLoader, GlobalBatchSampler, TrainLoader, bare, by_length, epoch_order, mixed
from tests.training_runs import environment

settings.register_profile("house", deadline=None)  # a loaded machine is not a failure
settings.load_profile("house")
sizes = st.integers(1, 80)
splits = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))  # micro_batch, accumulate, world


def ranks(size, split, **kw):
    micro, accumulate, world = split
    return [GlobalBatchSampler(size, micro, accumulate, rank, world, **kw) for rank in range(world)]


def steps(samplers):
    "The samples of each optimizer step, over all ranks."
    return [sorted(i for window in step for micro in window for i in micro) for step in zip(*samplers, strict=True)]


@given(sizes, splits, st.integers(0, 3))
def test_every_sample_once_an_epoch(size, split, epochs):
    samplers = ranks(size, split)
    for _ in range(epochs + 1):
        windows = [list(s) for s in samplers]
        assert {len(w) for w in windows} == {samplers[0].steps_per_epoch}
        assert all(len(window) == split[1] for w in windows for window in w), "each rank takes every micro-step"
        assert all(len(micro) <= split[0] for w in windows for window in w for micro in window)
        seen = [i for w in windows for window in w for micro in window for i in micro]
        assert sorted(seen) == list(range(size))


@given(sizes, splits, st.integers(0, 5))
def test_a_step_holds_the_same_samples_however_it_is_divided(size, split, seed):
    micro, accumulate, world = split
    divided = steps(ranks(size, split, seed=seed))
    alone = steps(ranks(size, (micro * accumulate * world, 1, 1), seed=seed))
    assert divided == alone
    order, width = epoch_order(size, seed, 0).tolist(), micro * accumulate * world
    assert divided == [sorted(order[i : i + width]) for i in range(0, size, width)]


@given(sizes, splits, st.integers(0, 60))
def test_resumed_anywhere_is_the_straight_run(size, split, stop):
    def run(sampler):
        while True:
            yield from sampler

    straight, first = ranks(size, split)[-1], ranks(size, split)[-1]
    stream, expected = run(first), list(itertools.islice(run(straight), stop + 20))
    assert list(itertools.islice(stream, stop)) == expected[:stop]
    second = ranks(size, split)[-1]
    second.load_state_dict(first.state_dict())
    assert list(itertools.islice(run(second), 20)) == expected[stop:]


@given(sizes, splits, splits, st.integers(0, 20))
def test_resumed_on_another_number_of_processes_nothing_is_lost_or_doubled(size, split, other, stop):
    before, after = ranks(size, split), ranks(size, other)
    stop = min(stop, before[0].steps_per_epoch - 1)
    seen = [i for s in before for window in itertools.islice(s, stop) for micro in window for i in micro]
    for s in after:
        s.load_state_dict(before[0].state_dict())
    seen += [i for s in after for window in s for micro in window for i in micro]
    assert sorted(seen) == list(range(size))
    assert {(s.epoch, s.consumed) for s in after} == {(1, 0)}


def test_the_order_ignores_the_global_random_state():
    a = epoch_order(100, 3, 1)
    np.random.seed(9), torch.manual_seed(9)
    state = np.random.get_state()[1].copy()
    assert (epoch_order(100, 3, 1) == a).all() and (np.random.get_state()[1] == state).all()
    assert (epoch_order(100, 3, 2) != a).any() and (epoch_order(100, 4, 1) != a).any()


@pytest.mark.parametrize("change", [dict(fingerprint="x"), dict(seed=7), dict(size=11), dict(consumed=10), dict(consumed=-1), dict(epoch=-1)])
def test_a_position_of_other_data_is_refused(change):
    sampler = GlobalBatchSampler(10, 2)
    with pytest.raises(ValueError):
        sampler.load_state_dict(dict(sampler.state_dict(), **change))
    with pytest.raises(ValueError, match="incomplete"):
        sampler.load_state_dict({"epoch": 0})
    assert (sampler.epoch, sampler.consumed) == (0, 0), "a refused position changes nothing"


# Orders other than a shuffle: what held for the shuffle holds for them.

groups = st.lists(st.tuples(st.integers(1, 25), st.floats(0.01, 9)), min_size=1, max_size=4)


def lengths_of(size):
    return np.random.RandomState(size).randint(1, 30, size)


def orders(size, micro, seed=42):
    "Orders of that many samples."
    one, two = size // 3, size - size // 3
    plain = [None, by_length(lengths_of(size), 4, seed), by_length(lengths_of(size), micro, seed, windows=2)]
    return plain + ([mixed([one, two], [1, 1], seed)] if one else []) + [mixed([size], [1], seed)]


@given(sizes, splits, st.integers(0, 4), st.integers(0, 30))
def test_resumed_anywhere_in_any_order_is_the_straight_run(size, split, which, stop):
    def run(sampler):
        while True:
            yield from sampler

    made = [orders(size, split[0]) for _ in range(3)]
    which %= len(made[0])
    straight, first, second = (ranks(size, split, order=o[which])[-1] for o in made)
    stream, expected = run(first), list(itertools.islice(run(straight), stop + 12))
    assert list(itertools.islice(stream, stop)) == expected[:stop]
    second.load_state_dict(first.state_dict())
    assert list(itertools.islice(run(second), 12)) == expected[stop:]


@given(sizes, splits, st.integers(0, 5), st.integers(1, 6))
def test_by_length_every_sample_once_in_whole_blocks(size, split, epoch, windows):
    "With the micro-batch as the block, each micro-batch of each rank is a block."
    micro, _, world = split
    lengths = lengths_of(size)
    order = by_length(lengths, micro, 7, windows)(epoch)
    assert sorted(order) == list(range(size))
    shuffle, width = epoch_order(size, 7, epoch), windows * micro
    bins = [sorted(lengths[shuffle[a : a + width]].tolist()) for a in range(0, size, width)]
    cut = sorted(b[i : i + micro] for b in bins for i in range(0, len(b), micro))
    assert sorted(sorted(lengths[order[i : i + micro]].tolist()) for i in range(0, size, micro)) == cut, "a micro-batch is a run of a sorted window"
    samplers = ranks(size, split, order=by_length(lengths, micro, 7, windows))
    pieces = {tuple(order[i : i + micro]) for i in range(0, size, micro)} if epoch == 0 else None
    if pieces:
        assert {tuple(m) for s in samplers for window in s for m in window if m} == pieces


@given(sizes, splits, st.integers(0, 4))
def test_in_any_order_a_step_holds_the_same_samples_however_it_is_divided(size, split, which):
    micro, accumulate, world = split
    a, b = orders(size, 3), orders(size, 3)
    which %= len(a)
    assert steps(ranks(size, split, order=a[which])) == steps(ranks(size, (micro * accumulate * world, 1, 1), order=b[which]))


@given(groups, st.integers(0, 3), st.integers(1, 60))
def test_mixed_gives_each_group_its_share_and_shows_all_of_it_equally_often(case, epoch, total):
    sizes, weights = [n for n, _ in case], [w for _, w in case]
    order, starts = mixed(sizes, weights, 3, total), np.cumsum(sizes) - sizes
    seen = np.zeros((4, sum(sizes)), int)
    for e in range(4):
        items = order(e)
        assert len(items) == total and (items == mixed(sizes, weights, 3, total)(e)).all()
        np.add.at(seen[e], items, 1)
    for start, n, weight in zip(starts, sizes, weights):
        own = seen[:, start : start + n]
        counts = own.sum(1)
        assert len(set(counts)) == 1 and abs(counts[0] - total * weight / sum(weights)) < 1
        assert all(np.ptp(own[: e + 1].sum(0)) <= 1 for e in range(4)), "no sample is two ahead of another"


@pytest.mark.parametrize("sizes,weights", [([3, 3], [1]), ([3, 3], [0, 0]), ([3, 3], [1, -1]), ([3, 3], [1, float("nan")]), ([3, 0], [1, 1])])
def test_weights_that_are_no_shares_are_refused(sizes, weights):
    with pytest.raises(ValueError):
        mixed(sizes, weights, 3)
    assert len(mixed([3, 0], [2, 0], 3)(0)) == 3


def test_a_position_of_another_order_is_refused():
    made = [None, by_length(lengths_of(12), 2, 42), by_length(lengths_of(12), 3, 42), by_length(lengths_of(12), 2, 42, 9)]
    made += [mixed([4, 8], [1, 1], 42), mixed([4, 8], [1, 2], 42), mixed([6, 6], [1, 1], 42), mixed([4, 8], [1, 1], 42, total=13), mixed([4, 8], [1, 1], 43)]
    samplers = [GlobalBatchSampler(12 if o is None else o.size, 2, order=o) for o in made]
    for a, b in itertools.product(samplers, samplers):
        if a is b:
            a.load_state_dict(b.state_dict())
        else:
            with pytest.raises(ValueError, match="cannot resume"):
                a.load_state_dict(b.state_dict())


def test_the_plain_shuffle_is_what_it_was():
    assert epoch_order(8, 42, 0).tolist() == [0, 1, 4, 2, 6, 5, 7, 3]
    assert GlobalBatchSampler(8, 2, fingerprint="f").state_dict() == dict(epoch=0, consumed=0, seed=42, size=8, fingerprint="f")


class Numbers(list):
    "Sample i is the token i+1, repeated; so a batch shows which samples it holds."

    def __getitem__(self, i):
        return dict(input_ids=[list.__getitem__(self, i)] * (1 + i % 3), labels=[-100] + [list.__getitem__(self, i)] * (i % 3))


def loader(size=11, split=(2, 2, 1), rank=0):
    micro, accumulate, world = split
    return TrainLoader(Numbers(range(1, size + 1)), GlobalBatchSampler(size, micro, accumulate, rank, world), lambda s: pad_rows(s, 0))


@given(sizes, splits)
@settings(max_examples=40)
def test_step_labels_are_the_window_s_scored_tokens(size, split):
    accumulate = split[1]
    for rank in range(split[2]):
        batches = list(loader(size, split, rank))
        assert len(batches) == len(loader(size, split, rank))
        for i in range(0, len(batches), accumulate):
            window = batches[i : i + accumulate]
            assert {b["step_labels"] for b in window} == {sum(b["num_labels"] for b in window)}


@given(sizes, st.integers(1, 5), st.integers(1, 5))
def test_validation_sees_every_sample_once_in_order(size, micro, world):
    loaders = [EvalLoader(list(range(size)), micro, list, rank, world) for rank in range(world)]
    batches = [list(x) for x in loaders]
    assert {len(b) for b in batches} == {len(loaders[0])}
    assert [i for step in zip(*batches) for batch in step for i in batch] == list(range(size))


class Recorder(pl.LightningModule):
    "Remembers the samples of every batch it trains on."

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, i):
        assert type(batch["tokens"]) is int
        self.seen.append(sorted(set(batch["input_ids"].flatten().tolist()) - {0}) if batch["tokens"] else [])
        return self.weight * batch["num_labels"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


QUIET = dict(
    max_epochs=-1, accelerator="cpu", devices=1, logger=False, use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False)


def fit(folder, max_steps, ckpt=None, split=(2, 2, 1), every=None):
    module = Recorder()
    saves = [pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)] if every else []
    trainer = pl.Trainer(max_steps=max_steps, accumulate_grad_batches=split[1], callbacks=saves, enable_checkpointing=bool(saves), **QUIET)
    trainer.fit(module, loader(split=split), ckpt_path=ckpt)
    return module.seen, trainer


@pytest.mark.filterwarnings("ignore")
def test_under_lightning_epochs_follow_each_other(tmp_path):
    seen, trainer = fit(tmp_path, max_steps=7)
    assert trainer.global_step == 7
    expected = loader()
    want = [b for _ in range(3) for b in expected]
    assert seen == [sorted(set(b["input_ids"].flatten().tolist()) - {0}) for b in want][:14]
    epochs = [sorted(sum(seen[i : i + 6], [])) for i in (0, 6)]
    assert epochs == [list(range(1, 12))] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_under_lightning_a_resumed_run_sees_what_the_straight_run_saw(tmp_path, stop):
    straight, _ = fit(tmp_path / "a", max_steps=8)
    fit(tmp_path / "b", max_steps=stop, every=1)
    resumed, trainer = fit(tmp_path / "b", max_steps=8, ckpt=tmp_path / "b" / f"step={stop}.ckpt")
    assert resumed == straight[stop * 2 :] and trainer.global_step == 8


@pytest.mark.filterwarnings("ignore")
def test_under_lightning_a_checkpoint_from_inside_an_epoch_of_a_longer_run(tmp_path):
    straight, _ = fit(tmp_path, max_steps=8, every=1)
    for stop in (1, 3, 4, 6):
        resumed, _ = fit(tmp_path, max_steps=8, ckpt=tmp_path / f"step={stop}.ckpt")
        assert resumed == straight[stop * 2 :]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_under_lightning_resumed_with_another_micro_batch_the_epoch_is_still_whole(tmp_path, micro):
    seen, _ = fit(tmp_path, max_steps=1, every=1)
    rest, _ = fit(tmp_path, max_steps=20, ckpt=tmp_path / "step=1.ckpt", split=(micro, 2, 1))
    seen = sum(seen + rest, [])
    assert sorted(seen[:11]) == sorted(seen[11:22]) == list(range(1, 12))


@pytest.mark.filterwarnings("ignore")
def test_under_lightning_a_checkpoint_of_other_data_is_refused(tmp_path):
    fit(tmp_path, max_steps=1, every=1)
    trainer = pl.Trainer(max_steps=2, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="size differs"):
        trainer.fit(Recorder(), loader(size=12), ckpt_path=tmp_path / "step=1.ckpt")


# Orders that are computed where they are looked at


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**40), max_size=3))
def test_a_permutation_is_one_and_any_part_of_it_is_the_same(size, key):
    order = Permutation(size, *key)
    whole = order[:]
    assert sorted(whole.tolist()) == list(range(size))
    at = np.random.default_rng(0).integers(0, size, 20)
    assert (order[at] == whole[at]).all() and (order[size // 3 : size // 2] == whole[size // 3 : size // 2]).all()


def test_a_permutation_looks_like_chance():
    "Places of neighbours, and the share of numbers that stay in their half, are those of a shuffle, within five standard errors."
    for size in (1000, 4097, 10_000):
        whole = np.concatenate([Permutation(size, 5, e)[:] for e in range(40)]).reshape(40, size)
        stays = ((whole < size // 2) == (np.arange(size) < size // 2)).mean()
        assert abs(stays - 0.5) < 5 * 0.5 / np.sqrt(40 * size)
        jumps = np.abs(np.diff(whole, axis=1)).mean() / size
        assert abs(jumps - 1 / 3) < 5 * 0.2357 / np.sqrt(40 * size)
        assert np.abs(np.corrcoef(whole[:10])[np.triu_indices(10, 1)]).max() < 5 / np.sqrt(size), "epochs have nothing to do with each other"


corpora = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 9)), min_size=1, max_size=5)


@given(corpora, st.integers(0, 200), st.integers(0, 200))
def test_a_blend_cut_anywhere_is_the_whole(given_corpora, one, two):
    blend = Blend(*zip(*given_corpora), seed=3)
    whole, end = blend.draw(blend.cursors, one + two)
    first, middle = blend.draw(blend.cursors, one)
    middle = blend.take_up(json.loads(json.dumps(blend.state(middle))))
    second, last = blend.draw(middle, two)
    assert (np.concatenate([first, second]) == whole).all() and (last == end).all()


@given(corpora, st.integers(1, 300))
def test_shares_of_a_blend_and_its_rounds(given_corpora, count):
    blend = Blend(*zip(*given_corpora), seed=3)
    numbers, _ = blend.draw(blend.cursors, count)
    which = np.searchsorted(blend.starts, numbers, "right") - 1
    for k, size in enumerate(blend.sizes):
        mine = numbers[which == k] - blend.starts[k]
        assert abs(len(mine) - count * blend.weights[k]) < len(blend.sizes), "no corpus is further from its share than there are corpora"
        for first in range(0, len(mine) - int(size) + 1, int(size)):
            assert sorted(mine[first : first + size].tolist()) == list(range(size)), "every sample once a round"


# Reading ahead


def test_a_loader_that_nobody_reads_any_more_ends_its_thread():
    before = threading.active_count()
    stream = iter(TrainLoader(list(range(100)), GlobalBatchSampler(100, 2), lambda samples: dict(num_labels=len(samples))))
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_what_fails_while_reading_ahead_is_raised_in_its_place():
    class Broken(list):
        def __getitem__(self, i):
            if i == 7:
                raise OSError("sector 7 is gone")
            return super().__getitem__(i)

    loader = TrainLoader(Broken(range(10)), GlobalBatchSampler(10, 2, shuffle=False), lambda samples: dict(samples=samples, num_labels=1))
    taken = []
    with pytest.raises(OSError, match="sector 7"):
        for batch in loader:
            taken += batch["samples"]
    assert taken == [0, 1, 2, 3, 4, 5] and loader.state_dict()["consumed"] == 6


def test_a_sample_of_which_nothing_is_scored_is_named_and_padding_is_not():
    "The last micro-batch of an epoch has rows without a sample; a folded one several rows of each."
    labels = torch.full((8, 4), -100)
    labels[0, 2] = labels[2, 1] = labels[5, 3] = 7
    assert bare([10, 11, 12], dict(labels=labels)) == {11}
    assert bare([10, 11, 12], dict(labels=labels), parts=2) == set()
    labels[5] = -100
    assert bare([10, 11, 12], dict(labels=labels), parts=2) == {12} and bare([], dict(labels=labels)) == set()


class Told:
    "A loader of numbers that notes when each step was made."

    def __init__(self, steps, seconds=0.0):
        self.made, self.seconds = [], seconds
        self.loader = TrainLoader(list(range(steps)), GlobalBatchSampler(steps, micro_batch=1, accumulate=1, shuffle=False), self.collate)

    def collate(self, items):
        time.sleep(self.seconds)
        self.made.append(items)
        return dict(items=items, num_labels=len(items))


def test_a_told_loader_gives_the_batches_of_one_that_nobody_told():
    "The word may come once, twice or not at all in a step, and epochs follow each other."
    told, plain = Told(6), Told(6)
    for _ in range(2):
        found = []
        for step, batch in enumerate(told.loader):
            found.append(batch)
            for _ in range(step % 3):
                told.loader.begin()
        assert found == list(plain.loader) and len(found) == 6


def reach(told, count):
    "Wait until so many steps have been made; a loaded machine takes its time."
    until = time.monotonic() + 20
    while len(told.made) < count and time.monotonic() < until:
        time.sleep(0.01)
    assert len(told.made) >= count


def test_a_told_loader_makes_a_step_when_told():
    "Nothing is made between the taking of a step and the word (two are ahead of the reader then), and the thread ends with its reader."
    before, told = threading.active_count(), Told(20)
    stream = iter(told.loader)
    for taken in range(1, 6):
        next(stream)
        assert taken == 1 or time.sleep(0.1) is None and len(told.made) == taken + 1
        told.loader.begin()
        reach(told, taken + 2)
    next(stream)  # now it waits for the word
    stream.close()
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_loader_that_is_late_goes_back_to_working_ahead():
    "Steps take longer to make than to use: after a few misses nobody waits for a word any more, and the loader makes one step after the other."
    told = Told(30, seconds=0.03)
    stream = iter(told.loader)
    for _ in range(20):
        next(stream), time.sleep(0.01), told.loader.begin()
    assert told.loader.turn.patience <= 0
    first, ready = next(stream), len(told.made)
    reach(told, min(30, ready + 1))
    assert [first, *stream] == list(Told(30).loader)[20:]


BUSY = """
import builtins, sys, time
import torch
from fengshen.data.sampler import Turn, read_ahead

def items():
    while True:
        yield 0
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            (torch.ones(64, 64) @ torch.ones(64, 64)).clamp(0, 1)

turn = Turn()
if "waiting" in sys.argv:
    turn.begin()
builtins.kept = read_ahead(items(), turn)  # nobody closes it
next(builtins.kept)
time.sleep(0.2)
if "raising" in sys.argv:
    raise ValueError("the end")
"""


@pytest.mark.parametrize("how, status", [("busy", 0), ("waiting", 0), ("raising", 1)])
def test_a_program_ends_while_a_thread_reads_ahead(how, status):
    "Torn out of torch's code, the thread would abort the process."
    done = subprocess.run([sys.executable, "-c", BUSY, how], capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == status and "terminate" not in done.stderr, done.stderr
