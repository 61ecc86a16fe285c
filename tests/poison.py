"""Losses, modules and data that go wrong where a test wants it: for the token of 血, which one line of `marked_pairs` has for its answer."""
import json
import math
import time

import torch

from fengshen.data.task_dataloader.datamodule import ConversationDataModule
from fengshen.losses import cross_entropy
from fengshen.training.module import LanguageModelModule
from tests.training_runs import uneven_pairs

MARK, LINE = 509, 13  # 血 in the packaged tokenizer; counted from 1


def marked_pairs(path, count=40, line=LINE):
    "A file of pairs; the answer of one line is 血."
    lines = open(uneven_pairs(path, count), encoding="utf8").read().splitlines()
    lines[line - 1] = json.dumps(dict(question="血", answer="血"), ensure_ascii=False)
    open(path, "w", encoding="utf8").write("\n".join(lines) + "\n")
    return str(path)


def plain(logits, labels):
    "The good loss, computed chunk by chunk as those that go wrong are: by its own name it comes in one with the head, and rounds otherwise."
    return cross_entropy(logits, labels)


def nan_loss(logits, labels):
    "NaN for the mark, by a constant: its gradient would be that of the good loss."
    loss = cross_entropy(logits, labels)
    return loss + torch.where(labels == MARK, math.nan, 0.0)


def infinite_loss(logits, labels):
    "Infinite for the mark, by a constant."
    return cross_entropy(logits, labels) + torch.where(labels == MARK, math.inf, 0.0)


def nan_gradient(logits, labels):
    "The good loss; but where a micro-batch holds the mark, its gradient is NaN."
    loss = cross_entropy(logits, labels)
    return loss + torch.sqrt(0 * loss) if (labels == MARK).any() else loss


def always_nan(logits, labels):
    return cross_entropy(logits, labels) * math.nan


def high(logits, labels):
    "Fifty nats more for the mark."
    return cross_entropy(logits, labels) + 50.0 * (labels == MARK)


damage = None  # A file that `damaging` cuts short


def damaging(logits, labels):
    "NaN for the mark, after cutting the file `damage` in half, which another thread may still be writing."
    if (labels == MARK).any():
        until = time.monotonic() + 60
        while not damage.exists():
            assert time.monotonic() < until, f"{damage} was not written"
            time.sleep(0.01)
        damage.write_bytes(damage.read_bytes()[: damage.stat().st_size // 2])
    return nan_loss(logits, labels)


def hungry(logits, labels):
    "Wants more memory than there is for more scored tokens than two samples have."
    if len(labels) > 125:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB.")
    return cross_entropy(logits, labels)


class WithoutStep(LanguageModelModule):
    "Leaves out the update of the step whose samples hold the mark, with good gradients, and knows nothing of guards."

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.marked:
            self.zero_grad(set_to_none=True)
        self.marked = False

    def training_step(self, batch, batch_idx):
        self.marked = getattr(self, "marked", False) or bool((batch["labels"] == MARK).any())
        return super().training_step(batch, batch_idx)


class OtherRate(LanguageModelModule):
    "Somebody writes another learning rate into the optimizer before the fourth step."

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = 0.123


class CutOff(LanguageModelModule):
    "The loss does not reach the weights."

    def token_loss(self, batch, observe=None):
        loss = super().token_loss(batch, observe)
        return loss * 0 + loss.detach()


class SlowData(ConversationDataModule):
    "Making a batch takes 80 ms: far longer than its step, also on a busy machine."

    def collate(self, samples, rows=1):
        time.sleep(0.08)
        return super().collate(samples, rows)


class SilentData(ConversationDataModule):
    "The samples of two lines have no scored token."

    def setup(self, stage=None):
        super().setup(stage)
        data = self.sets["train"]
        data.scored = data.scored.copy()
        for line in (LINE, 30):
            i = data.line.tolist().index(line)
            data.scored[data.offsets[i] : data.offsets[i + 1]] = 0
