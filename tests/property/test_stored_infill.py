"Stored faulty texts as training data: each row as it is stored, whatever the folder; weights of edits that are one over their frequency; what does not go together."

import json
import math

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

from fengshen.data.cbart_dataloader import Infill, InfillCollator, InfillDataset, fixed_weights, read_pt, write_infill
from fengshen.data.cbart_dataloader.edits import NAMES
from fengshen.data.masking.objectives import Bert
from fengshen.data.mmap_dataloader.mmap_convert import convert
from fengshen.data.mmap_dataloader.mmap_writer import write_mmap
from fengshen.data.universal_datamodule import LengthWarmup, UniversalDataModule
from fengshen.data.universal_datamodule.faulty import FaultyTexts
from tests.training_runs import fit_here, here, series

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = list("白日依山尽黄河入海流欲穷千里目更上一层楼床前明月光疑是地霜举头望低思故乡")


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(MARKS + WORDS)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    "Raw texts, sets of two and of four edits, the original's shards for train and dev, a file of lists."
    folder, rng = tmp_path_factory.mktemp("infill"), np.random.default_rng(0)
    texts = [rng.integers(5, 5 + len(WORDS), rng.integers(3, 15)).tolist() for _ in range(41)]
    (folder / "old").mkdir()
    write_mmap(folder / "raw", texts, vocab_size=len(tokenizer), tokenizer=tokenizer)
    write_infill(folder / "one", texts, tokenizer, seed=1)
    write_infill(folder / "more", texts[:9], tokenizer, seed=2, max_insert=2)
    for split, shard, source in (("train", 0, "one"), ("train", 1, "one"), ("dev", 0, "one")):
        convert(folder / source, folder / "old" / f"{split}_synthetic_max_insert_label1_insert_mode0_{shard}", to="original", progress=False)
    rows = InfillDataset(folder / "one")
    torch.save({name: [rows[i][name].tolist() for i in range(len(rows))] for name in NAMES}, folder / "lists.pt")
    write_mmap(folder / "lists", read_pt(folder / "lists.pt"))
    return folder


def module(tokenizer, train, objective=None, **more):
    data = UniversalDataModule(train, tokenizer=tokenizer, objective=objective or Infill(), **dict(max_length=20, micro_batch=4) | more)
    data.setup("fit")
    return data


@pytest.mark.parametrize("name", ["one", "lists", "old/train_synthetic_max_insert_label1_insert_mode0_0"])
def test_every_row_is_learned_once_as_it_is_stored(folder, tokenizer, name):
    stored = InfillDataset(folder / "one")
    data = module(tokenizer, str(folder / name))
    seen = {}
    for batch, window in zip(data.train_dataloader(), data.train_dataloader().sampler, strict=True):
        assert batch["input_ids"].shape == (4, 20) and data.one_shape
        want = InfillCollator(tokenizer)([stored[i] for i in window[0]])
        x, t = want["input_ids"].shape[1], want["labels"].shape[1]
        rows = len(window[0])
        assert torch.equal(batch["input_ids"][:rows, :x], want["input_ids"]) and torch.equal(batch["encoder_labels"][:rows, :x], want["encoder_labels"])
        assert torch.equal(batch["labels"][:rows, 1 : t + 1], want["labels"]) and torch.equal(batch["decoder_input_ids"][:rows, :t], want["decoder_input_ids"])
        seen |= dict.fromkeys(batch["numbers"])
    assert sorted(seen) == list(range(41))


def test_a_folder_of_the_originals_shards_has_all_splits(folder, tokenizer):
    data = module(tokenizer, str(folder / "old"), valid=str(folder / "old"))
    assert (len(data.sets["train"]), len(data.sets["valid"])) == (82, 41)
    data = module(tokenizer, str(folder / "old"), split="3,1")
    assert [len(data.sets[name]) for name in ("train", "valid")] == [62, 20], "a part of the train files, not the dev files"
    (batch, *_), stored = data.val_dataloader(), InfillDataset(folder / "one")
    assert batch["input_ids"][0, : len(stored[21][NAMES[0]])].tolist() == stored[21][NAMES[0]].tolist(), "row 62 of the two shards"
    assert data.prompts(2)[0][0].startswith("[CLS]")


def test_sets_by_weight_go_on_where_they_stopped(folder, tokenizer):
    make = lambda: module(tokenizer, {str(folder / "one"): 1, str(folder / "more"): 3}, Infill(max_insert=2)).train_dataloader()  # noqa: E731
    loader = make()
    straight = list(loader)
    loader = make()
    stream = iter(loader)
    for _ in range(3):
        next(stream)
    again = make()
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert loader.state_dict()["blend"]["drawn"] == [3, 9]
    rest = list(again)
    assert [b["numbers"] for b in rest] == [b["numbers"] for b in straight[3:]]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(rest, straight[3:]) for k in a if torch.is_tensor(a[k]))


def test_weights_follow_from_the_data(folder, tokenizer):
    counts = np.zeros(3)
    for row in InfillDataset(folder / "one"):
        counts += np.bincount(row[NAMES[1]].numpy(), minlength=3)
    data = module(tokenizer, str(folder / "one"), Infill(weights="data"))
    assert np.allclose(data.objective.label_weights, (1 / counts) / (1 / counts).sum()) and math.isclose(sum(data.objective.label_weights), 1)
    both = module(tokenizer, [str(folder / "one"), str(folder / "one")], Infill(weights="data"))
    assert np.allclose(both.objective.label_weights, data.objective.label_weights)
    for name, want in dict(model=None, ones=[1.0] * 7, fixed=fixed_weights(7).tolist()).items():
        assert module(tokenizer, str(folder / "one"), Infill(weights=name, max_insert=5)).objective.label_weights == want


def test_weights_of_raw_texts_are_those_of_the_first_epoch(folder, tokenizer):
    data = module(tokenizer, str(folder / "raw"), Infill(weights="data"))
    batches = list(data.train_dataloader())
    counts = sum(np.bincount(b["encoder_labels"][b["encoder_labels"] >= 0].numpy(), minlength=3) for b in batches)
    assert np.allclose(data.objective.label_weights, (1 / counts) / (1 / counts).sum())
    plain = module(tokenizer, str(folder / "raw"), Infill())
    assert plain.samples("train").fingerprint == data.samples("train").fingerprint, "weights are no part of the rows"


def test_what_does_not_go_together(folder, tokenizer):
    one, raw = str(folder / "one"), str(folder / "raw")
    for source, more, said in [
        (one, dict(objective=Bert()), "stored faulty texts are for infilling: got 'data.objective: Bert'"),
        ([one, raw], {}, "cannot be mixed"),
        (one, dict(max_length=10), "set data.max_length to .* or data.on_long to drop"),
        (one, dict(on_long="truncate"), "cannot be cut"),
        (str(folder / "more"), {}, "set data.objective.max_insert to 2"),
        (one, dict(length_warmup=LengthWarmup(10, 9)), "leave data.length_warmup out"),
    ]:
        with pytest.raises(ValueError, match=said):
            module(tokenizer, source, **more)
    with pytest.raises(ValueError, match="got 'data.objective: None'"):
        UniversalDataModule(one, tokenizer=tokenizer, max_length=20).setup("fit")
    with pytest.raises(ValueError, match="no stored text fits a row.*raise data.max_length"):
        FaultyTexts([one], 1, num_labels=3, on_long="drop")
    short = module(tokenizer, one, max_length=10, on_long="drop")
    assert 0 < len(short.sets["train"]) < 41 and sum(len(b["numbers"]) for b in short.train_dataloader()) == len(short.sets["train"])


def test_a_recipe_names_a_stored_set(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in dict(layers=1, attention_heads=2, ffn_dim=16).items()}
    config = dict(model_type="fengshen-bart", d_model=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, vocab_size=len(tokenizer))
    (tmp_path / "bart.json").write_text(json.dumps(config | sides), "utf8")
    run = fit_here(tmp_path / "run", **{
        "model.config": str(tmp_path / "bart.json"), "data.train": str(folder / "one"), "data.valid": None, "data.split": "3,1", "data.tokenizer": str(tmp_path / "tokenizer"),
        "data.objective": "Infill", "data.objective.weights": "data", "data.max_length": 20, "data.micro_batch": 4, "trainer.max_steps": 2})
    assert len(series(run, "loss")) == 2 and all(map(math.isfinite, series(run, "loss")))


@pytest.mark.slow
def test_the_doctor_examines_a_stored_set(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    status, out, err = here(
        "doctor", "-c", "pretrain_cbart", "--size", "7m", "--data.train", folder / "one", "--data.split", "3,1", "--data.tokenizer", tmp_path / "tokenizer", "--data.max_length", 20,
        "--global_batch", 4, "--trainer.max_steps", 4, "--trainer.accelerator", "cpu", "--model.config.d_model", 16, "--run_dir", tmp_path / "run")
    assert "faulty texts" in out and "fail" not in out and "skip" not in out, out + err
    assert status == 0
