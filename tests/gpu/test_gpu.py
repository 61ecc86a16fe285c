"""What only an accelerator can show: the fused attention, compiled blocks, and every strategy on the real device."""

import json
import subprocess
import sys

import pytest
import torch

from fengshen.training.run import Run
from fengshen.utils import device
from fengshen.utils.kernels.attention import document_attention, flash_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(device.device_kind() == "cpu", reason="no accelerator here")]


@pytest.mark.parametrize("heads,key_heads,width", [(4, 4, 96), (8, 2, 64), (4, 4, 128)])
def test_fused_attention_is_the_reference(heads, key_heads, width):
    lengths = [1, 300, 0, 77, 2, 1024 - 380, 0, 0]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device.device_kind())
    gen = torch.Generator(device.device_kind()).manual_seed(0)

    def tensors(n):
        return torch.randn(1, n, 1024, width, device=device.device_kind(), dtype=torch.bfloat16, generator=gen).requires_grad_()

    q, k, v = tensors(heads), tensors(key_heads), tensors(key_heads)
    out = flash_attention(q, k, v, bounds, 1024)
    goal = torch.randn(out.shape, device=out.device, generator=gen)
    grads = torch.autograd.grad((out.float() * goal).sum(), (q, k, v))
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    repeated = [wide[0], *(t.repeat_interleave(heads // key_heads, 1) for t in wide[1:])]
    ref = document_attention(*repeated, bounds).transpose(1, 2)
    ref_grads = torch.autograd.grad((ref * goal).sum(), wide)
    for ours, theirs in zip((out, *grads), (ref, *ref_grads)):
        assert (ours.float() - theirs).norm() / theirs.norm() < 1e-2


def fit(folder, *words):
    """Losses of a run of the demo recipe on the device."""
    command = [sys.executable, "-m", "fengshen.cli.main", "fit", "-c", "demo", "--trainer.max_steps", "60", "--run_dir", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [r["loss"] for r in Run(folder).records("train")], done.stdout


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """The demo's model without dropout, so that runs can be compared."""
    from fengshen.utils.resources import resource

    config = json.loads(resource("fengshen:models/gpt2_demo.json").read_text()) | dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    path = tmp_path_factory.mktemp("config") / "still.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_strategies_agree_in_float32(tmp_path, still):
    words = ["--model.config", still, "--trainer.precision", "32-true", "--export", "false", "--model.attention", "sdpa", "--model.compile", "false"]
    plain, _ = fit(tmp_path / "auto", *words, "--trainer.strategy", "auto")
    assert plain[0] - plain[-1] > 2
    for strategy in ("zero2", "zero3", "zero3_offload"):
        losses, _ = fit(tmp_path / strategy, *words, "--trainer.strategy", strategy)
        assert max(abs(a - b) for a, b in zip(plain, losses)) < 2e-3, strategy


def test_bfloat16_follows_float32_and_exports(tmp_path, still):
    words = ["--trainer.precision", "32-true", "--export", "false", "--trainer.strategy", "auto", "--model.attention", "sdpa"]
    plain, _ = fit(tmp_path / "plain", "--model.config", still, *words)
    for strategy in ("auto", "zero2", "zero3"):
        losses, said = fit(tmp_path / strategy, "--model.config", still, "--trainer.strategy", strategy)
        assert "torch's fused kernel" in said and "verified" in said
        assert abs(plain[0] - losses[0]) < 0.02 and abs(plain[30] - losses[30]) < 0.25, strategy


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_an_adapter_trains_and_validates(tmp_path, still, strategy):
    losses, said = fit(tmp_path / strategy, "--model.config", still, "--trainer.strategy", strategy, "--model.lora.r", "8", "--trainer.max_steps", "6", "--trainer.val_check_interval", "6")
    assert losses and "valid step 6/6" in said and "LoRA: rank 8" in said and "verified" in said


@pytest.mark.parametrize("corpus", ["windows", "packed"])
def test_a_tokenised_corpus_trains_from_pinned_memory(tmp_path, still, corpus):
    from fengshen.data.mmap_dataloader import write_mmap
    from fengshen.data.universal_datamodule import UniversalDataModule
    from fengshen.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("fengshen:tokenizer_demo")
    write_mmap(tmp_path / "poems", tokenizer(["白日依山尽，黄河入海流。" * n for n in range(1, 40)])["input_ids"], vocab_size=len(tokenizer), tokenizer=tokenizer)
    losses, said = fit(tmp_path / corpus, "--model.config", still, "--data.train", str(tmp_path / "poems"), "--data.valid", "null", "--data.corpus", corpus,
                       "--data.on_long", "split", "--trainer.max_steps", "30", "--trainer.strategy", "auto")
    assert losses[0] - losses[-1] > 1 and "compiled blocks = True" in said
    data = UniversalDataModule(str(tmp_path / "poems"), tokenizer=tokenizer, max_length=64, corpus=corpus, on_long="split")
    data.setup("fit")
    loader = data.train_dataloader()
    loader.pin = True
    assert all(v.is_pinned() for v in next(iter(loader)).values() if isinstance(v, torch.Tensor))
