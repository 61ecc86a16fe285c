"""Training on tokenised corpora: each way to cut them, several by weight, stopped and gone on with, on one process and on two."""
import itertools
import math

import numpy as np
import pytest

from fengshen.data.megatron_dataloader import IndexedDatasetBuilder
from fengshen.data.mmap_dataloader.mmap_writer import write_mmap
from fengshen.data.universal_datamodule import UniversalDataModule
from fengshen.tokenizer import load_tokenizer
from fengshen.training.module import LanguageModelModule
from fengshen.training.trainer import new_trainer
from tests.training_runs import back_to, fit, fit_here, flags, here, read, series, tiny_config, weights, weights_apart

TOKENIZER = load_tokenizer("fengshen:tokenizer_demo")
LINES = ["白日依山尽，黄河入海流。", "欲穷千里目，更上一层楼。", "床前明月光，疑是地上霜。", "举头望明月，低头思故乡。"]


def documents(count, seed=0):
    "Token ids of poems of one to twelve lines."
    rng = np.random.default_rng(seed)
    return [TOKENIZER("".join(rng.choice(LINES, rng.integers(1, 13))))["input_ids"] + [TOKENIZER.eos_token_id] for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for name, count, seed in (("large", 120, 0), ("small", 12, 1)):
        write_mmap(folder / name, documents(count, seed), vocab_size=len(TOKENIZER), tokenizer=TOKENIZER)
        builder = IndexedDatasetBuilder(folder / f"{name}_megatron.bin", dtype=np.uint16)
        for ids in documents(count, seed):
            builder.add_document(np.array(ids, np.uint16), [len(ids)])
        builder.finalize(folder / f"{name}_megatron.idx")
    return folder


def settings(folder, train, **more):
    return {"model.config": tiny_config(folder), "data.train": train, "data.valid": None, "data.max_length": 64, "data.micro_batch": 2, "data.seed": 7,
            "trainer.max_steps": 8, "model.optimizer.lr": 3e-3} | more


def sources(folder, kind=""):
    return {"one": str(folder / f"large{kind}"), "blend": {str(folder / f"large{kind}"): 1, str(folder / f"small{kind}"): 2}}


@pytest.mark.parametrize("corpus, which", [("windows", "one"), ("windows", "blend"), ("megatron", "one"), ("megatron", "blend"), ("packed", "one"), ("packed", "blend"), ("packed", "megatron")])
def test_each_way_trains_and_goes_on_to_the_bit(folder, tmp_path, corpus, which):
    given = settings(folder, sources(folder, "_megatron" if "megatron" in (corpus, which) else "")["one" if which == "megatron" else which],
                     **{"data.corpus": corpus, "data.on_long": "split", "checkpoint.every_n_steps": 3, "checkpoint.keep": 9, "trainer.accumulate_grad_batches": 2})
    straight = fit_here(tmp_path / "straight", **given)
    losses = series(straight, "loss")
    assert len(losses) == 8 and losses[-1] < losses[0]
    copy = back_to(straight, 3, tmp_path)
    fit_here(copy, **given)
    assert series(copy, "loss") == losses and weights_apart(weights(copy), weights(straight)) == 0


def test_a_part_of_the_corpus_validates(folder, tmp_path):
    run = fit_here(tmp_path / "run", **settings(folder, str(folder / "large"), **{
        "data.split": "90,10", "trainer.val_check_interval": 4, "trainer.check_val_every_n_epoch": None, "data.tokenizer": "fengshen:tokenizer_demo", "model.samples": 2}))
    assert [row["step"] for row in read(run, "valid")] == [4, 8] and (run / "samples.jsonl").exists()


def test_what_is_kept_for_a_test_is_read_by_the_test_alone(folder, tmp_path):
    data = UniversalDataModule(str(folder / "large"), split="80,10,10", tokenizer=TOKENIZER, max_length=64, micro_batch=2)
    trainer = new_trainer(tmp_path / "run", strategy="auto", max_steps=1)
    module = LanguageModelModule(config=tiny_config(tmp_path), samples=0)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    assert list(data.sets) == ["test"] and math.isclose(found["test_loss"], math.log(1280), rel_tol=0.05)
    trainer.fit(module, datamodule=data)
    assert list(data.sets) == ["test", "train", "valid"]
    numbers = [(s.firsts[0], s.firsts[0] + len(s)) for s in (data.sets[name] for name in ("train", "valid", "test"))]
    assert [b for a, b in numbers[:-1]] == [a for a, b in numbers[1:]] and numbers[0][0] == 0 and numbers[-1][1] == len(data.sets["test"].parts[0])


@pytest.mark.parametrize("extra, said", [
    ({"data.corpus": "megatron"}, "--format megatron"), ({"data.corpus": "window"}, "windows"), ({"data.split": "1,x"}, "split"), ({"data.max_length": 100_000}, "shorter than one window")])
def test_refusals(folder, tmp_path, extra, said):
    given = settings(folder, str(folder / "small"), **{"run_dir": str(tmp_path / "run"), "trainer.strategy": "auto"} | extra)
    status, out, err = here("fit", "-c", "demo", *flags(given))
    assert status == 2 and said in err and "Traceback" not in err, err


def test_ids_that_the_model_does_not_have_are_refused(folder, tmp_path):
    given = settings(folder, str(folder / "small"), **{"run_dir": str(tmp_path / "run"), "trainer.strategy": "auto", "data.tokenizer": None, "model.config": tiny_config(tmp_path, vocab_size=100)})
    status, out, err = here("fit", "-c", "demo", *flags(given))
    assert status == 2 and "more token ids than the model: got 1280, expected at most 100" in err, err


def test_a_corpus_of_another_tokenizer_is_refused(folder, tmp_path):
    other = load_tokenizer("fengshen:tokenizer_demo")
    other.add_tokens(["二二"])
    with pytest.raises(ValueError, match="tokenizer"):
        UniversalDataModule(str(folder / "small"), tokenizer=other, max_length=64).setup("fit")


def seen(loaders, steps):
    "Numbers of the samples of the next steps, over all ranks; the loaders stand after them."
    out = []
    for loader in loaders:
        for batch in itertools.islice(loader, steps * loader.sampler.accumulate):
            out += sorted(batch["numbers"])
    return out


def loaders(source, world, micro, corpus="windows"):
    "The loaders of each rank, as they would be with so many processes."
    out = []
    for rank in range(world):
        data = UniversalDataModule(source, tokenizer=TOKENIZER, max_length=64, micro_batch=micro, corpus=corpus, on_long="split")
        data.place = lambda rank=rank: dict(rank=rank, world=world)
        data.setup("fit")
        out.append(data.train_dataloader())
    return out


@pytest.mark.parametrize("corpus", ["windows", "packed"])
@pytest.mark.parametrize("which", ["one", "blend"])
@pytest.mark.parametrize("before, after", [(1, 2), (2, 4), (4, 1)])
def test_any_number_of_processes_sees_exactly_the_rest(folder, corpus, which, before, after):
    source = sources(folder)[which]
    straight = seen(loaders(source, 1, 1, corpus), 10**6)
    first = loaders(source, before, 4 // before, corpus)
    done = seen(first, 3)
    assert len({str(loader.state_dict()) for loader in first}) == 1
    rest = loaders(source, after, 2, corpus)
    for loader in rest:
        loader.load_state_dict(first[0].state_dict())
    done += seen(rest, 10**6)
    assert sorted(done) == sorted(straight)
    if which == "one":
        assert len(set(done)) == len(done) == len(first[0].dataset)


def test_weights_may_change_in_the_middle(folder):
    first = loaders({str(folder / "large"): 1, str(folder / "small"): 1}, 1, 2)
    done = seen(first, 10)
    state = first[0].state_dict()
    changed = loaders({str(folder / "large"): 5, str(folder / "small"): 0}, 1, 2)
    changed[0].load_state_dict(state)
    more = seen(changed, 8)
    large = len(changed[0].dataset.parts[0])
    assert all(number < large for number in more), "the small one has no weight any more"
    drawn = [number for number in done + more if number < large]
    assert len(drawn) == len(set(drawn)) == 26, "ten of the large one before, sixteen after: none lost, none twice"


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["windows", "packed"])
def test_two_processes_are_one(folder, tmp_path, corpus):
    given = settings(folder, sources(folder)["blend"], **{"data.corpus": corpus, "data.on_long": "split"})
    one = fit_here(tmp_path / "one", **given)
    two = fit(tmp_path / "two", **given | {"trainer.devices": 2, "data.micro_batch": 1, "trainer.strategy": "ddp"})
    assert max(abs(a - b) for a, b in zip(series(one, "loss"), series(two, "loss"))) < 1e-5
