"""RoIAlign that is fast on CPUs too, with the strides of our FPN."""

# %% [markdown]
# ### RoIAlign on the feature pyramid
# RoIAlign (arXiv:1703.06870) turns the features under each box into a grid of bins. torchvision's
# kernel does it on a GPU; on a CPU, where it would take most of a training step, each bin is one
# weighted sum of 16 features. Both give equal values.

# %%
# @title RoIAlign on all levels of the FPN, quick on a CPU
import torch
from torch import Tensor
import torch.nn.functional as F
from torchvision import ops

from src_snippets.model.backbone import STRIDES


def axis_samples(low: Tensor, high: Tensor, bins: int, limit: int) -> tuple[Tensor, Tensor]:
    """Pixels, int64, and weights (R, bins, 4) of bins along one axis: two samples of two pixels.

    low, high: (R,) edges of boxes, pixels of the features; limit: H or W of the features.
    """
    length = (high - low).clamp(min=1)[:, None, None] / bins  # of a bin
    start = low[:, None, None] + torch.arange(bins, device=low.device)[:, None] * length
    points = start + torch.tensor([0.5, 1.5], device=low.device) * length / 2  # (R, bins, 2)
    inside = (points >= -1) & (points <= limit)
    points = points.clamp(0, limit - 1)
    first = points.floor()
    second_weight = points - first
    pixels = torch.stack([first, (first + 1).clamp(max=limit - 1)], -1).long()
    weights = torch.stack([1 - second_weight, second_weight], -1) * inside[..., None] / 2
    return pixels.view(-1, bins, 4), weights.view(-1, bins, 4)


def roi_align_cpu(features: Tensor, rois: Tensor, bins: int, scale: float) -> Tensor:
    """torchvision's `roi_align(.., sampling_ratio=2)`, equal to rounding and many times as fast.

    features: (B, channels, H, W); rois: (R, 5), index of the image and XYXY in network pixels;
    scale: pixels of the features per network pixel. Returns (R, channels, bins, bins).
    """
    _, channels, height, width = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    x1, y1, x2, y2 = (rois[:, 1:].to(dtype) * scale).unbind(1)
    rows, row_weights = axis_samples(y1, y2, bins, height)
    columns, column_weights = axis_samples(x1, x2, bins, width)
    rows = rows + rois[:, 0, None, None].long() * height
    pixels = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    table = features.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)
    pixels, weights = pixels.reshape(-1, 16), weights.reshape(-1, 16)
    pooled = F.embedding_bag(pixels, table, per_sample_weights=weights, mode="sum")
    return pooled.view(-1, bins, bins, channels).permute(0, 3, 1, 2).to(features.dtype)


class CellRoIAlign(ops.MultiScaleRoIAlign):
    """torchvision's RoIAlign with known strides; it infers them, wrongly from a small image."""

    def __init__(self, bins: int):
        super().__init__([str(level) for level in range(len(STRIDES))], bins, sampling_ratio=2)
        self.scales = [1 / stride for stride in STRIDES]
        self.map_levels = ops.poolers.initLevelMapper(2, 5)  # strides from 2**2 to 2**5

    def forward(self, x, boxes, image_shapes):
        """Feature maps by name and (R, 4) boxes per image -> (R, channels, bins, bins)."""
        if x["0"].is_cuda:
            if x["0"].numel() >= 2**31:  # torchvision's kernel counts in int32
                raise torch.OutOfMemoryError("RoIAlign: out of memory that int32 can count")
            return super().forward(x, boxes, image_shapes)
        rois, levels = ops._utils.convert_boxes_to_roi_format(boxes), self.map_levels(boxes)
        bins, channels = self.output_size[0], x["0"].shape[1]
        pooled = x["0"].new_zeros((len(rois), bins, bins, channels)).permute(0, 3, 1, 2)
        for level, (name, scale) in enumerate(zip(self.featmap_names, self.scales, strict=True)):
            own = torch.where(levels == level)[0]
            pooled[own] = roi_align_cpu(x[name], rois[own], bins, scale)
        return pooled
