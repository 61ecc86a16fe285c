"""Losses, the CRF and metrics on an accelerator are those on the CPU, in half precision too."""
import copy

import pytest
import torch

from fengshen.losses import CRF, cross_entropy, focal, label_smoothing, linear_cross_entropy, multilabel_cross_entropy
from fengshen.metric import EntityF1, MaskedLMAccuracy, Perplexity, TextPerplexity
from fengshen.utils.device import device_kind, seeded
from tests.metric_cases import Vocabulary, scores

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(device_kind() == "cpu", reason="no accelerator here")]


def here(*tensors):
    return [t.to(device_kind()) for t in tensors]


@pytest.mark.parametrize("loss_fn", [cross_entropy, label_smoothing, focal])
def test_losses_of_a_class(loss_fn):
    logits, labels = scores(40)
    labels[::5] = -100
    torch.testing.assert_close(loss_fn(*here(logits, labels)).cpu(), loss_fn(logits, labels), atol=1e-5, rtol=1e-5)


def test_several_labels_and_chunks():
    logits, labels = scores(40)
    on = (logits > 1).long()
    torch.testing.assert_close(multilabel_cross_entropy(*here(logits.half(), on)).cpu(), multilabel_cross_entropy(logits, on), atol=2e-2, rtol=1e-3)
    with seeded(0):
        head, hidden = torch.nn.Linear(16, 1280), torch.randn(40, 16)
    want = linear_cross_entropy(hidden, labels, head, chunk=7)
    got = linear_cross_entropy(*here(hidden, labels), copy.deepcopy(head).to(device_kind()), chunk=7)
    torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-4)


def test_a_crf_under_autocast():
    "The sum over sequences stays in float32 where autocast would have made it less."
    with seeded(0):
        crf, emissions, tags = CRF(7), torch.randn(3, 50, 7), torch.randint(0, 7, (3, 50))
    mask = torch.arange(50)[None] < torch.tensor([[50], [20], [1]])
    there = copy.deepcopy(crf).to(device_kind())
    with torch.autocast(device_kind(), dtype=torch.bfloat16):
        loss = there(*here(emissions, tags, mask))
    torch.testing.assert_close(loss.cpu(), crf(emissions, tags, mask), atol=1e-3, rtol=1e-4)
    assert torch.equal(there.decode(*here(emissions, mask), nbest=3).cpu(), crf.decode(emissions, mask, nbest=3))


def test_metrics():
    logits, labels = scores(40)
    for make in (MaskedLMAccuracy, Perplexity, lambda: TextPerplexity(Vocabulary())):
        metrics = make(), make().to(device_kind())
        metrics[0].update(logits, labels)
        metrics[1].update(*here(logits, labels))
        torch.testing.assert_close(metrics[1].compute().cpu(), metrics[0].compute(), rtol=1e-4, atol=0)
    entities = EntityF1("bio", types=["PER"]).to(device_kind())
    entities.update([["B-PER", "O"]], [["B-PER", "I-PER"]])
    assert entities.compute()["f1"] == 0 and entities.by_type()["PER"]["support"] == 1
