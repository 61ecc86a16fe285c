"""What is MegatronT5's own: one table of words, parts of a checkpoint, published folders, its tokenizer. What holds for every model is in test_models.py."""
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config as StockConfig
from transformers import T5ForConditionalGeneration as StockT5

from fengshen.models.lora import LoRAConfig, target_layers
from fengshen.models.megatron_t5 import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Model, T5Tokenizer
from fengshen.utils.kernels.attention import register_attention

CLOSE = dict(atol=1e-5, rtol=1e-4)
HEADS = [T5EncoderModel, T5Model, T5ForConditionalGeneration]
def tiny(**changes):
    "A small config: heads narrower than the model, another depth on each side."
    shape = dict(vocab_size=50, max_position_embeddings=24, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_decoder_layers=3, num_heads=4,
                 bos_token_id=2, eos_token_id=3, decoder_start_token_id=2)
    return T5Config(**shape | changes)


def make(cls, seed=0, **changes):
    "A model with every weight random."
    model, generator = cls(tiny(**changes)).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=generator)
    return model


def batch(cls, rows=3, source=9, target=7, seed=1):
    "Inputs of one model, without padding."
    generator = torch.Generator().manual_seed(seed)
    inputs = dict(input_ids=torch.randint(4, 50, (rows, source), generator=generator))
    if cls is not T5EncoderModel:
        inputs["decoder_input_ids"] = torch.randint(4, 50, (rows, target), generator=generator)
    return inputs


def states(model, **inputs):
    "What a model is for: its scores or its last states."
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.fixture(params=HEADS, ids=lambda c: c.__name__)
def cls(request):
    "Each model."
    return request.param


def test_weights_that_are_asked_for_change_nothing_else(cls):
    "They come from plain attention, and padding has none."
    model, inputs = make(cls), batch(cls)
    inputs["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
    inputs["attention_mask"][1, 5:] = 0
    fast, with_weights = states(model, **inputs), model(**inputs, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(states(model, **inputs | dict(output_attentions=True)), fast, **CLOSE)
    weights = with_weights["attentions" if cls is T5EncoderModel else "encoder_attentions"]
    assert len(weights) == 2 and all((w[1, :, :, 5:] == 0).all() for w in weights)


def test_the_encoder_reads_boundaries():
    "Attention by document gives what positions give."
    model, first, second = make(T5EncoderModel), batch(T5EncoderModel, 1, 9), batch(T5EncoderModel, 1, 5, seed=2)
    expected = torch.cat([states(model, **first), states(model, **second)], dim=1)
    model.set_attn_implementation(register_attention())
    bounds = torch.tensor([0, 9, 14], dtype=torch.int32)
    got = states(model, input_ids=torch.cat([first["input_ids"], second["input_ids"]], 1), position_ids=torch.cat([torch.arange(9), torch.arange(5)])[None],
                 attention_mask=torch.empty(1, 1, 0, 0), cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=9, max_length_k=9)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_generation_with_a_static_cache():
    model, inputs = make(T5ForConditionalGeneration), batch(T5ForConditionalGeneration)
    counts = torch.ones(3, 9, dtype=torch.long)
    counts[1, 6:] = 0
    settings = dict(attention_mask=counts, max_new_tokens=10, do_sample=False)
    cached = model.generate(inputs["input_ids"], cache_implementation="static", **settings)
    assert torch.equal(cached, model.generate(inputs["input_ids"], use_cache=False, **settings)) and (cached[:, 0] == 2).all()


def test_one_copy_of_the_tables(cls, tmp_path):
    "In a saved folder and in the model, from a file with the original's duplicates too."
    model, inputs = make(cls), batch(cls)
    expected = states(model, **inputs)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [n for n in stored if "embed_tokens" in n]
    parts = ["encoder"] if cls is T5EncoderModel else ["encoder", "decoder"]
    for name in [n for n in stored if n.startswith("shared.")]:
        stored |= {name.replace("shared", f"{part}.embed_tokens"): stored[name].clone() for part in parts}
    save_file(stored | {"shared.position_ids": torch.arange(24)[None]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = cls.from_pretrained(tmp_path)
    assert torch.equal(states(again.eval(), **inputs), expected)
    assert len({id(p) for n, p in again.named_parameters(remove_duplicate=False) if n.endswith("word_embeddings.weight")}) == 1


def test_parts_of_a_whole_checkpoint(tmp_path):
    "The encoder and the headless model read the checkpoint of the one that writes; that one refuses theirs."
    whole, inputs = make(T5ForConditionalGeneration), batch(T5ForConditionalGeneration)
    whole.save_pretrained(tmp_path / "whole")
    encoded = T5EncoderModel.from_pretrained(tmp_path / "whole").eval()(inputs["input_ids"]).last_hidden_state
    headless = T5Model.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(encoded, whole(**inputs).encoder_last_hidden_state) and torch.equal(headless(**inputs).encoder_last_hidden_state, encoded)
    headless.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="lm_head_bias"):
        T5ForConditionalGeneration.from_pretrained(tmp_path / "headless")
    filled = T5ForConditionalGeneration.from_pretrained(tmp_path / "headless", strict=False)
    assert (filled.lm_head_bias == 0).all()


def test_stock_t5_is_refused(tmp_path):
    "The weights of transformers' T5 are named as such, not filled up."
    StockT5(StockConfig(vocab_size=50, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not those of a T5ForConditionalGeneration"):
        T5ForConditionalGeneration.from_pretrained(tmp_path)


def test_a_published_folder_loads_in_silence(tmp_path, caplog):
    "model_type T5, pytorch_model.bin, no word from transformers about another type."
    model = make(T5ForConditionalGeneration)
    values = model.config.to_diff_dict() | dict(model_type="T5", tie_word_embeddings=False)
    T5Config(**values).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace("fengshen-megatron-t5", "T5")
    (tmp_path / "config.json").write_text(text)
    torch.save(model.state_dict() | {"shared.position_ids": torch.arange(24)[None]}, tmp_path / "pytorch_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert "model of type" not in caplog.text and "were not" not in caplog.text
    inputs = batch(T5ForConditionalGeneration)
    assert torch.equal(states(loaded, **inputs), states(model, **inputs))


def test_float16_does_not_overflow():
    "A sum beyond float16's range is held at its edge."
    model, inputs = make(T5EncoderModel), batch(T5EncoderModel)
    with torch.no_grad():
        model.encoder.block[0].T5LayerFF.DenseReluDense.wo.bias.fill_(6e4)
        model.encoder.block[1].T5LayerFF.DenseReluDense.wo.bias.fill_(6e4)
    assert states(model.half(), **inputs).isfinite().all()


@pytest.mark.slow
def test_it_compiles_whole():
    "The same for the whole model."
    torch._dynamo.reset()
    model, inputs = make(T5ForConditionalGeneration), batch(T5ForConditionalGeneration)
    inputs |= dict(attention_mask=torch.ones(3, 9, dtype=torch.long), use_cache=False)
    got = states(torch.compile(model, fullgraph=True, backend="aot_eager"), **inputs)
    torch.testing.assert_close(got, states(model, **inputs), **CLOSE)
    got.sum().backward()


def test_lora_finds_every_layer():
    "Adapters go on all projections and the feed-forward of both sides."
    layers = target_layers(make(T5ForConditionalGeneration), LoRAConfig())
    assert {n.rsplit(".", 1)[-1] for n in layers} == {"q", "k", "v", "o", "wi", "wo"} and len(layers) == 2 * 6 + 3 * 10


def test_more_words():
    "New rows of the table come with scores, under every name of the table."
    model, inputs = make(T5ForConditionalGeneration), batch(T5ForConditionalGeneration)
    before = states(model, **inputs)
    model.resize_token_embeddings(60)
    after = states(model, **inputs | dict(decoder_input_ids=inputs["decoder_input_ids"]))
    assert after.shape[-1] == 60 and torch.equal(after[..., :50], before)
    assert model.decoder.embed_tokens.word_embeddings.weight is model.shared.word_embeddings.weight
    assert model(torch.tensor([[59]]), labels=torch.tensor([[59]])).loss.isfinite()


def test_what_is_wrong_is_said():
    "A text that is too long with its cache; packing on one side; a target without a start."
    model, inputs = make(T5ForConditionalGeneration), batch(T5ForConditionalGeneration)
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="27 tokens.*24"):
        model(**inputs | dict(decoder_input_ids=torch.ones(3, 20, dtype=torch.long)), past_key_values=cache)
    with pytest.raises(ValueError, match="decoder_position_ids"):
        model(**inputs, position_ids=torch.arange(9)[None])
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="what a target begins with"):
        model(inputs["input_ids"], labels=inputs["decoder_input_ids"])


def test_the_published_vocabulary(shared):
    "On a vocabulary of 21,128 entries the added tokens stand where the model was trained with them."
    found = [p.parent for p in sorted((shared / "data" / "tokenizers").rglob("vocab.txt")) if p.read_bytes().count(b"\n") == 21128]
    if not found:
        pytest.skip("no vocabulary of 21,128 entries in the shared folder")
    tokenizer = T5Tokenizer.from_pretrained(found[0])
    assert len(tokenizer) == 21248
    assert tokenizer.convert_tokens_to_ids(["[BOS]", "[EOS]", "<extra_id_0>", "<extra_id_117>"]) == [21128, 21129, 21130, 21247]
    assert tokenizer("北京是中国的<extra_id_0>").input_ids[-2:] == [21130, tokenizer.sep_token_id]
