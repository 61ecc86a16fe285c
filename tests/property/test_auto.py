"""Which class opens a folder: every route and every refusal of `fengshen.models.auto`, on folders small enough to be made here."""
import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fengshen.models import auto
from fengshen.models.auto.classes import left_over
from fengshen.models.auto.recognise import ABSENT, REPOSITORIES, Seen, look, recognise, weight_names
from fengshen.models.auto.registry import FAMILIES, Later, config_class, model_class
from fengshen.models.loading import from_checkpoint, from_config, read_config_json, zero3_context

transformers.utils.logging.disable_progress_bar()
BERT = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32, pad_token_id=0)
T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0, decoder_start_token_id=1)
BART = dict(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=32, num_labels=3)
SIZES = dict(roformer=BERT, longformer=BERT | dict(attention_window=4), megatron_t5=T5 | dict(max_position_embeddings=32), bart=BART)
PUBLISHED = dict(roformer="megatron-bert", longformer="longformer", megatron_t5="T5", bart="bart")  # what published folders of each family call themselves
BODY = dict(roformer="AutoModelForMaskedLM", longformer="AutoModelForMaskedLM", megatron_t5="AutoModelForSeq2SeqLM", bart="AutoModelForTextInfill")
STOCK = dict(longformer=(transformers.LongformerForMaskedLM, transformers.LongformerConfig, SIZES["longformer"]),
             t5=(transformers.T5ForConditionalGeneration, transformers.T5Config, T5),
             bart=(transformers.BartForConditionalGeneration, transformers.BartConfig, BART),
             roformer=(transformers.RoFormerForMaskedLM, transformers.RoFormerConfig, BERT),
             megatron_bert=(transformers.MegatronBertForMaskedLM, transformers.MegatronBertConfig, BERT))


def ours(family, head=None, seed=0, **fields):
    "A small model of a family, every number of it random."
    torch.manual_seed(seed)
    model = model_class(family, head or BODY[family])(config_class(family)(**SIZES[family] | fields)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def rewrite(folder, drop=(), **values):
    "Change fields of a folder's config.json."
    file = folder / "config.json"
    kept = {k: v for k, v in (json.loads(file.read_text("utf8")) | values).items() if k not in drop}
    file.write_text(json.dumps(kept), "utf8")


def disguise(model, family, folder, file="pytorch_model.bin"):
    "A folder as the original published it: another model type, no class named, weights in one file."
    model.save_pretrained(folder)
    weights = {k: v.contiguous() for k, v in load_file(folder / "model.safetensors").items()}
    if file != "model.safetensors":
        torch.save(weights, folder / file, _use_new_zipfile_serialization=file == "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    rewrite(folder, drop=("architectures",), model_type=PUBLISHED[family])
    return folder


def scores(model):
    "What it says of a fixed text."
    ids = torch.arange(3, 11)[None]
    more = dict(decoder_input_ids=ids) if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_folder_is_loaded_as_what_it_is(family, tmp_path, capsys):
    "Under the name of another architecture, without class or model type of ours: the right class, the same scores, and a word about why."
    model = ours(family)
    found = getattr(auto, BODY[family]).from_pretrained(disguise(model, family, tmp_path))
    assert type(found) is type(model)
    assert torch.equal(scores(found), scores(model))
    assert f"model = {type(model).__name__}: its " in capsys.readouterr().out
    found.save_pretrained(tmp_path / "again")
    said = json.loads((tmp_path / "again/config.json").read_text("utf8"))
    assert (said["model_type"], said["architectures"]) == (FAMILIES[family].model_type, [type(model).__name__])


def test_what_a_folder_declares_counts_more_than_its_model_type(tmp_path):
    "The original's pipelines wrote fengshen_model_type beside whatever model type there was."
    model = ours("roformer")
    disguise(model, "roformer", tmp_path)
    rewrite(tmp_path, model_type="bert", fengshen_model_type="fengshen-roformer")
    found = auto.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(scores(found), scores(model)) and found.config.model_type == "fengshen-roformer"


def test_the_table_of_types_can_be_copied():
    "A stand-in for a family that nobody asked for yet is an object like others."
    later = copy.deepcopy(Later("bart"))
    assert later.model_type == "fengshen-bart" and isinstance(later(**BART), later) and later.__name__ == "BartTextInfillConfig"


@pytest.mark.parametrize("kind", STOCK)
def test_the_namesake_of_transformers_goes_to_transformers(kind, tmp_path):
    cls, config, sizes = STOCK[kind]
    cls(config(**sizes)).save_pretrained(tmp_path)
    name = "AutoModelForMaskedLM" if "Masked" in cls.__name__ else "AutoModelForSeq2SeqLM"
    assert type(getattr(auto, name).from_pretrained(tmp_path)) is cls
    assert type(auto.AutoConfig.from_pretrained(tmp_path)) is config


CONFIGS = {
    "longformer by field": (dict(model_type="longformer", use_sparse_attention=False), "longformer"),
    "longformer of transformers": (dict(model_type="longformer", attention_window=[4]), None),
    "t5 by field": (dict(model_type="t5", max_position_embeddings=512, layer_norm_epsilon=1e-5), "megatron_t5"),
    "t5 of transformers": (dict(model_type="t5", layer_norm_epsilon=1e-6, relative_attention_max_distance=128), None),
    "t5 with a stray field": (dict(model_type="t5", max_position_embeddings=512, layer_norm_epsilon=1e-6), None),
    "t5 in capitals": (dict(model_type="T5"), "megatron_t5"),
    "roformer of the original": (dict(model_type="roformer", position_embedding_type="absolute"), "roformer"),
    "roformer of transformers": (dict(model_type="roformer", rotary_value=False), None),
    "megatron-bert": (dict(model_type="megatron-bert"), None),
    "infilling by field": (dict(model_type="bart", encoder_loss_type=0), "bart"),
    "infilling by class": (dict(model_type="bart", architectures=["BartForTextInfill"]), "bart"),
    "bart with a leftover of infilling": (dict(model_type="bart", classif_dropout=0.1, architectures=["BartForConditionalGeneration"]), None),
    "a type of ours": (dict(model_type="fengshen-megatron-t5"), "megatron_t5"),
    "declared": (dict(model_type="bert", fengshen_model_type="fengshen-roformer"), "roformer"),
    "declared t5": (dict(model_type="t5", fengshen_model_type="fengshen-megatron_t5"), "megatron_t5"),
    "declared to be stock": (dict(model_type="roformer", position_embedding_type="absolute", fengshen_model_type="huggingface-auto"), None),
    "gpt2": (dict(model_type="gpt2"), None),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_alone(case):
    values, family = CONFIGS[case]
    assert recognise(Seen(values)).family == family


REFUSED = {
    "zen1": ["bert.encoder.word_layers.0.output.dense.bias"], "zen2": ["bert.encoder.word_layers.0.attention.self.r_r_bias"],
    "llama_parallel": ["llama.embed_in.word_embeddings.weight"], "deltalm": ["model.decoder.layers.0.ffn_layer_norm.weight"],
    "vae": ["vae_model.encoder.linear.weight"], "transfo_xl_denoise": ["transformer.r_w_bias"], "ubert": ["biaffine_query_key_cls.U"],
    "uniex": ["triaffine.weight"], "tagging": ["crf.transitions"], "tcbert": ["bert.bert.pooler.dense.bias", "linear_classifier.bias"],
    "unimc": ["bert.deberta.embeddings.word_embeddings.weight"], "taiyi_clip": ["text_model.encoder.layer.0.attention.self.query.bias"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_yet_is_refused_by_its_weights(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="bert", **BERT)), "utf8")
    save_file({n: torch.zeros(1) for n in REFUSED[name]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not have yet") as error:
        auto.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert repr(name) in str(error.value) and ABSENT[name].do in str(error.value)


def test_every_absent_architecture_has_a_refusal():
    assert REFUSED.keys() == ABSENT.keys()


@pytest.mark.parametrize("values", [dict(model_type="", num_hidden_word_layers=2), dict(model_type="Deltalm"), dict(model_type="llama", llama_mlp_multiple_of=256),
                                    dict(model_type="transfo_xl_denoise"), dict(model_type="bert", triaffine_hidden_size=12),
                                    dict(model_type="bert", fengshen_model_type="fengshen-zen1")])
def test_what_is_not_here_yet_is_refused_by_its_configuration(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values), "utf8")
    with pytest.raises(ValueError, match="does not have yet"):
        read_config_json(tmp_path)


def test_an_unknown_declaration_is_refused():
    with pytest.raises(ValueError, match="unknown fengshen_model_type: got 'fengshen-bert'.*fengshen-longformer"):
        recognise(Seen(dict(model_type="bert", fengshen_model_type="fengshen-bert")))


@pytest.mark.parametrize("name", REPOSITORIES)
def test_repositories_are_known(name):
    seen = Seen(dict(model_type="bert"), source=f"IDEA-CCNL/{name}")
    if REPOSITORIES[name] in FAMILIES:
        assert recognise(seen).family == REPOSITORIES[name]
    else:
        with pytest.raises(ValueError, match="is published with it"):
            recognise(seen)
    assert recognise(seen._replace(source=f"else/{name}")).family is None


def test_a_repository_is_told_by_its_id(tmp_path, monkeypatch):
    "Zhouwenwang's config.json says megatron-bert: without weights at hand the id alone tells."
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="megatron-bert", **BERT)), "utf8")
    monkeypatch.setattr("fengshen.models.auto.classes.fetch", lambda name, hub, weights=True: tmp_path)
    assert type(auto.AutoConfig.from_pretrained("IDEA-CCNL/Zhouwenwang-Unified-110M", hub="modelscope")) is config_class("roformer")
    assert type(auto.AutoConfig.from_pretrained("else/Erlangshen-MegatronBert-1.3B")) is transformers.MegatronBertConfig


def test_a_longformer_that_lost_its_positions_is_refused(tmp_path):
    "Finetuned from Erlangshen's weights by transformers' class: a whole folder, and no class is right for it."
    cls, config, sizes = STOCK["longformer"]
    cls(config(**sizes, use_sparse_attention=True)).save_pretrained(tmp_path)
    for load in (auto.AutoModelForMaskedLM.from_pretrained, auto.AutoTokenizer.from_pretrained, from_checkpoint):
        with pytest.raises(ValueError, match="no rotary positions.*finetune again"):
            load(tmp_path)


def test_weights_that_turn_positions_are_not_loaded_as_a_bert(tmp_path):
    disguise(ours("longformer"), "longformer", tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(weights | {"longformer.encoder.layer.0.attention.self.rope_emb.div_term": torch.ones(4)}, tmp_path / "pytorch_model.bin")
    assert type(auto.AutoModelForMaskedLM.from_pretrained(tmp_path)).__module__.startswith("fengshen.")
    rewrite(tmp_path, model_type="bert")
    with pytest.raises(ValueError, match="another architecture than LongformerConfig"):
        auto.AutoModelForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "older"])
def test_names_are_read_from_every_kind_of_file(file, tmp_path):
    model = ours("roformer")
    disguise(model, "roformer", tmp_path, file)
    if file == "older":  # the format of torch before 1.6
        (tmp_path / file).rename(tmp_path / "pytorch_model.bin")
    names = weight_names(tmp_path)
    assert "bert.encoder.layer.0.attention.ln.weight" in names and names <= set(model.state_dict())
    assert recognise(look(tmp_path)).family == "roformer"


def test_names_are_read_from_an_index(tmp_path):
    model = ours("megatron_t5")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    rewrite(tmp_path, model_type="t5")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert recognise(look(tmp_path)).family == "megatron_t5"


def test_a_file_that_is_no_table_of_tensors_is_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save(dict(a=Trap()), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        weight_names(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_slices_for_several_devices_are_refused(tmp_path):
    (tmp_path / "part_0").mkdir()
    with pytest.raises(ValueError, match="cut into slices.*fengshen export"):
        auto.AutoModelForCausalLM.from_pretrained(tmp_path)


HEADS = [(family, head) for family, entry in FAMILIES.items() for head in entry.heads]


@pytest.mark.parametrize("family, head", HEADS)
def test_every_head_is_there(family, head):
    config = config_class(family)(**SIZES[family])
    model = getattr(auto, head).from_config(config)
    assert type(model) is model_class(family, head)
    if hasattr(transformers, head):
        assert type(getattr(transformers, head).from_config(config)) is type(model)


def test_a_head_that_is_not_there_is_refused_by_name():
    with pytest.raises(ValueError, match="fengshen-bart has no AutoModelForSeq2SeqLM.*AutoModelForTextInfill"):
        auto.AutoModelForSeq2SeqLM.from_config(config_class("bart")(**BART))
    with pytest.raises(ValueError, match="gpt2 has no AutoModelForMaskedLM"):
        auto.AutoModelForMaskedLM.from_config(transformers.GPT2Config())


def test_an_edit_head_is_put_on_a_bart_and_on_nothing_else(tmp_path, capsys):
    cls, config, sizes = STOCK["bart"]
    cls(config(**sizes)).save_pretrained(tmp_path / "bart")
    model = auto.AutoModelForTextInfill.from_pretrained(tmp_path / "bart")
    assert model.label_weights.tolist() == [1, 1, 1] and "an edit head on a BART" in capsys.readouterr().out
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="no model for text infilling: got 'gpt2'"):
        auto.AutoModelForTextInfill.from_pretrained(tmp_path / "gpt2")


def test_what_is_loaded_to_write_goes_from_left_to_right(tmp_path, capsys):
    ours("roformer").save_pretrained(tmp_path)
    assert auto.AutoModelForMaskedLM.from_pretrained(tmp_path).config.default_token_type == 0
    assert "default_token_type" not in capsys.readouterr().out
    writer = auto.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert "default_token_type = 1: a model that is loaded to write" in capsys.readouterr().out
    a, b = torch.arange(3, 11)[None], torch.arange(3, 11)[None].index_fill(1, torch.tensor([7]), 20)
    assert torch.equal(writer(a).logits[:, :7], writer(b).logits[:, :7])
    assert auto.AutoModelForCausalLM.from_pretrained(tmp_path, default_token_type=0).config.default_token_type == 0


def test_a_saved_folder_is_opened_by_plain_transformers(tmp_path):
    "In a process of its own: `import fengshen` tells transformers nothing, `import fengshen.models` all; no warning of another model type."
    for family in FAMILIES:
        ours(family).save_pretrained(tmp_path / family)
    heads = dict(BODY, bart="AutoModelForPreTraining")
    code = f"""
import sys, fengshen, transformers
assert 'fengshen-roformer' not in transformers.CONFIG_MAPPING and 'fengshen.models' not in sys.modules
import fengshen.models
assert 'fengshen.models.roformer' not in sys.modules, 'a family was read before it was asked for'
transformers.utils.logging.set_verbosity_warning()
for family, head in {heads}.items():
    model = getattr(transformers, head).from_pretrained({str(tmp_path)!r} + '/' + family)
    print(type(model).__module__.rsplit('.', 1)[0], transformers.AutoConfig.from_pretrained({str(tmp_path)!r} + '/' + family).model_type)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for family, entry in FAMILIES.items() for word in (entry.package, entry.model_type)]
    assert "model of type" not in done.stderr and "not initialized" not in done.stderr, done.stderr


@pytest.fixture
def bert(tmp_path):
    "A folder of transformers' BERT for masked tokens."
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def edit_weights(folder, change):
    "Change the tensors of a folder."
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))


@pytest.mark.parametrize("change, wrong", [
    (lambda w: w.pop("bert.encoder.layer.0.output.dense.bias"), "missing.*layer.0.output.dense.bias"),
    (lambda w: w.update({"bert.encoder.layer.1.output.dense.bias": torch.zeros(16)}), "unexpected.*layer.1.output.dense.bias"),
    (lambda w: w.update({"bert.embeddings.word_embeddings.weight": torch.zeros(41, 16)}), r"shapes.*\[41, 16\] in the file, \[40, 16\] in the model"),
])
def test_a_stock_body_has_to_fit(bert, change, wrong):
    edit_weights(bert, change)
    with pytest.raises(ValueError, match=wrong):
        auto.AutoModelForMaskedLM.from_pretrained(bert)
    model, info = auto.AutoModelForMaskedLM.from_pretrained(bert, strict=False, output_loading_info=True, ignore_mismatched_sizes=True)
    assert any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_tied_weights_of_another_shape_are_refused(bert):
    "transformers fails to compare two copies of a tied weight that both were left out."
    edit_weights(bert, lambda w: w.update({"cls.predictions.decoder.weight": w["bert.embeddings.word_embeddings.weight"].clone()}))
    auto.AutoModelForMaskedLM.from_pretrained(bert)
    edit_weights(bert, lambda w: w.update({name: torch.zeros(41, 16) for name in w if w[name].shape == (40, 16)}))
    with pytest.raises(ValueError, match="another shape than its config.json says: got 'vocab_size 40'"):
        auto.AutoModelForMaskedLM.from_pretrained(bert)


def test_heads_and_old_buffers_come_and_go(bert):
    edit_weights(bert, lambda w: w.update({"bert.embeddings.position_ids": torch.arange(32)[None], "cls.seq_relationship.weight": torch.zeros(2, 16)}))
    for head in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification", "AutoModelForPreTraining"):
        getattr(auto, head).from_pretrained(bert)
    assert from_checkpoint(bert, auto=auto.AutoModelForMaskedLM).config.vocab_size == 40


def test_a_wrapped_state_is_refused(bert):
    edit_weights(bert, lambda w: [w.update({f"wrapped.{n}": w.pop(n)}) for n in list(w)])
    with pytest.raises(ValueError, match="missing"):
        auto.AutoModelForMaskedLM.from_pretrained(bert)


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_fields_and_settings_reach_the_model(bert, kind, tmp_path):
    if kind == "ours":
        ours("longformer").save_pretrained(tmp_path / "ours")
    folder = bert if kind == "stock" else tmp_path / "ours"
    model = auto.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5, dtype=torch.bfloat16, attn_implementation="eager")
    assert (model.config.num_labels, model.dtype, model.config._attn_implementation) == (5, torch.bfloat16, "eager")
    assert auto.AutoModel.from_pretrained(folder, add_pooling_layer=False).pooler is None


def test_code_from_a_folder_is_never_run(bert):
    (bert / "trap.py").write_text("raise SystemExit('run')")
    rewrite(bert, model_type="unheard-of", auto_map=dict(AutoConfig="trap.Config", AutoModelForMaskedLM="trap.Model"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        auto.AutoModelForMaskedLM.from_pretrained(bert)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_loads_every_kind(family, tmp_path):
    head = getattr(auto, BODY[family])
    ours(family).save_pretrained(tmp_path)
    model = from_checkpoint(tmp_path, auto=head)
    assert torch.equal(scores(model), scores(ours(family))) and model.dtype == torch.float32
    drawn = [from_config(tmp_path / "config.json", seed=7, auto=head) for _ in range(2)]
    assert type(drawn[0]) is type(model) and torch.equal(scores(drawn[0]), scores(drawn[1]))


def test_what_is_left_over_is_seen_under_zero3(bert):
    "transformers reports nothing there; the names in the file are compared with the model's, as far as names go."
    model = auto.AutoModelForSequenceClassification.from_pretrained(bert)
    names = weight_names(bert) | {"bert.encoder.layer.1.output.dense.bias", "bert.embeddings.position_ids", "bert.encoder.layer.0.output.LayerNorm.gamma"}
    assert left_over(model, names) == set()
    held = zero3_context(dict(train_micro_batch_size_per_gpu=1, zero_optimization=dict(stage=3)))
    found = left_over(model, names)
    del held
    assert {n for n in found if not n.startswith("cls.")} == {"bert.encoder.layer.1.output.dense.bias"}


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"清华大学位于北京"]


@pytest.mark.parametrize("values, named, cls, size", [
    (dict(model_type="longformer", use_sparse_attention=True), "LongformerTokenizer", "BertTokenizer", 13),
    (dict(model_type="roformer", position_embedding_type="absolute"), "RoFormerTokenizer", "BertTokenizer", 13),
    (dict(model_type="fengshen-roformer"), None, "BertTokenizer", 13),
    (dict(model_type="T5"), None, "BertTokenizer", 133),
    (dict(model_type="bert"), None, "BertTokenizer", 13),
    (dict(model_type="t5", relative_attention_max_distance=128), "BertTokenizer", "BertTokenizer", 13),
])
def test_tokenizers(values, named, cls, size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values), "utf8")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), "utf8")
    if named:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class=named)), "utf8")
    found = auto.AutoTokenizer.from_pretrained(tmp_path)
    assert (type(found).__name__.removesuffix("Fast"), len(found)) == (cls, size)
    assert found.convert_ids_to_tokens(found("清华大学").input_ids) == ["[CLS]", *"清华大学", "[SEP]"]
    found.save_pretrained(tmp_path / "again")
    (tmp_path / "again/config.json").write_text(json.dumps(values), "utf8")
    assert len(auto.AutoTokenizer.from_pretrained(tmp_path / "again")) == size


def test_randeng_barts_pieces_are_read_as_they_are(tmp_path):
    "Its folder names T5Tokenizer, which would take byte pairs for unigrams; `<mask>` comes behind `<pad>`, and both behind the pieces."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.train_from_iterator(["清华大学位于北京 清华大学", "北京大学位于北京"] * 3, trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=30))
    rows = pieces.get_vocab_size()
    pieces.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spiece.model").write_bytes(b"not read")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="bart", pad_token_id=1)), "utf8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="T5Tokenizer", extra_ids=0)), "utf8")
    found = auto.AutoTokenizer.from_pretrained(tmp_path)
    assert (found.pad_token_id, found.mask_token_id, found.eos_token_id) == (rows, rows + 1, 2)
    text = "<s>清华大学<mask>北京"
    assert found.convert_ids_to_tokens(found("清华大学", add_special_tokens=False).input_ids) == pieces.encode("清华大学").tokens
    assert found(text).input_ids.count(rows + 1) == 1 and found(text).input_ids[0] == 1
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json, which is not there.*transformers 4"):
        auto.AutoTokenizer.from_pretrained(tmp_path)


CHECKPOINTS = {  # of the folder with published configurations: family, or class of transformers
    "Erlangshen-DeBERTa-v2-97M-Chinese.derived": "DebertaV2Config", "Erlangshen-Longformer-110M.derived": "LongformerConfig", "Randeng-T5-77M": "MT5Config",
    "Randeng-T5-784M.derived": "MT5Config", "Randeng-T5-Char-57M-MultiTask-Chinese": "T5Config", "Wenzhong-GPT2-3.5B.inferred": "GPT2Config",
    "Ziya-LLaMA-13B-v1": "LlamaConfig", "workspace_bert-base": "BertConfig", "workspace_erlangshen-bert-base": "MegatronBertConfig",
    "workspace_erlangshen-deberta-base": "DebertaV2Config", "workspace_randeng-bart-base": "BartConfig",
}


def test_published_configurations(shared):
    folder = shared / "data/checkpoint_configs"
    for name, cls in CHECKPOINTS.items():
        found = type(auto.AutoConfig.from_pretrained(folder / f"{name}.config.json"))
        assert found.__name__ == cls, name
        assert found.__module__.startswith("fengshen." if "Longformer" in name else "transformers."), name
    with pytest.raises(ValueError, match="transfo_xl_denoise"):
        auto.AutoConfig.from_pretrained(folder / "Randeng-Transformer-1.1B-Denoise.codedefaults.config.json")
    assert len(list(folder.iterdir())) == len(CHECKPOINTS) + 1


ORIGINAL = dict(roformer="roformer", longformer="longformer", megatron_t5="megatron_t5", bart="bart", albert=None, deberta_v2=None, zen1="zen1", zen2="zen2",
                llama="llama_parallel", deltalm="deltalm", transfo_xl_denoise="transfo_xl_denoise", ubert="ubert", uniex="uniex", tcbert="tcbert", unimc="unimc",
                clip_taiyi="taiyi_clip", tagging_models="tagging")


def test_folders_of_the_original(shared):
    "Every recorded case of the original, by the names of its weights and by its config.json: its family, or refused as what it is."
    for folder in sorted(path.parent for path in (shared / "parity").glob("*/*/weights.safetensors")):
        expected = ORIGINAL[folder.parent.name]
        with safe_open(folder / "weights.safetensors", "numpy") as file:
            seen = Seen(json.loads((folder / "config.json").read_text("utf8")), frozenset(file.keys()))
        if folder.name == "bert_linear_ce":  # a BERT and a classifier under BERT's names: transformers has that class
            expected = None
        if expected in FAMILIES or expected is None:
            assert recognise(seen, str(folder)).family == expected, folder
        else:
            with pytest.raises(ValueError, match=f"does not have yet.*'{expected}'"):
                recognise(seen, folder.name)
