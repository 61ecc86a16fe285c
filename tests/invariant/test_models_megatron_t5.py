"""What must hold for every MegatronT5 model whatever its weights: they are all random here, so that an equality is one."""
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

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
WITH_DECODER = HEADS[1:]


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


def test_padding_and_company_change_nothing(cls):
    "A row gives the same alone, padded on the right, and beside others; what the padding is does not matter."
    model, inputs = make(cls), batch(cls)
    alone = states(model, **{k: v[:1] for k, v in inputs.items()})
    mask = torch.ones_like(inputs["input_ids"])
    for filler in (0, 17):
        padded = torch.cat([inputs["input_ids"], torch.full((3, 4), filler)], dim=1)
        counts = torch.cat([mask, torch.zeros(3, 4, dtype=torch.long)], dim=1)
        together = states(model, **inputs | dict(input_ids=padded, attention_mask=counts))
        torch.testing.assert_close(together[:1, : alone.shape[1]], alone, **CLOSE)


@pytest.mark.parametrize("cls", WITH_DECODER, ids=lambda c: c.__name__)
def test_the_target_does_not_see_what_comes_after(cls):
    "A later token of the target changes nothing before it; a token of the source changes all."
    model, inputs = make(cls), batch(cls)
    before = states(model, **inputs)
    later = inputs["decoder_input_ids"].clone()
    later[:, 4] = (later[:, 4] + 1) % 50
    after = states(model, **inputs | dict(decoder_input_ids=later))
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)
    other = inputs["input_ids"].clone()
    other[:, -1] = (other[:, -1] + 1) % 50
    assert not torch.allclose(states(model, **inputs | dict(input_ids=other))[:, 0], before[:, 0], atol=1e-3)


def test_every_attention_is_the_same(cls):
    "sdpa is eager, with and without padding; weights asked for change nothing else, and say so."
    model, inputs = make(cls), batch(cls)
    inputs["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
    inputs["attention_mask"][1, 5:] = 0
    model.set_attn_implementation("sdpa")
    fast, with_weights = states(model, **inputs), model(**inputs, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(states(model, **inputs | dict(output_attentions=True)), fast, **CLOSE)
    weights = with_weights["attentions" if cls is T5EncoderModel else "encoder_attentions"]
    assert len(weights) == 2 and all((w[1, :, :, 5:] == 0).all() for w in weights)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(states(model, **inputs), fast, **CLOSE)


@pytest.mark.slow
def test_flex_is_the_same_on_a_cpu(cls):
    "FlexAttention's forward, compiled for the CPU."
    model, inputs = make(cls), batch(cls)
    inputs["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
    inputs["attention_mask"][1, 5:] = 0
    expected = states(model, **inputs)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        torch.testing.assert_close(states(model, **inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_is_unpacked(cls, attention):
    "Two texts in one row, told apart by their positions, give what each gives alone."
    model, first, second = make(cls), batch(cls, 1, 9, 7), batch(cls, 1, 5, 4, seed=2)
    model.set_attn_implementation(attention)
    both = {k: torch.cat([first[k], second[k]], dim=1) for k in first}
    places = {k: torch.cat([torch.arange(first[k].shape[1]), torch.arange(second[k].shape[1])])[None] for k in first}
    names = dict(input_ids="position_ids", decoder_input_ids="decoder_position_ids")
    packed = states(model, **both, **{names[k]: v for k, v in places.items()})
    torch.testing.assert_close(packed, torch.cat([states(model, **first), states(model, **second)], dim=1), **CLOSE)


def test_the_encoder_reads_boundaries():
    "Attention by document gives what positions give."
    model, first, second = make(T5EncoderModel), batch(T5EncoderModel, 1, 9), batch(T5EncoderModel, 1, 5, seed=2)
    expected = torch.cat([states(model, **first), states(model, **second)], dim=1)
    model.set_attn_implementation(register_attention())
    bounds = torch.tensor([0, 9, 14], dtype=torch.int32)
    got = states(model, input_ids=torch.cat([first["input_ids"], second["input_ids"]], 1), position_ids=torch.cat([torch.arange(9), torch.arange(5)])[None],
                 attention_mask=torch.empty(1, 1, 0, 0), cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=9, max_length_k=9)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cached_step_is_a_step_of_the_whole(attention):
    "One token at a time or several, the scores are those of the whole text; the encoder's keys are computed once."
    model, inputs = make(T5ForConditionalGeneration), batch(T5ForConditionalGeneration)
    model.set_attn_implementation(attention)
    whole, target = states(model, **inputs), inputs["decoder_input_ids"]
    cache, parts = None, []
    for ids in target.split([2, 1, 3, 1], dim=1):
        out = model(**inputs | dict(decoder_input_ids=ids), past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
    assert cache.get_seq_length() == 7 and len(cache.cross_attention_cache.layers) == 3


@pytest.mark.parametrize("how", [dict(), dict(num_beams=3), dict(cache_implementation="static")], ids=["greedy", "beams", "static"])
def test_generation_is_the_same_without_a_cache(how):
    "Texts of a padded batch are those of each alone, cache or not."
    model, inputs = make(T5ForConditionalGeneration), batch(T5ForConditionalGeneration)
    ids, counts = inputs["input_ids"].clone(), torch.ones(3, 9, dtype=torch.long)
    ids[1, 6:], counts[1, 6:] = 0, 0
    settings = dict(max_new_tokens=10, do_sample=False)
    cached = model.generate(ids, attention_mask=counts, **settings, **how)
    without = model.generate(ids, attention_mask=counts, use_cache=False, **settings, num_beams=how.get("num_beams", 1))
    assert torch.equal(cached, without) and (cached[:, 0] == 2).all()
    alone = model.generate(ids[1:2, :6], **settings, **how)
    assert torch.equal(alone[0], cached[1, : alone.shape[1]])


def test_saved_and_loaded(cls, tmp_path):
    "The folder carries our type, one copy of the tables, and gives the same numbers, from a file with the original's duplicates too."
    model, inputs = make(cls), batch(cls)
    expected = states(model, **inputs)
    model.save_pretrained(tmp_path)
    assert '"fengshen-megatron-t5"' in (tmp_path / "config.json").read_text()
    stored = load_file(tmp_path / "model.safetensors")
    assert not [n for n in stored if "embed_tokens" in n]
    assert torch.equal(states(cls.from_pretrained(tmp_path).eval(), **inputs), expected)
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


def test_a_new_model_can_be_trained(cls):
    "Built from nothing, every weight gets a gradient, checkpointing changes none of them, and the tables are one."
    torch.manual_seed(0)
    model, inputs = cls(tiny(dropout_rate=0.0)).train(), batch(cls)
    assert all(p.isfinite().all() for p in model.parameters())

    def gradients():
        model.zero_grad()
        states(model, **inputs).float().pow(2).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = gradients()
    assert all(g.abs().sum() > 0 for n, g in plain.items() if not n.endswith(".k.bias"))  # adding one number to all scores changes no softmax
    model.gradient_checkpointing_enable()
    again = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, **CLOSE)


def test_bfloat16_is_near(cls):
    "In bfloat16 the result is within 2e-2 of float32's, relative to its size."
    model, inputs = make(cls, d_model=32, d_kv=8), batch(cls)
    exact, rough = states(model, **inputs), states(model.bfloat16(), **inputs).float()
    assert (rough - exact).norm() / exact.norm() < 2e-2


def test_float16_does_not_overflow():
    "A sum beyond float16's range is held at its edge."
    model, inputs = make(T5EncoderModel), batch(T5EncoderModel)
    with torch.no_grad():
        model.encoder.block[0].T5LayerFF.DenseReluDense.wo.bias.fill_(6e4)
        model.encoder.block[1].T5LayerFF.DenseReluDense.wo.bias.fill_(6e4)
    assert states(model.half(), **inputs).isfinite().all()


def test_blocks_compile_whole():
    "torch.compile finds no break in a block, forward and backward."
    torch._dynamo.reset()
    block, text, source = make(T5Model).decoder.block[0], torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(text, source_bsd=source, attention="sdpa")
    torch.testing.assert_close(got, block(text, source_bsd=source, attention="sdpa"), **CLOSE)
    got.sum().backward()


@pytest.mark.slow
def test_it_compiles_whole():
    "The same for the whole model."
    torch._dynamo.reset()
    model, inputs = make(T5ForConditionalGeneration), batch(T5ForConditionalGeneration)
    inputs |= dict(attention_mask=torch.ones(3, 9, dtype=torch.long), use_cache=False)
    got = states(torch.compile(model, fullgraph=True, backend="aot_eager"), **inputs)
    torch.testing.assert_close(got, states(model, **inputs), **CLOSE)
    got.sum().backward()


ZERO3 = """
import sys, torch, deepspeed
from deepspeed.utils import safe_get_full_grad
from fengshen.models.loading import zero3_context
from fengshen.models.megatron_t5 import T5ForConditionalGeneration
ids, labels = torch.load(sys.argv[2])
plain = T5ForConditionalGeneration.from_pretrained(sys.argv[1])
plain(ids, labels=labels).loss.backward()
deepspeed.init_distributed("gloo")
settings = dict(train_micro_batch_size_per_gpu=3, zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0), zero_force_ds_cpu_optimizer=False,
                optimizer=dict(type="AdamW", params=dict(lr=1e-3, torch_adam=True)))
context = zero3_context(settings)
sharded = T5ForConditionalGeneration.from_pretrained(sys.argv[1])
assert sharded.shared.word_embeddings.weight.numel() == 0
engine, *_ = deepspeed.initialize(model=sharded, config=settings)
engine.backward(engine(ids, labels=labels).loss)
gradients = {n: p.grad for n, p in plain.named_parameters()}
for name, p in engine.module.named_parameters():
    torch.testing.assert_close(safe_get_full_grad(p), gradients[name], atol=1e-6, rtol=1e-4)
"""


@pytest.mark.slow
def test_sharded_while_loading(tmp_path):
    "Under ZeRO-3 the weights are sharded as they are loaded, and give the gradients of one device; the head finds the table it shares."
    make(T5ForConditionalGeneration, dropout_rate=0.0).save_pretrained(tmp_path / "model")
    inputs = batch(T5ForConditionalGeneration)
    torch.save((inputs["input_ids"], inputs["decoder_input_ids"]), tmp_path / "batch.pt")
    port = socket.create_server(("127.0.0.1", 0))
    place = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port.getsockname()[1]))
    port.close()
    environment = os.environ | place | dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run([sys.executable, "-c", ZERO3, tmp_path / "model", tmp_path / "batch.pt"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


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
    "Texts that are too long, with a cache too; ids without a row; packing on one side; a target without a start."
    model, inputs = make(T5ForConditionalGeneration), batch(T5ForConditionalGeneration)
    with pytest.raises(ValueError, match="25 tokens.*24"):
        model(torch.ones(1, 25, dtype=torch.long), decoder_input_ids=torch.ones(1, 1, dtype=torch.long))
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="27 tokens.*24"):
        model(**inputs | dict(decoder_input_ids=torch.ones(3, 20, dtype=torch.long)), past_key_values=cache)
    with pytest.raises(ValueError, match="token ids out of range.*50.*49"):
        model(torch.tensor([[50]]), decoder_input_ids=torch.tensor([[1]]))
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
