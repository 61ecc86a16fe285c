"The sampler under any sizes, splits and stops, and under a real Lightning trainer."

import itertools

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.data.batch import pad_rows
from fengshen.data.sampler import EvalLoader, GlobalBatchSampler, TrainLoader, epoch_order

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
    import numpy as np

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
