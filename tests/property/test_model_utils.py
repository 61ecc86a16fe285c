"Parameter groups on real architectures, every optimizer update against the formula, every schedule against its definition."
import math
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    RoFormerConfig,
    RoFormerModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fengshen.models.model_utils import (
    DEFAULTS,
    ENDLESS,
    OPTIMIZERS,
    SCHEDULES,
    OptimizerConfig,
    ScheduleConfig,
    describe_schedule,
    learning_rates,
    make_optimizer,
    make_schedule,
    optimizer_kind,
    parameter_groups,
    schedule_lengths,
)

SMALL = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
MODELS = dict(
    gpt2=lambda: AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, eos_token_id=1)),
    llama=lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)),
    qwen3=lambda: AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)),
    bert=lambda: BertModel(BertConfig(**SMALL)),
    roformer=lambda: RoFormerModel(RoFormerConfig(**SMALL, embedding_size=16)),
    t5=lambda: T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
)
# what each architecture calls its normalisations: the test's own knowledge, independent of module types
NORMS = dict(gpt2=("ln_1.", "ln_2.", "ln_f."), llama=("norm.", "layernorm."), qwen3=("norm.", "layernorm."),
             bert=("LayerNorm.",), roformer=("LayerNorm.",), t5=("layer_norm.",))


@pytest.mark.parametrize("arch", MODELS)
def test_every_trainable_parameter_once_and_in_the_right_group(arch):
    model = MODELS[arch]()
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}  # RoFormer freezes its sinusoids
    groups = {g["name"]: [names[id(p)] for p in g["params"]] for g in parameter_groups(model, 0.1)}
    everything = [name for part in groups.values() for name in part]
    assert sorted(everything) == sorted(names.values())
    still = {name for name in names.values() if name.endswith(".bias") or any(mark in f"{name}." for mark in NORMS[arch])}
    assert set(groups["biases and norms"]) == still and still
    assert any("embed" in name or "wte" in name or "shared" in name for name in groups["weights"])


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.RMSNorm(8), nn.LayerNorm(8)])
        self.again = self.norms[0]
        self.linear, self.tied = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.tied.weight = self.linear.weight


def test_shared_modules_frozen_parameters_and_unusual_biases():
    model = Odd()
    model.norms[3].requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    weights, rest = ([names[id(p)] for p in g["params"]] for g in parameter_groups(model, 0.1))
    assert sorted(weights) == ["attention.in_proj_weight", "attention.out_proj.weight", "linear.weight"]
    assert {"attention.in_proj_bias", "attention.bias_k", "attention.bias_v", "norms.2.weight"} <= set(rest)
    assert not any("norms.3" in name for name in rest)


def test_a_group_that_would_be_empty_is_left_out():
    assert [g["name"] for g in parameter_groups(nn.LayerNorm(4))] == ["biases and norms"]


def adamw_by_hand(p, g, m, v, t, lr, decay, betas, eps):
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    p = p * (1 - lr * decay) - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p, m, v


@pytest.mark.parametrize("kind", ["auto", "adamw", "fused_adamw"])
@given(lr=st.floats(1e-5, 0.1), decay=st.floats(0, 0.5), b1=st.floats(0, 0.99), b2=st.floats(0.5, 0.999))
@settings(max_examples=15, deadline=None)
def test_the_update_is_adamw_with_the_settings_given(kind, lr, decay, b1, b2):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    config = OptimizerConfig(kind, lr=lr, weight_decay=decay, betas=(b1, b2))
    optimizer = make_optimizer(model, config)
    state = {p: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}
    for t in (1, 2, 3):
        for p in state:
            p.grad = torch.randn_like(p)
            wd = decay if p is model[0].weight else 0.0
            state[p] = adamw_by_hand(state[p][0], p.grad, state[p][1], state[p][2], t, lr, wd, (b1, b2), config.eps)
        optimizer.step()
    for p, (want, _, _) in state.items():
        torch.testing.assert_close(p.detach(), want.detach(), atol=1e-10, rtol=1e-8)


BAD = [dict(lr=0), dict(lr=-1), dict(lr=float("nan")), dict(weight_decay=-0.1), dict(betas=(0.9, 1.0)), dict(betas=(0.9,)), dict(eps=0)]


@pytest.mark.parametrize("settings_", BAD)
def test_settings_out_of_range_are_refused_by_name(settings_):
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(settings_))} is out of range: got .*, expected"):
        OptimizerConfig(**settings_)


@pytest.mark.parametrize("deepspeed", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_auto_is_always_accepted_when_asked_for_by_name(deepspeed, offload):
    kind, _ = optimizer_kind("auto", deepspeed, offload and deepspeed)
    assert optimizer_kind(kind, deepspeed, offload and deepspeed)[0] == kind
    for other in OPTIMIZERS:
        if offload and deepspeed and other != kind:
            with pytest.raises(ValueError, match="set optimizer.kind to 'auto'"):
                optimizer_kind(other, True, True)


# Schedules


def config_of(kind, **more):
    needs = dict(end_lr=1e-6) if "end_lr" in SCHEDULES[kind] else {}
    return ScheduleConfig(kind, **(needs | more))


@pytest.mark.parametrize("kind", SCHEDULES)
@given(lr=st.floats(1e-5, 1), warmup=st.integers(1, 30), rest=st.integers(1, 200))
@example(lr=1.0, warmup=14, rest=1)
@settings(max_examples=20, deadline=None)
def test_every_schedule_rises_to_the_rate_given_and_never_above(kind, lr, warmup, rest):
    config = config_of(kind, **({} if kind == "constant" else dict(warmup_steps=warmup)))
    total = warmup + rest
    rates = learning_rates(lr, config, total, steps=range(total + 20))
    assert all(0 <= rate <= lr * (1 + 1e-9) for rate in rates)
    if kind not in ("constant", "cosine_warmup_with_min_lr"):
        torch.testing.assert_close(torch.tensor(rates[: warmup + 1]), torch.linspace(rates[0], lr, warmup + 1), rtol=1e-5, atol=0)
    if kind in ("polynomial", "cosine_with_min_lr"):
        assert math.isclose(rates[total], 1e-6, rel_tol=1e-6)
    if kind in ("linear", "cosine", "warmup_stable_decay"):
        assert rates[total] <= max(1e-9 * lr, config.end_lr * (1 + 1e-9))


@given(lr=st.floats(1e-6, 1), warmup=st.integers(1, 1000), step=st.integers(0, 10**6))
def test_inverse_sqrt_is_the_original_formula(lr, warmup, step):
    want = lr * step / warmup if step < warmup else lr * math.sqrt(warmup / step)
    (got,) = learning_rates(lr, ScheduleConfig("inverse_sqrt", warmup_steps=warmup), -1, steps=[step])
    assert math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-18)


@given(lr=st.floats(1e-4, 1), end=st.floats(0, 9e-5), power=st.floats(0.5, 3), warmup=st.integers(0, 50), rest=st.integers(1, 500),
       where=st.floats(0, 1))
def test_polynomial_is_its_formula(lr, end, power, warmup, rest, where):
    step = warmup + round(where * rest)
    want = end + (lr - end) * (1 - (step - warmup) / rest) ** power
    (got,) = learning_rates(lr, ScheduleConfig("polynomial", warmup_steps=warmup, end_lr=end, power=power), warmup + rest, steps=[step])
    assert math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_optimizer_really_gets_what_is_plotted_and_printed(kind, capsys):
    config = config_of(kind)
    optimizer = torch.optim.AdamW([dict(params=[nn.Parameter(torch.ones(1))], name=n) for n in "ab"], lr=3e-4)
    schedule, used = make_schedule(optimizer, config, 100), []
    for _ in range(100):
        assert len({g["lr"] for g in optimizer.param_groups}) == 1
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used == learning_rates(3e-4, config, 100)
    line = capsys.readouterr().out.strip()
    assert line == "learning rate = " + describe_schedule(3e-4, config, 100)
    assert f"{optimizer.param_groups[0]['lr']:.3g} at step 100" in line


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("total", [None, -1, math.inf])
def test_unknown_length(kind, total):
    config = config_of(kind, **({} if kind == "constant" else dict(warmup_steps=5)))
    if kind in ENDLESS:
        assert "no last step" in describe_schedule(1e-4, config, total)
        return
    with pytest.raises(ValueError, match="needs the length of the run"):
        schedule_lengths(config, total)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("field,value", [("warmup_steps", 3), ("end_lr", 1e-7), ("power", 2.0), ("cycles", 2), ("decay_ratio", 0.3)])
def test_a_field_is_used_or_refused(kind, field, value):
    if field in SCHEDULES[kind]:
        base, changed = (learning_rates(1e-4, ScheduleConfig(kind, **{"warmup_steps": 7} | more), 100) for more in ({}, {field: value}))
        assert base != changed
    else:
        with pytest.raises(ValueError, match=f"schedule.{field} is out of range"):
            ScheduleConfig(kind, **{field: value})
    assert set(DEFAULTS) >= SCHEDULES[kind]


def test_warmup_steps_win_over_the_ratio_and_the_ratio_is_rounded_down():
    assert schedule_lengths(ScheduleConfig(warmup_steps=0, warmup_ratio=0.5), 100)[0] == 0
    assert schedule_lengths(ScheduleConfig(warmup_ratio=0.1), 19)[0] == 1
    assert schedule_lengths(ScheduleConfig(), 2)[0] == 0


@pytest.mark.parametrize("config,total,message", [
    (dict(warmup_steps=10), 10, "ends before its warm-up"),
    (dict(kind="inverse_sqrt", warmup_steps=0), 10, "time scale"),
    (dict(kind="constant_with_warmup"), -1, "share needs the length of the run"),
])
def test_lengths_that_cannot_be(config, total, message):
    with pytest.raises(ValueError, match=message):
        schedule_lengths(ScheduleConfig(**config), total)


@pytest.mark.parametrize("kind", [k for k in SCHEDULES if "end_lr" in SCHEDULES[k]])
def test_the_end_is_below_the_start(kind):
    with pytest.raises(ValueError, match="schedule.end_lr is out of range"):
        learning_rates(1e-6, ScheduleConfig(kind, end_lr=1e-6), 10)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy", "consine", ""])
def test_names_that_are_refused(kind):
    with pytest.raises(ValueError, match="expected one of"):
        ScheduleConfig(kind)


def test_resuming_a_schedule_goes_on_where_it_was():
    def pair():
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-3)
        return optimizer, make_schedule(optimizer, ScheduleConfig("cosine", warmup_steps=3), 20)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedules are stepped here without their optimizer
        _, straight = pair()
        for _ in range(12):
            straight.step()
        first_half = pair()[1]
        for _ in range(6):
            first_half.step()
        _, resumed = pair()
        resumed.load_state_dict(first_half.state_dict())
        for _ in range(6):
            resumed.step()
    assert resumed.get_last_lr() == straight.get_last_lr()
