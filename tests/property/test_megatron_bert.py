"""MegatronBERT's attention in one kernel beside its own lines: numbers, gradients, masks, names, and the ways that stay."""

import copy
import pickle

import pytest
import torch
from transformers import AttentionInterface, BertConfig, BertForMaskedLM, MegatronBertConfig, MegatronBertForMaskedLM, MegatronBertForPreTraining
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fengshen.models.megatron_bert import OneKernelAttention, one_kernel
from fengshen.training.kinds import attention_of
from fengshen.utils.device import seeded
from fengshen.utils.kernels.attention import set_attention
from fengshen.utils.kernels.compile import blocks

SMALL = dict(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def drawn(cls=MegatronBertForMaskedLM, **changes):
    with seeded(0):
        return cls(MegatronBertConfig(**SMALL | changes)).double().train()


def results(model, mask):
    with seeded(1):
        ids, labels = torch.randint(1, 60, (3, 12)), torch.randint(1, 60, (3, 12))
    labels = labels if mask is None else labels.masked_fill(mask == 0, -100)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)]


@pytest.fixture
def told(monkeypatch):
    "The masks that the kernel was told."
    masks = []

    def attend(module, q, k, v, mask, **settings):
        masks.append(mask)
        assert settings["is_causal"] is False and q.shape == k.shape == v.shape
        return sdpa_attention_forward(module, q, k, v, mask, **settings)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attend)
    return masks


@pytest.mark.parametrize("lengths", [None, (12, 12, 12), (12, 5, 1)])
def test_numbers_and_gradients_are_its_own(told, lengths):
    "Without a mask none reaches the kernel, which could not be the fast one otherwise."
    model = drawn()
    mask = None if lengths is None else torch.tensor([[1] * n + [0] * (12 - n) for n in lengths])
    own = results(model, mask)
    assert not told
    one_kernel(model)
    for found, right in zip(results(model, mask), own):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)
    assert len(told) == 3 and all((seen is None) == (lengths != (12, 5, 1)) for seen in told)


def test_eager_is_still_to_be_had():
    "With its weights, and with the same numbers."
    model, mask = drawn(), torch.tensor([[1] * 12, [1] * 4 + [0] * 8, [1] * 9 + [0] * 3])
    own = results(model, mask)
    set_attention(one_kernel(model), "eager")
    for found, right in zip(results(model, mask), own):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)
    for given in (mask, None):
        assert model(torch.ones(3, 12, dtype=torch.long), attention_mask=given, output_attentions=True).attentions[0].shape == (3, 2, 12, 12)


def test_a_model_is_what_it_was_to_others(tmp_path):
    "Its class, its names, what it saves; twice is once; a copy and a pickle are as good."
    model = drawn()
    names = list(model.state_dict())
    assert one_kernel(one_kernel(model)) is model and len(model.bert._forward_pre_hooks) == 1
    assert type(model) is MegatronBertForMaskedLM and list(model.state_dict()) == names
    own = results(model, None)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, results(other, None), own))
    model.save_pretrained(tmp_path)
    back = MegatronBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64).train()
    assert back.config.model_type == "megatron-bert" and not any(isinstance(m, OneKernelAttention) for m in back.modules())
    torch.testing.assert_close(results(back, None)[0], own[0])


def test_dropout_of_the_weights_is_kept():
    model = one_kernel(drawn(attention_probs_dropout_prob=0.3))
    ids = torch.ones(2, 12, dtype=torch.long)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_what_is_left_alone():
    with seeded(0):
        bert = BertForMaskedLM(BertConfig(**SMALL))
    decoder = drawn(is_decoder=True)
    for model in (bert, decoder):
        one_kernel(model)
        assert not any(isinstance(m, OneKernelAttention) for m in model.modules())


def test_training_takes_it(capsys):
    model = drawn(MegatronBertForPreTraining)
    assert attention_of("masked", model, "auto", torch.float32) == "sdpa" == model.config._attn_implementation
    assert sum(isinstance(m, OneKernelAttention) for m in model.modules()) == 3 and "attention = sdpa" in capsys.readouterr().out
    assert attention_of("masked", drawn(), "eager", torch.float32) == "eager"


def test_a_block_is_compiled_in_one_piece():
    model = one_kernel(drawn(attention_probs_dropout_prob=0.1).float())
    plain = model.eval()(torch.ones(2, 12, dtype=torch.long)).logits
    torch.compiler.reset()
    for block in blocks(model):
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(torch.ones(2, 12, dtype=torch.long)).logits, plain)
    model.train()(torch.ones(2, 12, dtype=torch.long)).logits.sum().backward()
