"""Rotary positions in one kernel against the plain formula, forward and backward."""
import pytest
import torch

from fengshen.models.transformer_utils.rotary import RotaryTable, rotary_table, rotate
from fengshen.utils import device
from fengshen.utils.kernels.rotation import can_turn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(device.device_kind() == "cpu", reason="no accelerator here")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [64, 96, 256])
@pytest.mark.parametrize("halves", [False, True])
def test_the_kernel_is_the_formula(halves, width, rows, dtype):
    x = torch.randn(3, 50, 5, width, generator=torch.Generator().manual_seed(0)).to(device.device_kind(), dtype).transpose(1, 2)
    positions = (torch.arange(50) * torch.arange(1, rows + 1)[:, None]).to(x.device)
    assert can_turn(x) and not can_turn(x.cpu())
    table = rotary_table(positions, width, halves, dtype=dtype)
    tables = table, RotaryTable(table.cos.cpu().float(), table.sin.cpu().float(), halves)  # one table: cosines of large angles differ between devices
    results = []
    for source, table in zip((x.clone(), x.float().cpu()), tables):
        source.requires_grad_()
        out = rotate(source, table)
        out.backward(torch.ones_like(out) * torch.linspace(-1, 1, width, device=out.device, dtype=out.dtype))
        assert out.dtype == source.dtype and out.shape == source.shape
        results.append((out.float().cpu(), source.grad.float().cpu()))
    near = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=3e-2)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, **near)
