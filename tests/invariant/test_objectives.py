"""Runs that learn something else than the next token: the loss is the model's own, whatever the split of a batch, and a run that was stopped goes on to the bit."""
import json

import numpy as np
import pytest
import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForPreTraining, BertTokenizer, T5Config, T5ForConditionalGeneration

from fengshen.data.batch import Batch
from fengshen.data.cbart_dataloader.objective import Infill
from fengshen.data.masking.objectives import Bert
from fengshen.data.mmap_dataloader.mmap_writer import write_mmap
from fengshen.data.universal_datamodule import UniversalDataModule
from fengshen.data.universal_datamodule.corrupted import Pairs
from fengshen.models.bart import BartForTextInfill, BartTextInfillConfig
from fengshen.training.kinds import attention_of, find_head
from fengshen.training.module import LanguageModelModule
from fengshen.utils.device import seeded
from fengshen.utils.kernels.biased import BIASED
from tests.training_runs import apart, back_to, fit_here, flags, here, series, weights, weights_apart

CHARACTERS = "白日依山尽黄河入海流欲穷千里目更上一层楼床前明月光疑是地霜举头望低思故乡，。"
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"<extra_id_{i}>" for i in range(20)), "[BOS]", "[EOS]"]
LINES = ["白日依山尽，黄河入海流。", "欲穷千里目，更上一层楼。", "床前明月光，疑是地上霜。", "举头望明月，低头思故乡。"]
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64)
SIDES = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in dict(layers=1, attention_heads=2, ffn_dim=32).items()}
BART = dict(d_model=16, max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3) | SIDES
CONFIGS = {
    "Bert": dict(model_type="bert", **SMALL),
    "T5": dict(model_type="t5", d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0),
    "Bart": dict(model_type="bart", **BART),
    "UniLM": dict(model_type="fengshen-roformer", **SMALL),
    "Infill": dict(model_type="fengshen-bart", **BART),
}


@pytest.fixture(scope="module")
def tokenizer():
    made = BertTokenizer(vocab={word: i for i, word in enumerate([*MARKS, *dict.fromkeys(CHARACTERS)])})
    made.add_special_tokens(dict(bos_token="[BOS]", eos_token="[EOS]", additional_special_tokens=[m for m in MARKS if m.startswith("<")]))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    "A corpus, its tokenizer, and a small model for each objective."
    folder = tmp_path_factory.mktemp("objectives")
    tokenizer.save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(LINES, rng.integers(1, 9))) for _ in range(60)]
    write_mmap(folder / "corpus", (tokenizer(text, add_special_tokens=False)["input_ids"] + [3] for text in texts), vocab_size=len(tokenizer))
    for name, values in (CONFIGS | dict(gpt2=dict(model_type="gpt2", n_positions=64, n_embd=16, n_layer=1, n_head=2))).items():
        (folder / f"{name}.json").write_text(json.dumps(values | dict(vocab_size=len(tokenizer))), "utf8")
    return folder


def settings(folder, name, **more):
    return {"model.config": str(folder / f"{name}.json"), "model.optimizer.lr": 5e-3, "data.train": str(folder / "corpus"), "data.valid": None, "data.split": "80,20",
            "data.tokenizer": str(folder / "tokenizer"), "data.objective": name, "data.max_length": 32, "data.micro_batch": 4, "trainer.max_steps": 8,
            "trainer.val_check_interval": 8, "trainer.check_val_every_n_epoch": None} | more


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("Bart", "UniLM"))) for name in CONFIGS])
def test_each_objective_learns_and_goes_on_to_the_bit(folder, tmp_path, name):
    given = settings(folder, name, **{"checkpoint.every_n_steps": 3, "checkpoint.keep": 9, "trainer.accumulate_grad_batches": 2, "data.micro_batch": 2, "trainer.val_check_interval": 16})
    straight = fit_here(tmp_path / "straight", **given)
    losses = series(straight, "loss")
    assert len(losses) == 8 and losses[-1] < losses[0]
    copy = back_to(straight, 3, tmp_path)
    fit_here(copy, **given)
    assert series(copy, "loss") == losses and series(copy, "loss", "valid") == series(straight, "loss", "valid")
    assert weights_apart(weights(copy), weights(straight)) == 0


@pytest.mark.parametrize("name, more", [("Bert", {"data.objective.sentence_order": True}), ("Infill", {})])
def test_two_losses_are_one_batch_however_it_is_split(folder, tmp_path, name, more):
    "Each of the two is a mean of its own over the global batch: labels of either kind are spread unevenly over the micro-batches."
    whole = fit_here(tmp_path / "whole", **settings(folder, name, **more))
    parts = fit_here(tmp_path / "parts", **settings(folder, name, **more | {"data.micro_batch": 1, "trainer.accumulate_grad_batches": 4, "data.valid_micro_batch": 3, "trainer.val_check_interval": 32}))
    assert apart(series(parts, "loss"), series(whole, "loss")) < 1e-5 and apart(series(parts, "grad_norm"), series(whole, "grad_norm")) < 1e-4
    assert apart(series(parts, "loss", "valid"), series(whole, "loss", "valid")) < 1e-5
    name = "sentence_loss" if name == "Bert" else "edit_loss"
    (valid,) = [dict(loss=series(whole, "loss", "valid")[0], token=series(whole, "token_loss", "valid")[0], second=series(whole, name, "valid")[0])]
    assert valid["second"] > 0 and abs(valid["token"] + valid["second"] - valid["loss"]) < 1e-6


def module_of(model, kind):
    module = LanguageModelModule(config="none.json")
    module.model, module.kind, module.attention, module.head = model, kind, "sdpa", find_head(model)
    module.plain_head = module.head is not None
    return module


def texts_of(tokenizer, rows, length):
    rng = np.random.default_rng(1)
    return [np.array(tokenizer("".join(rng.choice(LINES, 6)), add_special_tokens=False)["input_ids"][:length]) for _ in range(rows)]


@pytest.mark.parametrize("plain", [True, False])
def test_the_loss_of_pretraining_is_berts(tokenizer, plain):
    objective = Bert(sentence_order=True).bind(tokenizer)
    batch = objective.batch(texts_of(tokenizer, 3, 25), 3, 32, 0, 0, np.arange(3))
    with seeded(0):
        model = BertForPreTraining(BertConfig(vocab_size=len(tokenizer), **SMALL))
    module = module_of(model, "pretraining")
    assert module.head.name == "cls.predictions"
    module.plain_head = plain
    tokens, second = module.losses(batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    want = model(**inputs, labels=batch["labels"][:, 1:].contiguous(), next_sentence_label=batch["sentence_labels"]).loss
    torch.testing.assert_close(tokens / batch["num_labels"] + second / (batch["sentence_labels"] != -100).sum(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [0, 1])
def test_the_loss_of_infilling_is_cbarts(tokenizer, kind):
    objective = Infill().bind(tokenizer)
    batch = objective.batch(texts_of(tokenizer, 3, objective.source_length(32)), 3, 32, 0, 0, np.arange(3))
    with seeded(0):
        model = BartForTextInfill(BartTextInfillConfig(vocab_size=len(tokenizer), encoder_loss_type=kind, loss_weight=0.7, **BART))
    tokens, second = module_of(model, "infill").losses(batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")}
    edits = batch["encoder_labels"].float() if kind else batch["encoder_labels"]
    want = model(**inputs, labels=batch["labels"][:, 1:], encoder_labels=edits).loss
    torch.testing.assert_close(tokens / batch["num_labels"] + second / (batch["encoder_labels"] != -100).sum(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "DebertaV2ForMaskedLM", "MegatronBertForMaskedLM", "BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_the_head_gives_the_models_own_loss(name):
    "Whether a head was found or not."
    cls = getattr(transformers, name)
    sizes = dict(BART, vocab_size=40) if name.startswith("Bart") else dict(CONFIGS["T5"], vocab_size=40) if name.startswith("T5") else dict(SMALL, vocab_size=40)
    sizes.pop("model_type", None)
    with seeded(0):
        model = cls(cls.config_class(**sizes)).eval()
    ids = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(9) % 3 == 1, ids, -100)
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.cat([torch.full((2, 1), -100), labels], 1))
    kind = "seq2seq" if model.config.is_encoder_decoder else "masked"
    more = dict(decoder_input_ids=torch.cat([torch.full((2, 1), model.config.decoder_start_token_id), ids[:, :-1]], 1)) if kind == "seq2seq" else {}
    batch.update(more)
    module = module_of(model, kind)
    want = model(input_ids=ids, attention_mask=batch["attention_mask"], labels=labels, **more).loss
    torch.testing.assert_close(module.token_loss(batch) / 6, want, rtol=1e-5, atol=1e-5)


def test_an_objective_says_what_it_needs(folder, tmp_path):
    given = {"run_dir": str(tmp_path / "run"), "trainer.strategy": "auto"}
    for more, said in [({"data.tokenizer": "fengshen:tokenizer_demo"}, "mask"), ({"data.corpus": "packed"}, "leave data.corpus out"),
                       ({"model.config": str(folder / "T5.json")}, "T5"), ({"data.objective": "Objective"}, "does not say what is learned"),
                       ({"data.objective": "UniLM", "model.config": str(folder / "gpt2.json")}, "fengshen-roformer"),
                       ({"data.objective": "Infill", "data.objective.max_insert": 2, "model.config": str(folder / "Infill.json")}, "set num_labels to 4")]:
        status, out, err = here("fit", "-c", "demo", *flags(settings(folder, "Bert", **given | more)))
        assert status == 2 and said in err and "Traceback" not in err, err


def test_texts_that_nobody_tokenised_and_what_is_not_used(folder, tmp_path):
    "A file of texts takes the same way; the end that a sample has gives way to the marks of the row."
    rows = [json.dumps(dict(text=line * 2), ensure_ascii=False) for line in LINES]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows), "utf8")
    data = UniversalDataModule(str(tmp_path / "texts.jsonl"), tokenizer=str(folder / "tokenizer"), objective=Bert(rate=0.2), max_length=32, row_length=64, micro_batch=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ends = (batch["input_ids"] == 3).sum(1)
    assert batch["input_ids"].shape == (4, 32) and ends.tolist() == [1] * 4 and batch["num_labels"] > 0
    assert data.stops is None and not data.packing and not data.one_shape


def test_pairs_end_where_the_template_does(folder, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(dict(question=a, answer=b), ensure_ascii=False) for a, b in zip(LINES, LINES[1:])), "utf8")
    data = UniversalDataModule(str(tmp_path / "pairs.jsonl"), tokenizer=str(folder / "tokenizer"), objective=Pairs(), template="{question}{answer}", max_length=48, row_length=96, micro_batch=3)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    said = capsys.readouterr().out
    assert "data.row_length 96 is not used" in said and "loss_on = last" in said
    end = data.tokenizer.eos_token_id
    assert data.stops == [end] and sorted(batch["labels"][row][batch["labels"][row] != -100][-1].item() for row in range(3)) == [end] * 3
    assert torch.equal(batch["decoder_input_ids"][:, 1:][batch["labels"][:, 2:] != -100], batch["labels"][:, 1:-1][batch["labels"][:, 2:] != -100])


def test_rows_can_be_looked_at_before_training(folder):
    words = flags(settings(folder, "T5", **{"trainer.strategy": "auto"}))
    status, out, err = here("data", "show", "-c", "demo", *words, "--sample", "3", "--count", "2")
    assert status == 0 and out.count("target") == 2 and "<extra_id_0>" in out and "Batch: 2 x 32" in out, out + err
    assert here("data", "show", "-c", "demo", *words, "--sample", "100000")[0] == 1
    status, out, err = here("data", "show", "-c", "demo", *words, "--histogram")
    assert status == 2 and "--sample NUMBER" in err


@pytest.mark.parametrize("triton,width,found", [(True, 16, BIASED), (True, 8, "eager"), (False, 16, "eager")])
def test_scores_with_a_learned_bias_get_kernels_or_the_models_lines(monkeypatch, capsys, triton, width, found):
    "On an accelerator in 16 bits; float32, another model, and what was asked for stay."
    monkeypatch.setattr("fengshen.training.kinds.device_kind", lambda: "cuda")
    monkeypatch.setattr("fengshen.utils.kernels.biased.TRITON", triton)
    small = dict(vocab_size=40, d_model=16, d_kv=width, d_ff=16, num_layers=1, num_heads=2)
    t5, bart = T5ForConditionalGeneration(T5Config(**small)), BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16))
    ways = [(t5, "auto", torch.bfloat16), (t5, "auto", torch.float32), (t5, "sdpa", torch.bfloat16), (bart, "auto", torch.bfloat16)]
    assert [attention_of("seq2seq", *way) for way in ways] == [found, "sdpa", "sdpa", "sdpa"]
    assert ("Triton is not installed" if not triton else "these have 8" if width == 8 else "there are kernels") in capsys.readouterr().out
