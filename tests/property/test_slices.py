"""Models cut as Megatron cuts them are the same models when they are put together again; slices that do not belong together are refused."""
import json
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
)

from fengshen.models.megatron_t5 import T5Config, T5ForConditionalGeneration
from fengshen.models.roformer import RoFormerConfig, RoFormerForPreTraining
from fengshen.training import verify
from fengshen.training.export import build, export, open_source
from fengshen.training.weights import open_weights

HEADS, WIDTH, LAYERS, ROWS = 4, 16, 2, 50
BERT = dict(vocab_size=ROWS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=24, max_position_embeddings=32)


def made(kind):
    "A small model of a family, all of its numbers random."
    torch.manual_seed(3)
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_positions=32, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=24, bos_token_id=None, eos_token_id=None)),
        "bert": lambda: MegatronBertForPreTraining(MegatronBertConfig(**BERT, hidden_act="gelu_new")),
        "mlm": lambda: MegatronBertForMaskedLM(MegatronBertConfig(**BERT, hidden_act="gelu_new")),
        "roformer": lambda: RoFormerForPreTraining(RoFormerConfig(**BERT, hidden_act="gelu_new")),
        "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=ROWS, max_position_embeddings=32, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=LAYERS, num_decoder_layers=4, num_heads=HEADS, decoder_start_token_id=1)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=32)),
    }[kind]()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return model.eval()


# ---- Megatron's weights, written here module by module: {name: tensor, or the matrices that are mixed} -----------------------------------------


def linear(found, name, module, turned=False):
    found[f"{name}.weight"] = module.weight.T if turned else module.weight
    if module.bias is not None:
        found[f"{name}.bias"] = module.bias


def mixed(found, name, *modules):
    found[f"{name}.weight"], found[f"{name}.bias"] = [m.weight for m in modules], [m.bias for m in modules]


def from_gpt2(model):
    body, found = model.transformer, {}
    found |= {"embedding.word_embeddings.weight": body.wte.weight, "embedding.position_embeddings.weight": body.wpe.weight}
    for i, block in enumerate(body.h):
        at = f"encoder.layers.{i}."
        linear(found, at + "input_layernorm", block.ln_1)
        linear(found, at + "post_attention_layernorm", block.ln_2)
        found[at + "self_attention.query_key_value.weight"] = block.attn.c_attn.weight.T.chunk(3)
        found[at + "self_attention.query_key_value.bias"] = block.attn.c_attn.bias.chunk(3)
        linear(found, at + "self_attention.dense", block.attn.c_proj, True)
        linear(found, at + "mlp.dense_h_to_4h", block.mlp.c_fc, True)
        linear(found, at + "mlp.dense_4h_to_h", block.mlp.c_proj, True)
    linear(found, "encoder.final_layernorm", body.ln_f)
    return found


def from_bert(model):
    body, found = model.bert, {}
    for theirs in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        if hasattr(body.embeddings, theirs):
            found[f"embedding.{theirs.replace('token_type', 'tokentype')}.weight"] = getattr(body.embeddings, theirs).weight
    for i, block in enumerate(body.encoder.layer):
        at, attention = f"encoder.layers.{i}.", block.attention
        linear(found, at + "input_layernorm", attention.ln)
        mixed(found, at + "self_attention.query_key_value", attention.self.query, attention.self.key, attention.self.value)
        linear(found, at + "self_attention.dense", attention.output.dense)
        linear(found, at + "post_attention_layernorm", block.ln)
        linear(found, at + "mlp.dense_h_to_4h", block.intermediate.dense)
        linear(found, at + "mlp.dense_4h_to_h", block.output.dense)
    linear(found, "encoder.final_layernorm", body.encoder.ln)
    linear(found, "lm_head.dense", model.cls.predictions.transform.dense)
    linear(found, "lm_head.layernorm", model.cls.predictions.transform.LayerNorm)
    found["lm_head.bias"] = model.cls.predictions.bias
    if hasattr(model.cls, "seq_relationship"):
        linear(found, "pooler.dense", body.pooler.dense)
        linear(found, "binary_head", model.cls.seq_relationship)
    return found


def from_t5(model):
    found = {"embedding.word_embeddings.weight": model.shared.word_embeddings.weight, "embedding.position_embeddings.weight": model.shared.position_embeddings.weight, "lm_head.bias": model.lm_head_bias}
    for name, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        for i, block in enumerate(stack.block):
            at, first, feed = f"{name}.layers.{i}.", block.T5LayerSelfAttention, block.T5LayerFF
            linear(found, at + "input_layernorm", first.layer_norm)
            mixed(found, at + "self_attention.query_key_value", first.SelfAttention.q, first.SelfAttention.k, first.SelfAttention.v)
            linear(found, at + "self_attention.dense", first.SelfAttention.o)
            norms = [feed.layer_norm]
            if name == "decoder":
                cross = block.T5LayerCrossAttention
                norms.insert(0, cross.layer_norm)
                linear(found, at + "inter_attention.query", cross.EncDecAttention.q)
                mixed(found, at + "inter_attention.key_value", cross.EncDecAttention.k, cross.EncDecAttention.v)
                linear(found, at + "inter_attention.dense", cross.EncDecAttention.o)
            for norm, after in zip(norms, ("post_attention_layernorm", "post_inter_attention_layernorm")):
                linear(found, at + after, norm)
            linear(found, at + "mlp.dense_h_to_4h", feed.DenseReluDense.wi)
            linear(found, at + "mlp.dense_4h_to_h", feed.DenseReluDense.wo)
        linear(found, f"{name}.final_layernorm", stack.final_layer_norm)
    return found


def from_llama(model):
    found = {"llama.embed_in.word_embeddings.weight": model.model.embed_tokens.weight, "embed_out.final_linear.weight": model.lm_head.weight,
             "llama.final_layer_norm.scale": model.model.norm.weight}
    for i, block in enumerate(model.model.layers):
        at = f"llama.layers.{i}."
        found |= {at + "input_layernorm.scale": block.input_layernorm.weight, at + "post_attention_layernorm.scale": block.post_attention_layernorm.weight,
                  at + "attention.rotary_emb.inv_freq": torch.ones(2)}
        found[at + "attention.query_key_value.weight"] = [getattr(block.self_attn, f"{one}_proj").weight for one in "qkv"]
        for theirs, module in dict(dense=block.self_attn.o_proj).items():
            linear(found, f"{at}attention.{theirs}", module)
        for theirs, module in dict(w1=block.mlp.gate_proj, w3=block.mlp.up_proj, w2=block.mlp.down_proj).items():
            linear(found, f"{at}mlp.{theirs}", module)
    return found


FROM = dict(gpt2=from_gpt2, bert=from_bert, mlm=from_bert, roformer=from_bert, t5=from_t5, llama=from_llama)


# ---- cutting -----------------------------------------------------------------------------------------------------------------------------------


def mix(matrices, version, rank, ranks):
    "One rank's rows of several matrices, head by head, in the order of the version."
    heads = [m.reshape(HEADS, -1, *m.shape[1:])[rank * HEADS // ranks : (rank + 1) * HEADS // ranks] for m in matrices]
    n, k = heads[0].shape[:2]
    if version == 0:
        rows = [heads[m][h, row] for m in range(len(heads)) for h in range(n) for row in range(k)]
    elif version == 1:
        rows = [heads[m][h, row] for h in range(n) for row in range(k) for m in range(len(heads))]
    else:
        rows = [heads[m][h, row] for h in range(n) for m in range(len(heads)) for row in range(k)]
    return torch.stack(rows)


def cut(name, value, version, rank, ranks):
    "What a rank has of a weight."
    if isinstance(value, (list, tuple)):
        return mix(value, version, rank, ranks)
    if "word_embeddings" in name or name in ("lm_head.bias", "embed_out.final_linear.weight"):
        padding = value.new_full((-len(value) % (8 * ranks), *value.shape[1:]), 9.0)
        return torch.cat([value, padding]).chunk(ranks)[rank].clone()
    if any(part in name for part in ("h_to_4h.", "w1.", "w3.", "inter_attention.query.")) and "4h_to_h" not in name:
        return value.chunk(ranks)[rank].clone()
    if ".layers." in name and name.endswith(("dense.weight", "4h_to_h.weight", "w2.weight")):
        return value.chunk(ranks, 1)[rank].clone()
    return value.clone()


def stage_of(name, stages):
    "(stage, name in it): layers are shared out evenly, the head is last."
    if ".layers." not in name:
        return (0 if name.startswith("embedding.") else stages - 1), name
    stack, _, rest = name.partition(".layers.")
    number, _, rest = rest.partition(".")
    each = (4 if stack == "decoder" else LAYERS) // stages
    return int(number) // each, f"{stack}.layers.{int(number) % each}.{rest}"


def nested(flat, old):
    "Megatron's dictionaries; old ones call the encoder `transformer` and its attention `attention`."
    model = {"language_model": {}}
    for name, value in flat.items():
        first, _, rest = name.partition(".")
        if first == "word_embeddings_for_head":
            model[first] = {"weight": value}
        elif first in ("lm_head", "binary_head"):
            model.setdefault(first, {})[rest] = value
        elif first == "embedding":
            table, _, end = rest.partition(".")
            model["language_model"].setdefault(first, {}).setdefault(table, {})[end] = value
        else:
            if old:
                first, rest = first.replace("encoder", "transformer"), rest.replace(".self_attention.", ".attention.")
            model["language_model"].setdefault(first, {})[rest] = value
    return model


def write_slices(folder, weights, version=3, ranks=2, stages=1, args=None, old=False):
    "A checkpoint of Megatron-LM; returns {(stage, rank): file}."
    files = {}
    for stage in range(stages):
        for rank in range(ranks):
            mine = {place: cut(n, v, version, rank, ranks).detach() for n, v in weights.items() for at, place in [stage_of(n, stages)] if at == stage}
            if stage and stage == stages - 1:
                table = "embedding.word_embeddings.weight"
                mine["word_embeddings_for_head.weight"] = cut(table, weights[table], version, rank, ranks).detach()
            place = folder / f"iter_0000007/mp_rank_{rank:02d}{f'_{stage:03d}' if stages > 1 else ''}"
            place.mkdir(parents=True)
            content = dict(model=nested(mine, old), iteration=7, checkpoint_version=float(version), optimizer={"state": [torch.ones(3)]})
            if args is not None:
                sizes = dict(tensor_model_parallel_size=ranks, pipeline_model_parallel_size=stages, num_attention_heads=HEADS, params_dtype=torch.float16)
                content["args"] = Namespace(**sizes, **args)
            if version == 0:
                del content["checkpoint_version"]
            files[stage, rank] = place / "model_optim_rng.pt"
            torch.save(content, files[stage, rank])
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return files


ARGS = dict(vocab_size=ROWS, layernorm_epsilon=1e-5, max_position_embeddings=32)


def same(model, folder, config=None, **options):
    "Whether what is read back computes what the model computes."
    again = build(open_source(folder, config, **options), torch.float32)
    expected, found = torch.tensor(verify.logits(model)), torch.tensor(verify.logits(again))
    assert type(again).__name__ == type(model).__name__
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    return again


@pytest.mark.parametrize("kind, version, ranks, stages", [
    ("gpt2", 0, 2, 1), ("gpt2", 1, 2, 1), ("gpt2", 2, 4, 1), ("gpt2", 3, 2, 2), ("bert", 0, 2, 1), ("bert", 3, 2, 2), ("mlm", 1, 1, 1), ("roformer", 3, 2, 2), ("t5", 1, 2, 1), ("t5", 3, 2, 2)])
def test_slices_become_the_model_again(tmp_path, kind, version, ranks, stages):
    "Every family, every order of queries, keys and values, cut and in stages, with its config."
    model = made(kind)
    write_slices(tmp_path / "run", FROM[kind](model), version, ranks, stages, old=version == 0)
    model.config.save_pretrained(tmp_path / "config")
    if kind == "roformer":  # as it was published
        values = json.loads((tmp_path / "config/config.json").read_text())
        (tmp_path / "config/config.json").write_text(json.dumps(dict(values, model_type="megatron-bert", architectures=None)))
    same(model, tmp_path / "run", tmp_path / "config")


@pytest.mark.parametrize("kind", ["gpt2", "bert", "roformer"])
def test_the_arguments_of_a_training_are_a_config(tmp_path, kind):
    model = made(kind)
    getattr(model.config, "layer_norm_eps", None) and setattr(model.config, "layer_norm_eps", 1e-5)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    write_slices(tmp_path, FROM[kind](model), args=ARGS)
    same(model, tmp_path)


@pytest.mark.parametrize("place", ["run/iter_0000007", "run/iter_0000007/mp_rank_00", "run/iter_0000007/mp_rank_01/model_optim_rng.pt"])
def test_any_place_in_the_checkpoint_will_do(tmp_path, place):
    model = made("gpt2")
    write_slices(tmp_path / "run", from_gpt2(model), args=ARGS)
    same(model, tmp_path / place)


def parts(folder, model, ranks):
    "The original's llama: a Hugging Face folder for each slice."
    values = dict(model_type="llama", vocab_size=ROWS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=999, max_position_embeddings=32,
                  rms_norm_epsilon=model.config.rms_norm_eps, llama_mlp_multiple_of=8, mlp_type="llama", norm="rmsnorm", pos_emb="rotary", rotary_pct=1)
    for rank in range(ranks):
        place = folder / f"part_{rank}"
        place.mkdir(parents=True)
        state = {n: cut(n, v, 2, rank, ranks).detach() for n, v in from_llama(model).items()}
        names, files = list(state), ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
        for file, mine in zip(files, (names[:5], names[5:])):
            torch.save({n: state[n] for n in mine}, place / file)
        (place / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map={n: files[n not in names[:5]] for n in names})))
        (place / "config.json").write_text(json.dumps(values))
    return values


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_originals_llama_in_parts(tmp_path, ranks):
    model = made("llama")
    parts(tmp_path, model, ranks)
    again = same(model, tmp_path)
    assert again.config.intermediate_size == 24, "the width of the weights, not that of the config"


def test_the_originals_llama_in_a_deepspeed_folder(tmp_path):
    "What its training left: `module.model.` before the names, a slice in each file, padded and unequal norms where strict is false."
    model = made("llama")
    values = parts(tmp_path / "parts", model, 2)
    folder = tmp_path / "last.ckpt/checkpoint"
    folder.mkdir(parents=True)
    for rank in range(2):
        state = {f"module.model.{n}": cut(n, v, 2, rank, 2).detach() for n, v in from_llama(model).items()}
        torch.save(dict(module=state, mp_world_size=2, ds_version="0.9"), folder / f"mp_rank_{rank:02d}_model_states.pt")
    (tmp_path / "config.json").write_text(json.dumps(values))
    same(model, tmp_path / "last.ckpt", tmp_path / "config.json")
    state["module.model.llama.final_layer_norm.scale"] += 2e-3
    torch.save(dict(module=state, mp_world_size=2), folder / "mp_rank_01_model_states.pt")
    source = open_source(tmp_path / "last.ckpt", tmp_path / "config.json")
    with pytest.raises(ValueError, match="final_layer_norm.scale is not the same in all slices.*2.00e-03"):
        source.weights.read(["model.norm.weight"])
    with torch.no_grad():
        model.model.norm.weight += 1e-3
    same(model, tmp_path / "last.ckpt", tmp_path / "config.json", strict=False)


def test_the_published_llama_computes_what_the_original_computed(shared, tmp_path):
    case = shared / "parity/llama/causal_lm"
    (tmp_path / "config.json").write_bytes((case / "config.json").read_bytes())
    torch.save(load_file(case / "weights.safetensors"), tmp_path / "pytorch_model.bin")
    model = build(open_source(tmp_path), torch.float32)
    inputs = {n.partition("/")[2]: t for n, t in load_file(case / "inputs.safetensors").items() if n.startswith("right_pad/")}
    expected = load_file(case / "outputs.safetensors")["right_pad/logits"]
    with torch.no_grad():
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-4, rtol=1e-4)


def test_megatron_inside_a_deepspeed_file(tmp_path):
    "Megatron-DeepSpeed keeps Megatron's dictionaries under `module`, in one file too."
    model = made("gpt2")
    file = write_slices(tmp_path / "run", from_gpt2(model), ranks=1, args=ARGS)[0, 0]
    content = torch.load(file, weights_only=False)
    content["module"] = content.pop("model")
    (tmp_path / "zero").mkdir()
    torch.save(content | dict(mp_world_size=1), tmp_path / "zero/mp_rank_00_model_states.pt")
    same(model, tmp_path / "zero")
    with pytest.raises(ValueError, match="fengshen export"):
        open_weights(tmp_path / "zero")


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slices(tmp_path):
    "A GPT-2 in two slices and two stages, which a test may damage."
    return tmp_path, write_slices(tmp_path, from_gpt2(made("gpt2")), ranks=2, stages=2, args=ARGS)


def change(file, edit):
    content = torch.load(file, weights_only=False)
    edit(content)
    torch.save(content, file)


def refused(folder, words, **options):
    with pytest.raises(ValueError, match=words):
        source = open_source(folder, **options)
        list(source.weights.stream())


def test_a_missing_slice(slices):
    folder, files = slices
    files[1, 0].unlink()
    refused(folder, "slices are missing.*stage 1, rank 0")
    for stage in (0, 1):
        files[stage, 1].unlink(missing_ok=True)
        files[stage, 1].parent.rmdir()
    files[1, 0].write_bytes(files[0, 0].read_bytes())
    refused(folder, "tensor-parallel slices")


@pytest.mark.parametrize("edit, words", [
    (lambda c: c.update(checkpoint_version=1.0), "different versions"),
    (lambda c: c.update(iteration=8), "different steps"),
    (lambda c: c["model"]["language_model"]["encoder"].pop("layers.0.mlp.dense_h_to_4h.bias"), "do not hold the same weights.*dense_h_to_4h.bias"),
    (lambda c: c["model"]["language_model"]["encoder"].update({"layers.0.mlp.dense_h_to_4h.bias": torch.ones(13)}), "different shapes"),
    (lambda c: c["model"]["language_model"]["encoder"]["layers.0.input_layernorm.weight"].add_(1), "not the same in all slices"),
    (lambda c: c["model"]["word_embeddings_for_head"]["weight"].add_(1), "is not the embedding of the first stage"),
])
def test_slices_that_do_not_belong_together(slices, edit, words):
    folder, files = slices
    change(files[1, 1], edit)
    refused(folder, words)


@pytest.mark.parametrize("args, words", [
    (dict(swiglu=True), "no counterpart here.*swiglu"),
    (dict(num_attention_heads=3), "heads"),
    (dict(vocab_size=90), "fewer rows"),
])
def test_arguments_of_another_network(tmp_path, args, words):
    model = made("gpt2")
    files = write_slices(tmp_path, from_gpt2(model), args=ARGS)
    for file in files.values():
        change(file, lambda c: c.update(args=Namespace(**{**vars(c["args"]), **args})))
    refused(tmp_path, words)


def test_names_that_no_table_has(tmp_path, capsys):
    model = made("gpt2")
    write_slices(tmp_path, from_gpt2(model) | {"encoder.layers.0.adapter.weight": torch.ones(3), "encoder.layers.1.adapter.weight": torch.ones(3)}, args=ARGS)
    refused(tmp_path, r"no table names.*layers.N.adapter.weight \(2\)")
    same(model, tmp_path, strict=False)
    assert "left over: 2 weights, passed over because strict is false: encoder.layers.N.adapter.weight (2)" in capsys.readouterr().out


def test_without_arguments_a_config_is_asked_for(tmp_path):
    model = made("gpt2")
    write_slices(tmp_path / "run", from_gpt2(model))
    refused(tmp_path / "run", "attention heads.*--config")
    made("bert").config.save_pretrained(tmp_path / "bert")
    refused(tmp_path / "run", "another architecture", config=tmp_path / "bert")


def test_a_damaged_slice_and_one_that_would_run_a_program(slices):
    folder, files = slices
    files[0, 1].write_bytes(files[0, 1].read_bytes()[:2000])
    refused(folder, "damaged")
    torch.save(dict(model=print), files[0, 1])
    refused(folder, "could run a program")


def test_layers_that_are_missing_and_interleaved_stages(slices):
    folder, files = slices
    for rank in (0, 1):
        change(files[0, rank], lambda c: c.update(model0=c.pop("model")))
    refused(folder, "interleaved pipeline")


@pytest.mark.slow
def test_the_whole_way(tmp_path, capsys):
    "Slices, a vocabulary, and out comes a verified folder with the tokenizer's ids in its config."
    model = made("gpt2")
    write_slices(tmp_path / "run", from_gpt2(model), args=ARGS)
    (tmp_path / "words").mkdir()
    (tmp_path / "words/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"神针定海"]) + "\n")
    BertTokenizer(str(tmp_path / "words/vocab.txt")).save_pretrained(tmp_path / "words")
    folder = export(tmp_path / "run", out=tmp_path / "out", tokenizer=tmp_path / "words")
    assert torch.equal(GPT2LMHeadModel.from_pretrained(folder).transformer.wte.weight, model.transformer.wte.weight)
    assert "2 x 1 slices, version 3.0: read as gpt2" in capsys.readouterr().out
