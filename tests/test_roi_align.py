from functools import partial

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from src_snippets.model.roi_align import CellRoIAlign


def test_bins_worked_by_hand():
    maps = {str(k): torch.arange(4.0).repeat(4, 1)[None, None] for k in range(4)}
    box = torch.tensor([[4.0, 0.0, 12.0, 8.0]])  # columns 1 to 3 of the lowest level
    # Bins of one pixel: their samples lie at 1.25 and 1.75, 2.25 and 2.75.
    align = CellRoIAlign(2)
    assert align(maps, [box], [(16, 16)])[0, 0, 0].tolist() == [1.5, 2.5]
    assert align(maps, [box[:0]], [(16, 16)]).shape == (0, 1, 2, 2)


def test_levels_strides_and_mixed_precision():
    torch.manual_seed(0)
    maps = {str(k): torch.randn(2, 4, 256 >> k, 256 >> k, requires_grad=True) for k in range(4)}
    low = torch.rand(2, 30, 2) * 300
    boxes = [*torch.cat([low, low + 8 + torch.rand(2, 30, 2) ** 2 * 700], 2)]
    ours, theirs = CellRoIAlign(7), MultiScaleRoIAlign(list(maps), 7, 2)
    assert (ours.map_levels(boxes).bincount(minlength=4) > 0).all()
    pooled = [align(maps, boxes, [(1024, 1024)] * 2) for align in (ours, theirs)]
    assert torch.allclose(*pooled, atol=1e-5)
    weights = torch.randn_like(pooled[0])
    found, wanted = (torch.autograd.grad((p * weights).sum(), [*maps.values()]) for p in pooled)
    assert all(map(partial(torch.allclose, atol=1e-4), found, wanted))
    with torch.autocast("cpu", torch.bfloat16):
        half = {name: values.bfloat16() for name, values in maps.items()}
        pooled, wanted = (align(half, boxes, [(1024, 1024)] * 2) for align in (ours, theirs))
    assert pooled.dtype == torch.bfloat16
    assert torch.allclose(pooled.float(), wanted.float(), atol=0.01, rtol=0.01)  # one rounding
    pooled.float().sum().backward()
    assert all(values.grad.isfinite().all() for values in maps.values())


@pytest.mark.parametrize("size", [64, 1024])
def test_strides_do_not_depend_on_the_first_image(size):
    align = CellRoIAlign(7)
    maps = {
        str(k): torch.zeros(1, 2, max(size >> k + 2, 1), max(size >> k + 2, 1)) for k in range(4)
    }
    align(maps, [torch.tensor([[0.0, 0.0, 9.0, 9.0]])], [(size - 1, size - 1)])
    assert align.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
