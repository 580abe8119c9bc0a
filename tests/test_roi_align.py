from functools import partial

from hypothesis import given, settings, strategies
import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align

from src_snippets.model.roi_align import CellRoIAlign, roi_align_cpu


def gradient(align, features, rois, weights, *options):
    """The gradient of the features for a weighted sum of the pooled values."""
    return torch.autograd.grad((align(features, rois, *options) * weights).sum(), features)[0]


@settings(max_examples=25, deadline=None)
@given(strategies.integers(0, 2**31), strategies.sampled_from((1, 7, 14)), strategies.booleans())
def test_values_and_gradients_are_torchvisions(seed, bins, channels_last):
    """Boxes of less than a pixel, of the whole image, and partly or wholly outside, too."""
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(2, 3, 20, 31).to(memory_format=layout).requires_grad_()
    low, side = torch.rand(40, 2) * 200 - 40, torch.rand(40, 2) ** 3 * 130
    rois = torch.cat([torch.randint(2, (40, 1)).float(), low, low + side], 1)
    ours, theirs = (
        roi_align_cpu(features, rois, bins, 0.25),
        roi_align(features, rois, bins, 0.25, 2),
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
    known = features, rois, torch.randn(40, 3, bins, bins), bins, 0.25
    assert torch.allclose(
        gradient(roi_align_cpu, *known), gradient(roi_align, *known, 2), atol=1e-4
    )


def test_bins_worked_by_hand():
    features = torch.arange(4.0).repeat(4, 1)[None, None]  # the value is the column
    rois = torch.tensor([[0.0, 2.0, 0.0, 6.0, 4.0]])  # columns 1 to 3 at scale 1/2
    # Bins of one pixel: their samples lie at 1.25 and 1.75, 2.25 and 2.75.
    assert roi_align_cpu(features, rois, 2, 0.5)[0, 0, 0].tolist() == [1.5, 2.5]
    assert roi_align_cpu(features, rois[:0], 2, 0.5).shape == (0, 1, 2, 2)


def test_gradcheck_in_double():
    torch.manual_seed(0)
    features = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.3, 2.1, 9.7, 8.8], [1, -3.0, 4.0, 30.0, 7.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: roi_align_cpu(x, rois, 3, 0.5), features)


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
