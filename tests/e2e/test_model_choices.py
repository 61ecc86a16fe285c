"""What a recipe may choose about the model does what it says: another architecture, a loss and a metric of one's own, a tokenizer with more tokens."""
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torchmetrics import Metric
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fengshen.losses import cross_entropy
from fengshen.training.checkpoint import checkpoints
from fengshen.training.export import build
from fengshen.training.module import find_head
from fengshen.training.weights import read_weights
from fengshen.utils.resources import resource
from tests.training_runs import apart, fit, fit_here, here, read, series, weights

STEPS = {"trainer.max_steps": 3, "data.packing": False, "data.micro_batch": 4}
SMALL = dict(vocab_size=1280, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=1)
CHANGED = dict(  # architectures that do something to their logits after the head
    gemma2=dict(model_type="gemma2", head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=50.0),
    granite=dict(model_type="granite", logits_scaling=4.0),
    cohere=dict(model_type="cohere", logit_scale=0.25),
)


def config_of(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(SMALL | values))
    return str(path)


def newest(run):
    "The model of a run's newest checkpoint, on the CPU."
    return build(checkpoints(run)[-1], torch.float32)


def models_own_loss(model):
    "Mean loss over the scored tokens of the packaged validation pairs, padded, as transformers computes it."
    from fengshen.data.task_dataloader.datamodule import ConversationDataModule

    data = ConversationDataModule(valid="fengshen:qa_demo/valid.jsonl", tokenizer="fengshen:tokenizer_demo", max_length=128, packing=False)
    data.setup()
    total = count = 0
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum").item()
        count += batch["num_labels"]
    return total / count


@pytest.mark.parametrize("name", CHANGED)
def test_logits_that_change_after_the_head(tmp_path, name):
    "The loss of a model that scales or caps its logits is its own: the validation loss equals what transformers computes from the checkpoint."
    settings = {"model.config": config_of(tmp_path, **CHANGED[name]), "model.optimizer.lr": 3e-3, "trainer.val_check_interval": 20, "trainer.max_steps": 20,
                "data.packing": name != "gemma2", "model.schedule.kind": "constant"}
    run = fit_here(tmp_path / "run", **STEPS | settings)
    losses = series(run, "loss")
    assert losses[-1] < losses[0]
    own = models_own_loss(newest(run))
    assert abs(series(run, "loss", "valid")[-1] - own) < 1e-4


def test_a_cap_is_seen_even_when_the_logits_are_small():
    "A fresh model's logits are nearly zero, where a cap does nothing; training makes them large, and then the loss would be another model's."
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SMALL | dict(model_type="gemma2", head_dim=8, final_logit_softcapping=30.0))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        ids = torch.arange(4)[None]
        assert model(ids).logits.abs().max() < 1
        assert not find_head(model)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_plain_head_is_told_from_a_changed_one(name):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(SMALL | dict(model_type="llama") if name == "llama" else dict(
        model_type="gpt2", vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))))
    assert find_head(plain) and plain.training
    before = copy.deepcopy(plain.state_dict())
    assert all(torch.equal(before[k], v) for k, v in plain.state_dict().items())


def focal(logits_nv, labels_n):
    "A loss of one's own: tokens that are nearly right count less."
    loss = cross_entropy(logits_nv, labels_n)
    return (1 - torch.exp(-loss)) ** 2 * loss


class TopFive(Metric):
    "A metric of one's own: the right token is among the five likeliest."

    def __init__(self):
        super().__init__()
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits_nv, labels_n):
        self.hits += (logits_nv.topk(5).indices == labels_n[:, None]).sum()
        self.count += labels_n.numel()

    def compute(self):
        return self.hits / self.count


@pytest.fixture
def tiny(tmp_path):
    return config_of(tmp_path, model_type="llama")


def test_a_loss_and_a_metric_of_ones_own(tmp_path, tiny):
    common = STEPS | {"model.config": tiny, "trainer.val_check_interval": 3}
    plain = fit_here(tmp_path / "plain", **common)
    own = fit_here(tmp_path / "own", **common | {"model.loss": f"{__name__}.focal", "model.metrics": {
        "token_accuracy": "fengshen.metric.TokenAccuracy", "top_five": f"{__name__}.TopFive"}})
    first = torch.tensor(series(plain, "loss")[0])
    assert 0 < series(own, "loss")[0] < first, "the focal loss is smaller than the cross-entropy of the same tokens"
    valid = read(own, "valid")[-1]
    assert 0 <= valid["token_accuracy"] <= valid["top_five"] <= 1 and valid["top_five"] > 0
    assert "top_five" not in read(plain, "valid")[-1]


@pytest.mark.parametrize("setting", [{"model.gradient_checkpointing": True}, {"data.packing": True, "model.attention": "eager"}])
def test_dropout_is_drawn_the_same_when_activations_are_recomputed(tmp_path, setting):
    "With dropout on, a block that is computed twice has to drop the same places both times."
    config = tmp_path / "drop.json"
    config.write_text(json.dumps(dict(model_type="gpt2", vocab_size=1280, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)))
    common = STEPS | {k: v for k, v in setting.items() if k != "model.gradient_checkpointing"} | {"model.config": str(config)}
    kept = fit_here(tmp_path / "kept", **common, **{"model.gradient_checkpointing": False})
    again = fit_here(tmp_path / "again", **common, **{"model.gradient_checkpointing": True})
    assert apart(series(again, "loss"), series(kept, "loss")) < 1e-5 and apart(series(again, "grad_norm"), series(kept, "grad_norm")) < 1e-4


# A tokenizer with more tokens than the model has rows


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    "The packaged tokenizer with five more tokens."
    folder = tmp_path_factory.mktemp("wider")
    tokenizer = AutoTokenizer.from_pretrained(resource("fengshen:tokenizer_demo"))
    assert tokenizer.add_tokens([f"<新{i}>" for i in range(5)]) == 5
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("strategy", ["auto", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_resized_vocabulary_is_trained_and_exported(tmp_path, wider, strategy):
    make = fit_here if strategy == "auto" else fit
    config = config_of(tmp_path, model_type="gpt2", n_positions=128, n_embd=32, n_layer=1, n_head=2)
    run = make(tmp_path / "run", **STEPS, **{"model.config": config, "data.tokenizer": wider, "trainer.strategy": strategy})
    model, tokenizer = newest(run), AutoTokenizer.from_pretrained(checkpoints(run)[-1])
    assert len(tokenizer) == model.config.vocab_size == 1285 == model.get_output_embeddings().weight.shape[0]
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr(), "still tied"
    rows = model.get_input_embeddings().weight
    assert rows[1280:].isfinite().all() and rows[1280:].norm(dim=1).max() < rows[:1280].norm(dim=1).max()


def test_untied_weights_stay_untied(tmp_path):
    run = fit_here(tmp_path / "run", **STEPS, **{"model.config": config_of(tmp_path, model_type="llama", tie_word_embeddings=False)})
    model = newest(run)
    expected = weights(run)
    assert set(model.state_dict()) == set(expected) and all(torch.equal(model.state_dict()[k], v) for k, v in expected.items())
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_finetuning_goes_on_from_an_export(tmp_path, tiny):
    "An exported folder is a model.path; its tokenizer is the data's when none is named, and the first loss is where the last run stood."
    first = fit_here(tmp_path / "first", **STEPS, **{"model.config": tiny, "export": True, "trainer.val_check_interval": 3})
    settings = {"model.config": None, "model.path": str(first / "export"), "data.tokenizer": None, "model.optimizer.lr": 1e-12, "trainer.val_check_interval": 3}
    second = fit_here(tmp_path / "second", **STEPS, **settings)
    assert apart(series(second, "loss", "valid"), series(first, "loss", "valid")) < 1e-5


# Exports that cannot be what they say


def test_an_export_never_deletes_what_is_no_export(tmp_path, tiny):
    "`--out` may name any folder; what somebody keeps there is not ours to delete."
    run = fit_here(tmp_path / "run", **STEPS, **{"model.config": tiny})
    mine = tmp_path / "models"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    status, out, err = here("export", run, "--out", mine)
    assert (mine / "thesis.txt").exists()
    assert status == 2 and "models" in err


def test_a_checkpoint_of_another_model_is_refused(tmp_path, tiny):
    run = fit_here(tmp_path / "run", **STEPS, **{"model.config": tiny})
    folder = checkpoints(run)[-1]
    config = json.loads((folder / "config.json").read_text())
    for change in (dict(num_hidden_layers=3), dict(num_hidden_layers=1), dict(hidden_size=16)):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="not those of its config"):
            build(folder, torch.float32)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "state.ckpt").write_bytes((folder / "state.ckpt").read_bytes()[:-200])
    with pytest.raises((ValueError, RuntimeError)):
        read_weights(folder)
