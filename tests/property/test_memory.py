"""The memory estimate against what is there: bytes of real models, gradients, optimizers and checkpoints, DeepSpeed's own estimators, and measured runs."""
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

from fengshen.training.memory import COUNTED, DEAR, GIB, count, empty_model, estimate, kept, layout_of
from fengshen.utils.kernels.compile import blocks
from tests.training_runs import environment, fit, tiny_config

SMALL = dict(
    gpt2=GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=3, n_head=4, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0),
    llama=LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2),
    qwen3=Qwen3Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
)


def bytes_of(tensors):
    "Bytes of tensors, each storage once."
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("name", SMALL)
def test_states_of_a_real_step_to_the_byte(name):
    model = AutoModelForCausalLM.from_config(SMALL[name], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(10)[None]).logits.sum().backward()
    optimizer.step()
    found = estimate(SMALL[name], precision="32-true", micro_batch=1, length=10)
    assert found.part("weights").device == bytes_of(model.parameters())
    assert found.part("gradients").device == bytes_of(p.grad for p in model.parameters())
    assert found.part("optimizer").device == bytes_of(v for state in optimizer.state.values() for v in state.values() if v.dim())


@pytest.mark.parametrize("lora", [1, 8])
def test_a_lora_has_the_parameters_that_are_then_trained(lora):
    from fengshen.models.lora import LoRAConfig, add_lora

    for config in SMALL.values():
        model = AutoModelForCausalLM.from_config(config)
        whole = sum(p.numel() for p in model.parameters())
        add_lora(model, LoRAConfig(r=lora), 0)
        counts = count(empty_model(config), lora)
        assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert counts.all == whole + counts.trained == sum(p.numel() for p in model.parameters())


def kept_for_real(model, rows, length):
    "Bytes of the storages that autograd keeps in a real forward pass of the blocks, parameters left out."
    weights, saved, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(tensor):
        alive.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    positions = torch.arange(length).expand(rows, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    assert out.last_hidden_state.requires_grad
    return sum(size for key, size in saved.items() if key not in weights)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_are_those_of_the_real_model(name, dtype, attention):
    "The count on the meta device, where fused attention is a stand-in, is within 5% of what autograd keeps on a CPU."
    model = AutoModelForCausalLM.from_config(SMALL[name], dtype=dtype, attn_implementation=attention).train()
    real = kept_for_real(model, 2, 64)
    found = kept(empty_model(SMALL[name], dtype), 2, 64, fused=attention == "sdpa").eager
    assert abs(found / real - 1) < 0.05, (found, real)


def test_a_mixture_of_experts_is_counted_in_its_own_code():
    config = MixtralConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    found = estimate(config, micro_batch=1, length=32)
    assert "counted" in found.part("activations").why
    assert found.part("16-bit copies of weights").device <= 2 * count(empty_model(config)).all


PROBE = """
import json, sys, torch
import pytorch_lightning as pl
from fengshen.cli.fit import prepare

class Probe(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        optimizer = trainer.strategy.deepspeed_engine.optimizer
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
        masters = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
        states = [v for state in optimizer.optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
        weights = [getattr(p, "ds_tensor", p) for p in module.model.parameters()]
        print("PROBE " + json.dumps({"weights": size(weights), "master weights": size(masters), "optimizer": size(states)}))

cli = prepare(sys.argv[1:])
cli.trainer.callbacks.append(Probe())
cli.trainer.fit(cli.model, datamodule=cli.datamodule)
"""


@pytest.mark.parametrize("strategy", ["zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3_offload"))])
@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_states_under_deepspeed(tmp_path, strategy, precision):
    "Weights, master weights and AdamW's states that DeepSpeed holds are the estimate's, up to the padding of its partitions."
    config = tiny_config(tmp_path, n_embd=128)
    words = ["-c", "demo", f"--model.config={config}", f"--trainer.strategy={strategy}", f"--trainer.precision={precision}", "--trainer.max_steps=1",
             "--trainer.val_check_interval=1000", "--checkpoint.at_end=false", "--model.samples=0", f"--run_dir={tmp_path}/run"]
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    real = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("PROBE")).removeprefix("PROBE "))
    found = estimate(config, strategy, precision=precision, micro_batch=8, length=128)
    for name, size in real.items():
        part = found.part(name)
        assert abs((part.device + part.host) / size - 1) < 0.01, (name, part, size)


@pytest.mark.parametrize("strategy", ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3"))])
def test_checkpoints_have_the_size_that_was_promised(tmp_path, strategy):
    config = tiny_config(tmp_path, n_embd=256)
    run = fit(tmp_path / "run", **{"model.config": config, "trainer.strategy": strategy, "trainer.max_steps": 1})
    real = sum(f.stat().st_size for f in (run / "checkpoints").rglob("*") if f.suffix in (".ckpt", ".pt"))
    found = estimate(config, strategy, precision="32-true", micro_batch=8, length=128).checkpoint
    assert abs(found / real - 1) < 0.08, (found, real)  # a head that is tied may be written twice


@pytest.mark.parametrize("name", SMALL)
def test_float32_weights_of_the_optimizer_are_counted_to_the_byte(name):
    "16-bit weights and gradients, and an optimizer that keeps float32 ones: what torch allocates for them."
    model = AutoModelForCausalLM.from_config(SMALL[name], dtype=torch.bfloat16)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters)
    model(input_ids=torch.arange(10)[None]).logits.sum().backward()
    for p, master in zip(model.parameters(), masters):
        master.grad = p.grad.float()
    optimizer.step()
    found = estimate(SMALL[name], optimizer="master_adamw", micro_batch=1, length=10)
    assert found.part("weights").device == bytes_of(model.parameters())
    assert found.part("gradients").device == bytes_of(p.grad for p in model.parameters())
    assert found.part("master weights").device == bytes_of(masters)
    assert found.part("optimizer").device == bytes_of(v for state in optimizer.state.values() for v in state.values() if v.dim())
    assert found.part("16-bit copies of weights").device == 0
    host = estimate(SMALL[name], optimizer="host_adamw", micro_batch=1, length=10)
    moved = found.part("master weights").device + found.part("optimizer").device
    assert host.part("master weights").host + host.part("optimizer").host == moved and abs(found.device - host.device - 1.02 * moved) < 2


@pytest.mark.parametrize("name", SMALL)
def test_a_configuration_stays_as_it_was(name):
    config, before = SMALL[name], SMALL[name].to_json_string(use_diff=False)
    estimate(config, optimizer="master_adamw", compiled=True, micro_batch=1, length=11)
    assert config.to_json_string(use_diff=False) == before and config._attn_implementation != COUNTED


def kept_by_torch(block, x_bld, budget, **given):
    "Bytes that a block compiled under a budget keeps for its backward pass, by torch's own partitioner; its input is one of them."
    torch._dynamo.reset()
    kept_here, weights = {}, {p.untyped_storage()._cdata for p in block.parameters()}

    def pack(tensor):
        kept_here[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch._functorch.config.patch(activation_memory_budget=budget), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.compile(block, backend="aot_eager_decomp_partition")(x_bld, **given)
    return sum(t.untyped_storage().nbytes() for name, t in kept_here.items() if name not in weights)


BLOCKS = dict(
    gpt2=(AutoModelForCausalLM, GPT2Config(n_embd=256, n_head=4, n_layer=1, vocab_size=300, n_positions=256, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)),
    qwen3=(AutoModelForCausalLM, Qwen3Config(hidden_size=256, intermediate_size=972, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2, head_dim=32, vocab_size=300)),
    llama=(AutoModelForCausalLM, LlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, vocab_size=300)),
    bert=(AutoModelForMaskedLM, BertConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4, vocab_size=300, attention_probs_dropout_prob=0.0)))


@pytest.mark.parametrize("name, most", [("gpt2", DEAR), ("qwen3", 0.69), ("llama", 0.70), ("bert", 0.70)])
def test_torch_keeps_as_much_as_is_counted_on_below_a_budget_of_one(name, most):
    "The estimate takes `DEAR` for all: what other blocks keep beyond it is held here, at most an eighth of that."
    auto, config = BLOCKS[name]
    model = auto.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    x_bld = torch.randn(1, 256, 256, dtype=torch.bfloat16, requires_grad=True)
    given = dict(position_embeddings=model.model.rotary_emb(x_bld, torch.arange(256)[None]), attention_mask=None) if name in ("qwen3", "llama") else {}
    everything, most_of_it, as_much = (kept_by_torch(blocks(model)[0], x_bld, budget, **given) - x_bld.nbytes for budget in (1.0, 0.95, 0.8))
    assert most_of_it == as_much and most - 0.04 < most_of_it / everything < most + 0.01 <= 1.14 * DEAR


@settings(max_examples=10, deadline=None)
@given(budgets=st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted), layers=st.integers(1, 4), rows=st.integers(1, 3))
def test_a_smaller_budget_keeps_less(budgets, layers, rows):
    config = GPT2Config(n_layer=layers, n_head=2, n_embd=32, vocab_size=70, n_positions=64, bos_token_id=0, eos_token_id=0)
    ask = dict(config=config, micro_batch=rows, length=32, optimizer="master_adamw", compiled=True)
    least, less, more, all_of_it = (estimate(**ask, activation_budget=b).part("activations").device for b in (0, *budgets, 1))
    assert least <= less <= more <= all_of_it == estimate(**ask).part("activations").device
    inputs = layers * rows * 32 * 32 * 2
    assert least >= inputs and (layers > 1) == (least < all_of_it)
    eager = ask | dict(compiled=False)
    assert estimate(**eager, activation_budget=budgets[0]).device == estimate(**eager).device


def test_deepspeeds_own_estimators_agree():
    "They give (host, device) and know neither activations nor buffers nor groups of gradients; their host figures have a factor of 1.5 for pinned memory."
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as theirs

    config = "fengshen:models/gpt2_3.5b.json"
    counts = count(empty_model(GPT2Config(**json.loads(resource_text(config)))))
    for processes in (1, 8):
        for optimizer, weights in ((True, True), (True, False), (False, False)):
            zero = dict(stage=3, sub_group_size=10**12, **({"offload_optimizer": {"device": "cpu"}} if optimizer else {}), **({"offload_param": {"device": "cpu"}} if weights else {}))
            found = estimate(config, dict(zero_optimization=zero), processes=processes, micro_batch=1, length=64)
            states = ("weights", "gradients of the step", "master weights", "optimizer", "weights at work", "pinned copies")
            host, device, _ = theirs(counts.all, counts.largest, num_gpus_per_node=processes, cpu_offload=optimizer, cpu_offload_params=weights, zero_init=True)
            assert abs(sum(found.part(name).device for name in states) / device - 1) < 0.01
            assert not optimizer or abs(sum(found.part(name).host for name in states) / host - 1) < 0.01


def resource_text(name):
    "The text of a packaged file."
    from fengshen.utils.resources import resource

    return resource(name).read_text("utf8")


def test_the_known_figures_of_a_model_of_three_and_a_half_billion():
    "Model states under ZeRO-3, in GiB: 89 host + 0.6 device with both offloads, 79.5 + 7.2 with the optimizer's, 60 without."
    cpu = {"device": "cpu"}
    for zero, host, device in ((dict(offload_optimizer=cpu, offload_param=cpu), 89, 0.6), (dict(offload_optimizer=cpu), 79.5, 7.2), ({}, 0, 60)):
        found = estimate("fengshen:models/gpt2_3.5b.json", dict(zero_optimization=dict(stage=3, sub_group_size=10**12, **zero)))
        states = [found.part(n) for n in ("weights", "gradients of the step", "master weights", "optimizer", "weights at work", "pinned copies")]
        assert sum(p.device for p in states) / GIB == pytest.approx(device, rel=0.05)
        assert sum(p.host for p in states) / GIB == pytest.approx(host, rel=0.01)


def test_the_estimate_of_each_recorded_run(root):
    "The newest record of each run in benchmarks/results, with the settings that its recipe had."
    rows = map(json.loads, (root / "benchmarks/results/finetune_gpu.jsonl").read_text("utf8").splitlines())
    ways = dict(default=("zero2", False), default_single=("auto", False), offload=("zero3_offload", True))
    newest = {row["name"]: row for row in rows if row["name"] in ways}
    assert set(newest) == set(ways)
    for name, row in newest.items():
        strategy, checkpointing = ways[name]
        found = estimate("fengshen:models/gpt2_3.5b.json", strategy, 8, 1024, checkpointing=checkpointing, compiled=layout_of(strategy).stage < 3)
        assert found.device / GIB == pytest.approx(row["gpu_gib"], rel=0.1), name
        assert found.host / GIB == pytest.approx(row["host_gib"], rel=0.1), name


def test_zero3_makes_float32_gradients_a_group_at_a_time(root):
    "The peaks of runs on one and on two GPUs, which were predicted whole: 94 GiB for 79 on one."
    rows = {row["name"]: row for row in map(json.loads, (root / "benchmarks/results/gpu.jsonl").read_text("utf8").splitlines())}
    for name, micro, processes in (("ours_zero3", 8, 1), ("two_zero3", 16, 2)):
        found = estimate("fengshen:models/gpt2_3.5b.json", "zero3", micro, 1024, processes, compiled=True)
        assert found.part("gradients of the step").device == 4 * 10**9 and found.device / GIB == pytest.approx(rows[name]["reserved_gib"], rel=0.08), name


def test_predictions_that_were_written_down_before(root):
    "The peak that torch reserved in each run of benchmarks/gpu.py that has a prediction is within 10% of it."
    predicted = {row["name"]: row for row in map(json.loads, (root / "benchmarks/results/plan_predictions.jsonl").read_text("utf8").splitlines())}
    rows = list(map(json.loads, (root / "benchmarks/results/gpu.jsonl").read_text("utf8").splitlines()))
    other = {("gpt2_lora_20gb", 13)}  # bitsandbytes, while it was imported, kept the allocator from growing its segments: 19.2 GiB for 14.6
    other |= {("gpt2_lora_20gb_budget", call) for call in (14, 15, 18)}  # 17.1 for 14.7 to 15.0: the prediction took the budget for what torch keeps, see `DEAR`
    other |= {("qwen3_lora_20gb_budget", 18)}  # 22.9 for 18.9: it counted the gradient of a head that is not trained
    held = [row for row in rows if row["name"] in predicted and row.get("reserved_gib") and not row.get("error") and (row["name"], row["call"]) not in other]
    assert {"ours", "ours_80gb", "gpt2_110m", "gpt2_lora_20gb", "qwen3_8x2", "bert", "megatron_bert", "qwen3_lora", "gpt2_lora", "two_zero2", "two_zero3", "two_110m_ddp"} <= {row["name"] for row in held}
    for row in held:
        assert predicted[row["name"]]["reserved_gib"] == pytest.approx(row["reserved_gib"], rel=0.1), row["name"]
    short = next(row for row in rows if row["name"] == "ours_32")
    assert predicted["ours_32"]["reserved_gib"] > predicted["ours_32"]["card_gib"] and "out of memory" in short["error"]


def test_adapters_under_a_budget_need_what_is_estimated_today(root):
    "Both models, whose predictions were off before: within 5%."
    spec = importlib.util.spec_from_file_location("plan_memory", root / "benchmarks/plan_memory.py")
    plan_memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plan_memory)
    rows = {row["name"]: row["reserved_gib"] for row in map(json.loads, (root / "benchmarks/results/gpu.jsonl").read_text("utf8").splitlines()) if row["call"] == 18}
    for name in ("gpt2_lora_20gb_budget", "qwen3_lora_20gb_budget"):
        assert plan_memory.predict(name)["reserved_gib"] == pytest.approx(rows[name], rel=0.05), name


@settings(max_examples=15, deadline=None)
@given(layers=st.integers(1, 4), heads=st.integers(1, 4), width=st.integers(1, 4), rows=st.integers(1, 5), length=st.integers(1, 40), processes=st.integers(1, 9),
       strategy=st.sampled_from(["auto", "ddp", "zero1", "zero2", "zero3", "zero3_offload"]), precision=st.sampled_from(["32-true", "bf16-mixed", "bf16-true"]))
def test_what_holds_for_any_model(layers, heads, width, rows, length, processes, strategy, precision):
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=8 * heads * width, vocab_size=70, n_positions=64, bos_token_id=0, eos_token_id=0)
    ask = dict(config=config, strategy=strategy, micro_batch=rows, length=length, precision=precision)
    one = estimate(**ask)
    assert all(value >= 0 for p in one.parts for value in (p.device, p.host, p.disk)) and one.device > 0
    more, twice = estimate(**ask, processes=processes), estimate(**(ask | dict(micro_batch=2 * rows)))
    if strategy.startswith("zero"):
        assert more.device <= one.device
    assert sum(p.disk for p in more.parts) == sum(p.disk for p in one.parts)
    activations = [estimate(**ask, **form).part("activations").device for form in ({}, dict(compiled=True))]
    assert activations[1] <= activations[0]
    assert abs(twice.part("activations").device - 2 * activations[0]) <= 0.02 * twice.part("activations").device + 10_000  # masks and positions are not by the row
    assert json.loads(json.dumps(one.as_dict()))["device"] == one.device


@pytest.mark.parametrize("changes, named", [
    (dict(activation_budget=1.5), "share from 0 to 1"), (dict(optimizer="master_adamw", strategy="zero2"), "DeepSpeed"), (dict(optimizer="master_adamw", precision="32-true"), "bf16-mixed"), (dict(optimizer="adamv"), "adamw"),
    (dict(strategy="fsdp"), "zero3"), (dict(strategy="zero5"), "zero"), (dict(precision="16"), "16-mixed"), (dict(micro_batch=0), "micro_batch"),
    (dict(processes=0), "processes"), (dict(config="nowhere.json"), "nowhere.json"), (dict(strategy="nowhere/zero.json"), "zero.json")])
def test_what_cannot_be_estimated_is_refused(changes, named):
    with pytest.raises(ValueError, match="got .*expected") as refusal:
        estimate(**(dict(config=SMALL["gpt2"]) | changes))
    assert named in str(refusal.value)


def test_states_on_a_disk_are_neither_on_the_device_nor_on_the_host():
    nvme = dict(zero_optimization=dict(stage=3, offload_optimizer=dict(device="nvme", nvme_path="x"), offload_param=dict(device="nvme", nvme_path="x")))
    host = estimate(SMALL["llama"], "zero3_offload")
    disk = estimate(SMALL["llama"], nvme)
    assert disk.part("optimizer").disk == host.part("optimizer").host and disk.part("optimizer").host == 0
    assert disk.disk == sum(host.part(name).host for name in ("weights", "gradients of the step", "master weights", "optimizer"))
