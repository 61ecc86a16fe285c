"""Weights of any checkpoint: every layout gives back what was put in, every damage is a refusal in words, and nothing in a file is run."""
import argparse
import json
import math
import os
import subprocess
import sys
import types
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fengshen.training.export import build, open_source
from fengshen.training.names import match_names
from fengshen.training.weights import Weights, load_file, open_weights, open_zero, read_weights
from tests.training_runs import TINY, environment

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def gpt2(**changes):
    "A GPT-2 whose weights are all different."
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{k: v for k, v in (TINY | changes).items() if k != "model_type"})).eval()


def llama(tied):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=tied,
                                        bos_token_id=0, eos_token_id=0)).eval()


def equal(model, other):
    "Whether two models have the same weights, names and ties."
    a, b = model.state_dict(), other.state_dict()
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


# ---- DeepSpeed's layouts, written here as DeepSpeed writes them -------------------------------------------------------------------------------


def flat_groups(state, groups, ranks):
    "ZeRO-1 and -2: one vector a group, padded to a multiple of 2 x ranks, cut into equal pieces."
    pieces = [[] for _ in range(ranks)]
    for names in groups:
        flat = torch.cat([state[n].float().flatten() for n in names])
        padded = torch.cat([flat, torch.full((-len(flat) % (2 * ranks),), 777.0)])
        for rank, piece in enumerate(padded.chunk(ranks)):
            pieces[rank].append(piece.clone())
    return pieces


def flat_parameters(state, groups, ranks, sub_groups=1):
    "ZeRO-3: every parameter cut by itself, padded; a rank's pieces follow each other, in sub-groups that do not respect parameters."
    pieces = [[] for _ in range(ranks)]
    for name in (n for names in groups for n in names):
        flat = state[name].float().flatten()
        piece = math.ceil(len(flat) / ranks)
        padded = torch.cat([flat, torch.full((piece * ranks - len(flat),), 777.0)])
        for rank in range(ranks):
            pieces[rank].append(padded[rank * piece : (rank + 1) * piece].clone())
    vectors = [torch.cat(p) for p in pieces]
    return [[c.clone() for c in v.chunk(sub_groups)] for v in vectors]


def write_zero(folder, state, stage, ranks, groups=None, frozen=(), shared=None, sub_groups=1, buffers=()):
    "A DeepSpeed checkpoint folder; returns it."
    folder.mkdir(parents=True, exist_ok=True)
    groups = groups or [[n for n in state if n not in frozen and n not in buffers]]
    shapes = [OrderedDict((n, state[n].shape) for n in names) for names in groups]
    pieces = flat_parameters(state, groups, ranks, sub_groups) if stage == 3 else flat_groups(state, groups, ranks)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    module = {n: v if stage != 3 or n in buffers else torch.empty(0, dtype=torch.bfloat16) for n, v in state.items()}
    if stage != 3:
        module = {n: v.bfloat16() if v.is_floating_point() and n not in frozen else v for n, v in module.items()}
    common = dict(param_shapes=shapes, buffer_names=list(buffers), shared_params=shared or {}, ds_version="0.19.8", dp_world_size=ranks, mp_world_size=1,
                  frozen_param_shapes={n: state[n].shape for n in frozen} or None)
    for rank in range(ranks):
        optimizer = {key: pieces[rank], "partition_count": ranks if stage == 3 else [ranks] * len(groups), "zero_stage": stage}
        torch.save({"optimizer_state_dict": optimizer, "ds_config": {}}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            fragments = {}
            for n in frozen:
                piece = math.ceil(state[n].numel() / ranks)
                flat = torch.cat([state[n].flatten(), torch.zeros(piece * ranks - state[n].numel(), dtype=state[n].dtype)])
                fragments[n] = flat[rank * piece : (rank + 1) * piece].clone()
            torch.save(common | dict(module=module, frozen_param_fragments=fragments), folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage != 3:
        torch.save(common | dict(module=module, frozen_param_fragments={n: state[n] for n in frozen}), folder / "mp_rank_00_model_states.pt")
    return folder


shapes = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3), min_size=1, max_size=6)


@QUICK
@given(shapes, st.integers(1, 5), st.sampled_from([1, 2, 3]), st.integers(1, 3), st.data())
def test_any_cut_is_put_together_again(tmp_path_factory, shapes, ranks, stage, parts, data):
    "Any shapes, any number of ranks and groups, some weights frozen: what was cut is what is read, to the bit."
    state = {f"model.w{i}": torch.randn(*shape) if shape else torch.randn(()) for i, shape in enumerate(shapes)}
    frozen = data.draw(st.sets(st.sampled_from(sorted(state)), max_size=len(state) - 1))
    trained = [n for n in state if n not in frozen]
    groups = [g for g in (trained[i::2] for i in range(2)) if g]
    folder = write_zero(tmp_path_factory.mktemp("zero"), state, stage, ranks, groups, frozen, shared={"model.head": trained[0]}, sub_groups=parts)
    weights = open_zero(folder)
    found = weights.read(weights.shapes)
    assert set(found) == {*state, "model.head"}
    assert all(torch.equal(found[n], v) and weights.shapes[n] == tuple(v.shape) for n, v in state.items())
    assert torch.equal(found["model.head"], state[trained[0]])
    weights.let_go = 0  # opened again for every tensor
    assert all(torch.equal(v, found[n]) for n, v in weights.stream())


@pytest.mark.parametrize("stage", [2, 3])
def test_pieces_of_another_run_are_refused(tmp_path, stage):
    state = {"model.a": torch.randn(40), "model.b": torch.randn(3, 3)}
    folder = write_zero(tmp_path / "one", state, stage, 2)
    other = write_zero(tmp_path / "two", {"model.a": torch.randn(400), "model.b": torch.randn(3, 3)}, stage, 2)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ValueError, match="not those of the model's shapes"):
        open_zero(folder)


def test_a_missing_rank(tmp_path, capsys):
    "ZeRO-3 cannot be read without all ranks; ZeRO-2 has the weights of the forward pass, and says that it took them."
    state = {"model.a": torch.randn(7, 3)}
    for stage in (2, 3):
        folder = write_zero(tmp_path / str(stage), state, stage, 3)
        (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match="misses shards.*got '2 files'"):
        open_weights(tmp_path / "3")
    found = read_weights(tmp_path / "2")["a"]
    assert found.dtype == torch.bfloat16 and torch.equal(found, state["model.a"].bfloat16())
    assert "16-bit weights" in capsys.readouterr().out
    for rank in (0, 2):
        (tmp_path / "3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match="holds no weights itself"):
        open_weights(tmp_path / "3")


def test_models_cut_over_processes_are_refused(tmp_path):
    folder = write_zero(tmp_path / "tp", {"model.a": torch.randn(4)}, 1, 1)
    (folder / "mp_rank_01_model_states.pt").write_bytes((folder / "mp_rank_00_model_states.pt").read_bytes())
    with pytest.raises(ValueError, match="tensor parallelism"):
        open_weights(folder)
    pipeline = write_zero(tmp_path / "pp", {"model.a": torch.randn(4)}, 1, 1)
    (pipeline / "layer_00-model_states.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="pipeline parallelism"):
        open_weights(pipeline)


@pytest.mark.parametrize("layout", ["raw", "lightning", "no latest", "old names"])
def test_folders_around_deepspeed_files(tmp_path, layout, capsys):
    state, top = {"module.model.a": torch.randn(5)}, tmp_path / "ckpt"
    if layout == "lightning":
        write_zero(top / "checkpoint", state, 2, 2)
    else:
        write_zero(top / "global_step9", {"module.model.a": torch.zeros(5)}, 2, 2)
        folder = write_zero(top / "global_step10", state, 2, 2)
    if layout == "raw":
        (top / "latest").write_text("global_step10\n")
    if layout == "old names":  # before 0.4 there was no underscore; with bf16 there is a word before
        (top / "latest").write_text("global_step10")
        for path in folder.glob("*_optim_states.pt"):
            path.rename(path.with_name("bf16_" + path.name.replace("_00_optim", "_00optim")))
    assert torch.equal(open_weights(top).read(state)["module.model.a"], state["module.model.a"])
    assert ("step = " in capsys.readouterr().out) == (layout == "no latest")


# ---- files of old trainings -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def old_class(monkeypatch):
    "A class in a module that only the writer of a file has; gone after the test's writing."
    def make(module, name, base=object):
        found = type(name, (base,), {"__module__": module})
        parts = module.split(".")
        for whole in (".".join(parts[: i + 1]) for i in range(len(parts))):
            if whole not in sys.modules:
                monkeypatch.setitem(sys.modules, whole, types.ModuleType(whole))
        monkeypatch.setattr(sys.modules[module], name, found, raising=False)
        return found

    return make


def test_a_checkpoint_of_the_original(tmp_path, old_class, monkeypatch):
    "Lightning 1.x: the run's arguments in a Namespace inside a dict of Lightning's own, a callback keyed by its class, a loss scaler."
    model = gpt2()
    model.config.save_pretrained(tmp_path)
    arguments = argparse.Namespace(learning_rate=1e-5, precision=16, strategy="deepspeed_stage_2", default_root_dir=tmp_path, gpus=None)
    hparams = old_class("pytorch_lightning.utilities.parsing", "AttributeDict", dict)(args=arguments, lr=1e-5)
    callback = old_class("fengshen.utils.universal_checkpoint", "UniversalCheckpoint")
    scaler = old_class("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler")()
    scaler.cur_scale = 65536
    content = {"epoch": 1, "global_step": 7, "global_samples": 224, "pytorch-lightning_version": "1.6.4", "callbacks": {callback: {"best_model_score": torch.tensor(1.5)}},
               "hparams_name": "args", "hyper_parameters": hparams, "optimizer_states": [], "lr_schedulers": [], "loss_scaler": scaler}
    path = tmp_path / "model-epepoch=08-ststep=500.ckpt"
    torch.save(content | {"state_dict": OrderedDict((f"model.{n}", v) for n, v in model.state_dict().items())}, path)
    monkeypatch.undo()
    assert equal(model, build(path, torch.float32))
    assert load_file(path)["hyper_parameters"]["lr"] == 1e-5
    states = {"module": {f"module.model.{n}": v.half() for n, v in model.state_dict().items()}, "mp_world_size": 1, "loss_scaler": None}
    torch.save(states, tmp_path / "mp_rank_00_model_states.pt")
    assert equal(model.half(), build(tmp_path / "mp_rank_00_model_states.pt", torch.float16))


@pytest.mark.parametrize("module, name", [("argparse", "ArgumentParser"), ("somebody.models", "Config")])
def test_a_class_that_is_not_listed_is_named(tmp_path, old_class, monkeypatch, module, name):
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": old_class(module, name)()}, tmp_path / "a.ckpt")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"got '{module}.{name}'.*save its state_dict alone"):
        open_weights(tmp_path / "a.ckpt")


PREFIXES = ["model.", "module.model.", "_forward_module.model.", "net.gpt.", ""]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("body", [False, True])
@pytest.mark.parametrize("head", ["tied, present", "tied, absent", "untied"])
def test_any_prefix_with_and_without_a_head(tmp_path, prefix, body, head, capsys):
    "The prefix is found and said; the names of the bare body too; a tied head may be there or not."
    model = gpt2(tie_word_embeddings=head != "untied")
    model.config.save_pretrained(tmp_path)
    state = {n.removeprefix("transformer.") if body else n: v for n, v in model.state_dict().items()}
    if head == "tied, absent":
        del state["lm_head.weight"]
    torch.save({"state_dict": {prefix + n: v for n, v in state.items()}, "hyper_parameters": argparse.Namespace(lr=1)}, tmp_path / "last.ckpt")
    found = build(tmp_path / "last.ckpt", torch.float32)
    assert equal(model, found)
    assert (found.lm_head.weight.data_ptr() == found.transformer.wte.weight.data_ptr()) == (head != "untied")
    assert (f"prefix = {prefix}:" in capsys.readouterr().out) == bool(prefix)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("tied", [True, False])
def test_llama_whose_own_names_begin_like_a_prefix(tmp_path, prefix, tied):
    model = llama(tied)
    model.config.save_pretrained(tmp_path)
    state = {prefix + n: v for n, v in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    torch.save(state | {f"{prefix}model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "pytorch_model.bin")
    assert equal(model, build(tmp_path, torch.float32))


def test_masks_of_old_versions_are_left_out_and_counted(tmp_path, capsys):
    "As published Wenzhong files have them: names of the body, float16, a mask and a number in every layer."
    model = gpt2().half()
    model.config.save_pretrained(tmp_path)
    state = {n.removeprefix("transformer."): v for n, v in model.state_dict().items() if n != "lm_head.weight"}
    for layer in range(2):
        state |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).half(), f"h.{layer}.attn.masked_bias": torch.tensor(-1e4).half()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert equal(model, build(tmp_path, torch.float16))
    assert "left out: 4 buffers" in capsys.readouterr().out
    torch.save(state | {"h.0.attn.bias": torch.ones(64).half()}, tmp_path / "pytorch_model.bin")  # a bias that was learned is a weight
    with pytest.raises(ValueError, match="left_over.*h.0.attn.bias"):
        build(tmp_path, torch.float16)


@pytest.mark.parametrize("extra", ["model.transformer.extra.weight", "score.weight", "model.score.weight"])
def test_a_weight_too_many_is_refused(tmp_path, extra):
    model = gpt2()
    model.config.save_pretrained(tmp_path)
    state = {f"model.{n}": v for n, v in model.state_dict().items()}
    torch.save({"state_dict": state | {extra: torch.ones(3)}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="left_over"):
        open_source(tmp_path / "last.ckpt")
    del state["model.transformer.h.1.mlp.c_fc.bias"]
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="missing.*c_fc.bias"):
        open_source(tmp_path / "last.ckpt")


@pytest.mark.parametrize("change", [dict(n_layer=3), dict(n_layer=1), dict(n_embd=32), dict(vocab_size=1281), dict(n_positions=64)])
def test_a_config_of_another_model_is_refused(tmp_path, change):
    gpt2().save_pretrained(tmp_path / "model")
    GPT2Config(**{k: v for k, v in (TINY | change).items() if k != "model_type"}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not those of its config"):
        open_source(tmp_path / "model", config=tmp_path / "other")


def test_two_heads_of_one_tied_model_are_refused(tmp_path):
    model = gpt2()
    state = {n: v.clone() for n, v in model.state_dict().items()}
    state["lm_head.weight"][5] += 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the config ties them"):
        open_source(tmp_path)


def test_a_name_twice_is_refused(tmp_path):
    model = gpt2()
    state = model.state_dict()
    torch.save(state | {"wte.weight": state["transformer.wte.weight"]}, tmp_path / "twice.bin")
    with pytest.raises(ValueError, match="left_over|twice"):
        match_names(open_weights(tmp_path / "twice.bin"), {n: tuple(v.shape) for n, v in state.items()}, {"lm_head.weight": "transformer.wte.weight"}, "transformer.")


# ---- Hugging Face folders ---------------------------------------------------------------------------------------------------------------------


def write_bins(folder, model, count, legacy):
    "pytorch_model.bin, in one file or several, as old versions of torch wrote it or as today's."
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = {n: v for n, v in model.state_dict().items() if n != "lm_head.weight"}
    names = list(state)
    files = {f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin" if count > 1 else "pytorch_model.bin": names[i::count] for i in range(count)}
    for file, mine in files.items():
        torch.save({n: state[n] for n in mine}, folder / file, _use_new_zipfile_serialization=not legacy)
    if count > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(dict(metadata={}, weight_map={n: f for f, mine in files.items() for n in mine})))
    return folder


@pytest.mark.parametrize("count, legacy", [(1, False), (1, True), (3, False), (3, True)])
def test_bin_files_of_any_age(tmp_path, count, legacy):
    model = gpt2()
    assert equal(model, build(write_bins(tmp_path / "hf", model, count, legacy), torch.float32))


@pytest.mark.parametrize("size", ["10GB", "200KB"])
def test_safetensors_in_one_file_and_many(tmp_path, size):
    model = gpt2()
    model.save_pretrained(tmp_path / "hf", max_shard_size=size)
    assert (size == "200KB") == (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1)
    assert equal(model, build(tmp_path / "hf", torch.float32))


def test_a_missing_file_and_an_index_that_lies(tmp_path):
    folder = write_bins(tmp_path / "hf", gpt2(), 3, False)
    index = folder / "pytorch_model.bin.index.json"
    written = json.loads(index.read_text())
    index.write_text(json.dumps(dict(weight_map=written["weight_map"] | {"transformer.h.9.x": "pytorch_model-00001-of-00003.bin"})))
    with pytest.raises(ValueError, match="not in the files that the index names"):
        open_weights(folder)
    index.write_text(json.dumps(dict(weight_map={"a": "../../etc/passwd"})))
    with pytest.raises(ValueError, match="misses files"):
        open_weights(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="not an index"):
        open_weights(folder)
    index.write_text(json.dumps(written))
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(ValueError, match="misses files.*00002"):
        open_weights(folder)


# ---- damage, and programs in files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "optim", "model"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 0.99])
def test_a_file_that_was_cut_off_is_refused(tmp_path, kind, keep):
    model = gpt2()
    if kind == "safetensors":
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    elif kind in ("optim", "model"):
        write_zero(tmp_path, {f"model.{n}": v for n, v in model.state_dict().items()}, 3, 2)
        path = tmp_path / f"zero_pp_rank_{1 if kind == 'optim' else 0}_mp_rank_00_{kind}_states.pt"
    else:
        path = tmp_path / "pytorch_model.bin"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="cannot be read"):
        weights = open_weights(tmp_path)
        weights.read(weights.shapes)


@QUICK
@given(st.integers(0, 10**9), st.binary(min_size=1, max_size=8), st.booleans())
def test_no_damage_is_a_traceback(tmp_path_factory, place, noise, legacy):
    "Bytes overwritten anywhere: the file is read or refused, and nothing else happens."
    path = tmp_path_factory.mktemp("noise") / "file.pt"
    torch.save({"a": torch.arange(6), "b": {"c": 1.5, "d": [1, "x"]}}, path, _use_new_zipfile_serialization=not legacy)
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place : place + len(noise)] = noise
    path.write_bytes(bytes(data))
    try:
        load_file(path)
    except ValueError as e:
        assert "cannot be read" in str(e) or "run a program" in str(e)


class Payload:
    "Makes a folder when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file", ["last.ckpt", "pytorch_model.bin", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_program_in_any_file_is_named_and_not_run(tmp_path, file, legacy):
    payload, folder = Payload(tmp_path / "ran"), tmp_path / "there"
    write_zero(folder, {"model.a": torch.ones(2)}, 2, 1)
    content = {"state_dict": {"model.a": torch.ones(2)}, "module": {"model.a": torch.ones(2)}, "optimizer_state_dict": {}, "x": payload}
    torch.save(content, folder / file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"could run a program: got '(posix|nt)?\.?mkdir"):
        open_weights(folder if "states" in file else folder / file)
    assert not (tmp_path / "ran").exists()


def test_getattr_and_builtins_are_no_way_around(tmp_path):
    class Around:
        def __reduce__(self):
            return getattr, (argparse.Namespace, "__init__")

    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Around()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="could run a program: got 'getattr'"):
        open_weights(tmp_path / "a.ckpt")


# ---- memory -----------------------------------------------------------------------------------------------------------------------------------

CONVERT = """
import sys, torch
from fengshen.training.export import open_source, write_model
from fengshen.training.weights import Weights

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

source, out, dtype = sys.argv[1:]
Weights.let_go = 32 << 20
found = open_source(source)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again here
before = status("VmRSS")
write_model(found, out, getattr(torch, dtype))
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "A model of 318 MB in float32 as three sources, largest weight 9.4 MB; {kind: folder}."
    folder = tmp_path_factory.mktemp("large")
    config = GPT2Config(vocab_size=2000, n_positions=64, n_embd=768, n_layer=11, n_head=12, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        shapes = {n: v.shape for n, v in GPT2LMHeadModel(config).state_dict().items() if n != "lm_head.weight"}
    state = {f"model.{n}": torch.randn(s) for n, s in shapes.items()}
    write_zero(folder / "zero2", state, 2, 2)
    write_zero(folder / "zero3", state, 3, 2)
    (folder / "lightning").mkdir()
    torch.save({"state_dict": state}, folder / "lightning" / "state.ckpt")
    for kind in ("zero2", "zero3", "lightning"):
        config.save_pretrained(folder / kind)
    return folder, sum(v.numel() * 4 for v in state.values())


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind, dtype", [
    ("lightning", "bfloat16"), ("zero3", "float32"), pytest.param("lightning", "float32", marks=SLOW), pytest.param("zero2", "float32", marks=SLOW)])
@pytest.mark.slow
def test_memory_is_bounded_by_a_part_of_the_model(large, tmp_path, kind, dtype):
    "The conversion's peak, mapped files included, is a fraction of the model, and the files hold every weight."
    folder, size = large
    done = subprocess.run([sys.executable, "-c", CONVERT, str(folder / kind), str(tmp_path / "out"), dtype], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    print(f"{kind} {dtype}: {peak / 1e6:.0f} MB at most for {size / 1e6:.0f} MB of weights")
    assert peak < size / 3
    assert abs(sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) - size // (1 if dtype == "float32" else 2)) < 100_000


def test_opening_reads_no_weights(large):
    "Names and shapes of 318 MB in a moment, because nothing but the directory is read."
    folder, _ = large
    weights = open_weights(folder / "lightning")
    assert isinstance(weights, Weights) and len(weights.shapes) == 136
