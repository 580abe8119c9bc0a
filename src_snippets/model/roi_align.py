"""RoIAlign with the strides of our FPN."""

# %% [markdown]
# ### Cut features under boxes
# RoIAlign (arXiv:1703.06870) turns the features under each box into a grid of bins, on the level of
# the FPN that suits the size of the box. It is torchvision's, with strides that are set: otherwise
# they are inferred from the first image, and wrongly from a small one.

# %%
# @title RoIAlign on all levels of the FPN
from torchvision import ops

from src_snippets.model.backbone import STRIDES


class CellRoIAlign(ops.MultiScaleRoIAlign):
    """Feature maps "0".."3", boxes (R, 4) of each image -> (R, channels, bins, bins)."""

    def __init__(self, bins: int):
        super().__init__([str(level) for level in range(len(STRIDES))], bins, sampling_ratio=2)
        self.scales = [1 / stride for stride in STRIDES]
        self.map_levels = ops.poolers.initLevelMapper(2, 5)  # strides from 2**2 to 2**5
