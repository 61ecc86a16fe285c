"""torch's allocator grows its segments, whoever has spoken to the device before."""

import os

import pytest
import torch

from fengshen.utils import device

GROW = "expandable_segments:True"


@pytest.mark.parametrize("initialized, own, told", [(False, None, []), (True, None, [GROW]), (True, "PYTORCH_ALLOC_CONF", []), (True, "PYTORCH_CUDA_ALLOC_CONF", [])])
def test_the_allocator_hears_of_growing_segments(monkeypatch, initialized, own, told):
    "By the environment; by itself too where a library has spoken to the device while it was imported; and not where the user has said something."
    said, environment = [], {own: "max_split_size_mb:64"} if own else {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(device, "device_kind", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    device.avoid_fragmentation()
    device.avoid_fragmentation()
    assert said == told
    assert environment == ({own: "max_split_size_mb:64"} if own else {"PYTORCH_CUDA_ALLOC_CONF": GROW})
