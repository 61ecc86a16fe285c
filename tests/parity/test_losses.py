"""The CRF computes what the original's layer computed, with the weights of its checkpoint."""
import pytest
import torch
from safetensors.torch import load_file

from fengshen.losses import CRF

TOLERANCE = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def case(shared):
    folder = shared / "parity" / "tagging_models" / "bert_crf"
    given, gave, weights = ({k.removeprefix("crf/"): t for k, t in load_file(folder / f"{name}.safetensors").items()} for name in ("inputs", "outputs", "weights"))
    crf = CRF(len(weights["crf.start_transitions"]))
    crf.load_state_dict({name.removeprefix("crf."): tensor for name, tensor in weights.items() if name.startswith("crf.")})
    return crf, given, gave


def test_likelihoods(case):
    crf, given, gave = case
    nll = crf(given["emissions"], given["tags"], given["mask"])
    for want, got in {"none": -nll, "sum": -nll.sum(), "mean": -nll.mean(), "token_mean": -nll.sum() / given["mask"].sum()}.items():
        torch.testing.assert_close(got, gave[f"llh_{want}"], **TOLERANCE)
    torch.testing.assert_close(-crf(given["emissions"], given["tags"]).mean(), gave["llh_nomask"], **TOLERANCE)


def test_the_loss_of_the_whole_tagger(case):
    crf, given, gave = case
    nll = crf(gave["loss/logits"], given["loss/labels"], given["loss/attention_mask"])
    torch.testing.assert_close(nll.mean(), gave["loss/loss"], **TOLERANCE)


def test_decoding(case):
    crf, given, gave = case
    emissions, mask = given["emissions"], given["mask"]
    assert torch.equal(crf.decode(emissions, mask), gave["decode"]) and torch.equal(crf.decode(emissions), gave["decode_nomask"])
    assert torch.equal(crf.decode(emissions, mask, pad_tag=9), gave["decode_pad_tag_9"])
    best, theirs = crf.decode(emissions, mask, nbest=3), gave["decode_nbest3"]
    whole = mask.bool().all(1)  # the original repeats the best sequence of a row that ends in padding
    assert whole.any() and torch.equal(best[:, whole], theirs[:, whole]) and all(len(row.unique(dim=0)) == 3 for row in best.transpose(0, 1))
