"Short rows first: every token once, the same steps after any stop and on any number of processes, every objective, and data whose rows cannot be cut."

import itertools
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from fengshen.data.cbart_dataloader.objective import Infill
from fengshen.data.masking.objectives import OBJECTIVES
from fengshen.data.mmap_dataloader.mmap_writer import write_mmap
from fengshen.data.universal_datamodule import LengthWarmup, UniversalDataModule
from fengshen.data.universal_datamodule.length_warmup import piece_numbers, pieces
from fengshen.training.resume import differences
from tests.training_runs import back_to, fit_here, series, tiny_config

settings.register_profile("house", deadline=None)
settings.load_profile("house")
WORDS = list("白日依山尽黄河入海流欲穷千里目更上一层楼床前明月光疑是地霜举头望低思故乡")
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"<extra_id_{i}>" for i in range(20))]
ALL = OBJECTIVES | dict(Infill=Infill)


@pytest.fixture(scope="module")
def tokenizer():
    made = BertTokenizer(vocab={word: i for i, word in enumerate([*MARKS, *WORDS])})
    made.add_special_tokens(dict(eos_token="[SEP]", additional_special_tokens=MARKS[5:]))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    "45 windows of 32 tokens; no token stands twice in a row."
    folder = tmp_path_factory.mktemp("warmup") / "corpus"
    rng = np.random.default_rng(0)
    write_mmap(folder, ((np.cumsum(rng.integers(1, 20, 50)) % len(WORDS)) + len(MARKS) for _ in range(29)), vocab_size=len(tokenizer))
    return str(folder)


def module(source, tokenizer, micro=3, accumulate=1, rank=0, world=1, warmup=LengthWarmup(4, 9), **more):
    data = UniversalDataModule(source, tokenizer=tokenizer, max_length=32, micro_batch=micro, length_warmup=warmup, **more)
    data.trainer = SimpleNamespace(accumulate_grad_batches=accumulate, global_rank=rank, world_size=world, max_steps=-1, lightning_module=None, strategy=None)
    data.setup("fit")
    return data


def epochs(loader, count):
    return [batch for _ in range(count) for batch in loader]


def same(a, b):
    "Whether two batches are equal, key by key."
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


@given(st.integers(2, 300), st.integers(1, 6), st.integers(0, 2000))
def test_rows_grow_step_by_step_to_their_length(start, doublings, more):
    length, warmup = start << doublings, LengthWarmup(start, doublings + more)
    parts = [warmup.parts(step, length) for step in range(warmup.steps + 2)]
    assert parts[0] == 1 << doublings and parts[warmup.steps - 1] > 1 and parts[warmup.steps :] == [1, 1]
    stretches = [len(list(same)) for _, same in itertools.groupby(parts[: warmup.steps])]
    assert len(stretches) == doublings and max(stretches) - min(stretches) <= 1 and sorted(parts, reverse=True) == parts
    lengths, ends = zip(*warmup.plan(length))
    assert ends == (*itertools.accumulate(stretches), None) and list(lengths) == [length // p for p in dict.fromkeys(parts)]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 9), st.integers(0, 1), st.integers(0, 3))
def test_parts_lie_end_to_end(rows, parts, size, shared, rest):
    texts = np.arange(rows * 1000).reshape(rows, 1000)[:, : parts * (size - shared) + shared + rest]
    found = pieces(texts, parts, size, shared)
    assert np.array_equal(found[:, : size - shared].reshape(rows, -1), texts[:, : parts * (size - shared)])
    assert not shared or np.array_equal(found[:, -1], texts[:, shared * (size - shared) :: size - shared][:, :parts].reshape(-1))
    assert np.array_equal(found, pieces(torch.from_numpy(texts), parts, size, shared).numpy())


@given(st.lists(st.integers(0, (1 << 40) - 1), min_size=1, max_size=9, unique=True))
def test_no_two_parts_have_one_number(numbers):
    found = np.concatenate([piece_numbers(numbers, 1 << k) for k in range(6)])
    assert len(set(found.tolist())) == len(found) and found[: len(numbers)].tolist() == numbers and found.min() >= 0


@pytest.mark.parametrize("name", [None, *ALL])
def test_what_is_read_is_the_window_and_the_end_is_the_plain_run(corpus, tokenizer, name):
    "In a warm-up of 9 steps each batch has the samples of the plain run's; of 45 windows the third epoch's are whole."
    objective = None if name is None else ALL[name]()
    given = dict(objective=objective, split="9,1")
    warm, plain = (module(corpus, tokenizer, warmup=w, **given) for w in (LengthWarmup(4 if name in (None, "Causal") else 8, 9), None))
    cut, whole = epochs(warm.train_dataloader(), 2), epochs(plain.train_dataloader(), 2)
    assert [b["numbers"] for b in cut] == [b["numbers"] for b in whole]
    assert all(same(a, b) for a, b in zip(cut[9:], whole[9:], strict=True)) and len(cut) > 18
    assert all(same(a, b) for a, b in zip(warm.val_dataloader(), plain.val_dataloader(), strict=True))
    for batch in cut[:9]:
        rows, length = batch["input_ids"].shape
        assert rows * length == 3 * 32 and length < 32 and batch["labels"].shape[0] == rows
        assert batch["num_labels"] == batch["step_labels"] == int((batch["labels"][:, 1:] != -100).sum()) > 0


@pytest.mark.parametrize("name", [None, "Causal"])
def test_every_token_is_an_input_once_and_a_label_once(corpus, tokenizer, name):
    given = dict(objective=name and ALL[name]())
    cut, whole = (next(iter(module(corpus, tokenizer, warmup=w, **given).train_dataloader())) for w in (LengthWarmup(4, 9), None))
    for key in ("input_ids", "labels"):
        values = cut[key][:, cut[key].shape[1] - 4 :], whole[key][:, whole[key].shape[1] - 32 :]
        assert torch.equal(values[0].reshape(3, 32), values[1])
    assert cut["num_labels"] == whole["num_labels"] == 96 and (cut["attention_mask"] == 1).all()


def test_the_parts_of_a_text_are_hidden_apart(corpus, tokenizer):
    "With nothing replaced, what Bert's labels and inputs say together is the text; its parts have their masks at different places."
    data = module(corpus, tokenizer, micro=8, objective=ALL["Bert"](rate=0.4, mask=1.0, random=0.0, whole_word=False), warmup=LengthWarmup(8, 9))
    batch = next(iter(data.train_dataloader()))
    hidden, ids = batch["labels"][:, 1:] != -100, torch.where(batch["labels"][:, 1:] == -100, batch["input_ids"], batch["labels"][:, 1:])
    windows = data.sets["train"].__getitems__(data.train_dataloader().sampler.window()[0])
    assert torch.equal(ids[:, 1:-1].reshape(8, 24), windows[:, :24])
    places = hidden.view(8, 4, 8).numpy()
    assert sum(len(set(map(bytes, row))) > 1 for row in places) >= 7


@pytest.mark.parametrize("name", [None, "Bert"])
@pytest.mark.parametrize("micro, accumulate, world", [(2, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_a_stop_in_the_warm_up_changes_nothing(corpus, tokenizer, name, micro, accumulate, world):
    given = dict(objective=name and ALL[name](), warmup=LengthWarmup(8, 8))
    for rank in range(world):
        make = partial(module, corpus, tokenizer, micro, accumulate, rank, world, **given)
        straight = epochs(make().train_dataloader(), 2)
        loader = make().train_dataloader()
        stream = iter(loader)
        seen = [next(stream) for _ in range(5 * accumulate)]
        again = make().train_dataloader()
        again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        rest = epochs(again, 2)[: len(straight) - len(seen)]
        assert all(same(a, b) for a, b in zip(seen + rest, straight, strict=True))
        assert straight[4 * accumulate]["input_ids"].shape == (2 * micro, 16), "it was in the middle"


def test_a_step_is_the_same_however_it_is_shared_out(corpus, tokenizer):
    "The rows and labels of each step, over all processes and micro-batches."
    def steps(micro, accumulate, world):
        ranks = [list(module(corpus, tokenizer, micro, accumulate, rank, world).train_dataloader()) for rank in range(world)]
        batches = [[b for r in ranks for b in r[at : at + accumulate]] for at in range(0, len(ranks[0]), accumulate)]
        real = [torch.cat([b["input_ids"][(b["labels"] != -100).any(1)] for b in step]) for step in batches]
        assert all(sum(b["num_labels"] for r in ranks for b in r[at : at + 1]) > 0 for at in range(3))
        return [sorted(rows.tolist()) for rows in real]

    assert steps(4, 1, 1) == steps(1, 2, 2) == steps(2, 1, 2)


def test_a_blend_is_cut_too_and_the_plan_is_said(corpus, tokenizer, capsys):
    batch = next(iter(module({corpus: 1.0}, tokenizer).train_dataloader()))
    assert batch["input_ids"].shape == (24, 4)
    assert "length warm-up: rows of 4 until step 3, 8 until 6, 16 until 9, then 32" in capsys.readouterr().out


def test_what_cannot_be_cut_is_refused(corpus, tokenizer, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps(dict(text="白日依山尽")), "utf8")
    for source, more, said in [
        (corpus, dict(corpus="packed"), "leave data.length_warmup out"),
        (str(tmp_path / "texts.jsonl"), {}, "fengshen preprocess"),
        (str(tmp_path / "texts.jsonl"), dict(objective=ALL["Bert"]()), "fengshen preprocess"),
        (corpus, dict(warmup=LengthWarmup(12, 9)), "expected 16 or 8 or 4 or 2"),
        (corpus, dict(warmup=LengthWarmup(32, 9)), "expected 16 or 8 or 4 or 2"),
        (corpus, dict(warmup=LengthWarmup(4, 2)), "fewer steps than lengths"),
        (corpus, dict(warmup=LengthWarmup(2, 9), objective=ALL["Bert"]()), "raise data.length_warmup.start"),
    ]:
        with pytest.raises(ValueError, match=said):
            module(source, tokenizer, **more)


def test_a_recipe_warms_up_and_goes_on_to_the_bit(corpus, tmp_path):
    given = {"model.config": tiny_config(tmp_path, n_layer=1, n_embd=16), "data.train": corpus, "data.valid": None, "data.tokenizer": "fengshen:tokenizer_demo", "data.max_length": 32,
             "data.micro_batch": 2, "data.length_warmup.start": 8, "data.length_warmup.steps": 4, "trainer.max_steps": 5, "checkpoint.every_n_steps": 3, "checkpoint.keep": 9}
    straight = fit_here(tmp_path / "straight", **given)
    copy = back_to(straight, 3, tmp_path)
    fit_here(copy, **given)
    assert series(copy, "loss") == series(straight, "loss") and len(series(copy, "loss")) == 5
    then = yaml.safe_load((straight / "run.yaml").read_text("utf8"))
    now = then | dict(data=then["data"] | dict(length_warmup=dict(start=8, steps=6)))
    assert differences(then, now) == {"data.length_warmup.steps": (4, 6)}
    assert "data.length_warmup.steps" in differences(then, now | dict(data=then["data"] | dict(length_warmup=None)))
