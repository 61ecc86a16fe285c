"""The models on an accelerator: FlexAttention forward and backward, documents in the fused kernel, 16 bits, generation."""
import pytest
import torch

import fengshen.models.roformer as roformer
from fengshen.utils import device
from fengshen.utils.device import seeded
from fengshen.utils.kernels.attention import NAME, register_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(device.device_kind() == "cpu", reason="no accelerator here")]
LENGTH = 200
TYPES = dict(read=torch.zeros(LENGTH).long(), written=torch.ones(LENGTH).long(), both=(torch.arange(LENGTH) > 80).long())


def model_of(head="Model", attention="sdpa", dtype=torch.float32):
    "The same random weights on the device for every form of attention."
    register_attention()
    config = roformer.RoFormerConfig(vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, initializer_range=0.1,
                                     hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with seeded(1):
        model = getattr(roformer, f"RoFormer{head}")(config)
    model.set_attn_implementation(attention)
    return model.to(device.device_kind(), dtype)


def ids_of(rows, length=LENGTH):
    return torch.randint(1, 100, (rows, length), generator=torch.Generator().manual_seed(0)).to(device.device_kind())


def forward_and_backward(model, *inputs, **more):
    "Output and gradients of a weighted sum of it."
    out = model(*inputs, **more).last_hidden_state
    (out.float() * torch.linspace(-1, 1, out.shape[-1], device=out.device)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("types", TYPES)
def test_flex_attention_forward_and_backward(types):
    ids, mask = ids_of(2), torch.ones(2, LENGTH, dtype=torch.long, device=device.device_kind())
    mask[1, 150:] = 0
    row = TYPES[types].to(ids.device).repeat(2, 1)
    results = []
    for attention in ("sdpa", "flex_attention"):
        model = model_of(attention=attention)
        out = model(ids, mask, row).last_hidden_state * mask[..., None]
        (out * torch.linspace(-1, 1, 128, device=out.device)).sum().backward()
        results.append((out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (want, goal), (got, grads) = results
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    for name, grad in goal.items():
        assert (grads[name] - grad).norm() / grad.norm().clamp(min=1e-6) < 1e-2, name


@pytest.mark.parametrize("types", ["read", "written"])
def test_documents_in_the_fused_kernel(types):
    "One flattened row in 16 bits, against each document alone in float32."
    lengths, ids = [90, 1, 64, 45], ids_of(1)
    ends = torch.tensor([0, 90, 91, 155, 200, 200], dtype=torch.int32, device=ids.device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(ids.device)
    row, bounds = TYPES[types][None].to(ids.device), dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=90, max_length_k=90)
    with torch.no_grad():
        alone = torch.cat([model_of()(part, token_type_ids=kind).last_hidden_state for part, kind in zip(ids.split(lengths, 1), row.split(lengths, 1))], 1)
    got, grads = forward_and_backward(model_of(attention=NAME, dtype=torch.bfloat16), ids, token_type_ids=row, position_ids=positions, **bounds)
    assert (got.float() - alone).norm() / alone.norm() < 2e-2
    want, goal = forward_and_backward(model_of(), ids, token_type_ids=row, position_ids=positions, **bounds)
    torch.testing.assert_close(want, alone, rtol=1e-3, atol=1e-3)
    ours, theirs = (torch.cat([g.flatten().float() for g in each.values()]) for each in (grads, goal))
    assert (ours - theirs).norm() / theirs.norm() < 5e-2


def test_generation_with_a_cache():
    model, ids = model_of("ForCausalLM").eval(), ids_of(3, 12)
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
