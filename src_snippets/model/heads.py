"""Mask targets at points, matching by blocks, and RoI heads without image-size masks."""

# %% [markdown]
# ### Match instances and compute the losses
# Parts and losses are torchvision's (`maskrcnn_resnet50_fpn_v2`), so its weights load. Mask targets
# are read from the instance map at points under each box, and boxes are compared block by block.

# %%
# @title Mask targets, matcher, RoI heads
import torch
from torch import Tensor
import torch.nn.functional as F
from torchvision import ops
from torchvision.models import detection

from src_snippets.setup.config import require


@torch.no_grad()
def sample_mask_targets(target, boxes: Tensor, matched: Tensor, size: int, points=4) -> Tensor:
    """What the mask head should predict: (R, M, M) float32, 0..1.

    target: from `training_target`; boxes: (R, 4), XYXY pixels of its `layers`; matched: (R,)
    int64, the instance of each box; size: M; points: per bin and axis.
    """
    layers, ids = target["layers"], target["ids"][matched]
    layer = target["layer_index"][matched]
    height, width = layers.shape[1:]
    steps = (torch.arange(size * points, device=boxes.device) + 0.5) / (size * points)
    masks = []
    for part in torch.arange(len(boxes), device=boxes.device).split(64):  # bounds the memory
        x1, y1, x2, y2 = boxes[part].float()[..., None].unbind(1)
        x = (x1 + (x2 - x1) * steps).long().clamp(0, width - 1)
        y = (y1 + (y2 - y1) * steps).long().clamp(0, height - 1)
        hits = layers[layer[part, None, None], y[:, :, None], x[:, None]] == ids[part, None, None]
        masks.append(F.avg_pool2d(hits[:, None].float(), points)[:, 0])
    return torch.cat(masks)


class BlockMatcher(detection._utils.Matcher):
    """torchvision's `Matcher` without its table of N x A overlaps, gigabytes on a dense image.

    Blocks of anchors are compared with the instances that touch them. Equal to torchvision's, but
    an instance that overlaps no anchor matches none.
    """

    def __call__(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """XYXY instances (N, 4), anchors (A, 4) -> (A,) int64; -1: IoU too low, -2: between."""
        instances, anchors = pair
        values, nearest = anchors.new_zeros(len(anchors)), torch.zeros_like(anchors[:, 0]).long()
        best = [(nearest[:0], nearest[:0], values[:0])]  # instance, its best anchors by block, IoU
        size = max(8192, 2 * 10**7 // max(len(instances), 1)) if anchors.is_cuda else 2048
        for start in range(0, len(anchors), size):
            block = anchors[start : start + size]
            low, high = block[:, :2].amin(0), block[:, 2:].amax(0)
            near = ((instances[:, :2] < high) & (instances[:, 2:] > low)).all(1).nonzero()[:, 0]
            if len(near):
                overlaps = ops.box_iou(instances[near], block)
                values[start : start + size], index = overlaps.max(0)
                nearest[start : start + size] = near[index]
            if len(near) and self.allow_low_quality_matches:
                highest = overlaps.amax(1, keepdim=True)
                row, column = ((overlaps == highest) & (overlaps > 0)).nonzero().unbind(1)
                best.append((near[row], column + start, highest[row, 0]))
        matches = torch.where(values < self.high_threshold, self.BETWEEN_THRESHOLDS, nearest)
        matches[values < self.low_threshold] = self.BELOW_LOW_THRESHOLD
        if self.allow_low_quality_matches:  # the best anchors of an instance, whatever their IoU
            owner, anchor, value = map(torch.cat, zip(*best, strict=True))
            highest = values.new_zeros(len(instances)).scatter_reduce(0, owner, value, "amax")
            anchor = anchor[value == highest[owner]]
            matches[anchor] = nearest[anchor]
        return matches


class CellRoIHeads(detection.roi_heads.RoIHeads):
    """torchvision's RoI heads, with mask targets of `training_target` and bounded memory.

    Boxes are network pixels; the `layers` of the targets may have another resolution.
    """

    def check_targets(self, targets):  # torchvision's asks for masks
        valid = targets and all("layer_index" in target for target in targets)
        require(valid, "A target without layer_index; expected those of training_target.")

    def assign_targets_to_proposals(self, proposals, gt_boxes, gt_labels):
        """Instance and class (R,) int64 of each proposal by image; 0 for the background."""
        matched = [self.proposal_matcher(pair) for pair in zip(gt_boxes, proposals, strict=True)]
        pairs = zip(gt_labels, matched, strict=True)  # index -1, background, reads the padded 0
        labels = [F.pad(classes, (0, 1))[index] for classes, index in pairs]
        return [index.clamp(min=0) for index in matched], labels

    def predict_boxes(self, features, proposals, image_shapes):
        """Class logits (R, C + 1) and box offsets (R, 4C + 4), float32."""
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        return [v.float() for v in self.box_predictor(self.box_head(pooled))]

    def predict_masks(self, features, boxes, image_shapes):
        """Mask logits (R, C + 1, M, M), float32."""
        pooled = self.mask_roi_pool(features, boxes, image_shapes)
        return self.mask_predictor(self.mask_head(pooled)).float()

    def detect_masks(self, features, boxes, labels, image_shapes):
        """Probabilities (R, 1, M, M) of the labels inside the boxes, for each image."""
        chunks = []
        for start in range(0, max(1, *map(len, boxes)), 200):  # bounds the memory
            rois, classes = ([v[start : start + 200] for v in parts] for parts in (boxes, labels))
            logits = self.predict_masks(features, rois, image_shapes)
            chunks.append(detection.roi_heads.maskrcnn_inference(logits, classes))
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def forward(self, features, proposals, image_shapes, targets=None):
        """In training the losses by name, float32 scalars, else torchvision's detections."""
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        prediction = self.predict_boxes(features, proposals, image_shapes)
        losses = detection.roi_heads.fastrcnn_loss(*prediction, labels, offsets)
        losses = dict(zip(("loss_classifier", "loss_box_reg"), losses, strict=True))
        boxes = [box[label > 0] for box, label in zip(proposals, labels, strict=True)]
        matched = [match[label > 0] for match, label in zip(matched, labels, strict=True)]
        logits, mask_targets = self.predict_masks(features, boxes, image_shapes), []
        for target, box, match, shape in zip(targets, boxes, matched, image_shapes, strict=True):
            size = target["layers"].shape[1:]
            box = detection.transform.resize_boxes(box, shape, size)  # to pixels of the layers
            mask_targets.append(sample_mask_targets(target, box, match, logits.shape[-1]))
        labels = torch.cat(labels)
        loss_mask = mask_loss(logits, labels[labels > 0], torch.cat(mask_targets))
        return [], losses | dict(loss_mask=loss_mask)


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of each box's own class; 0 where there are no boxes.

    logits: (R, C + 1, M, M); labels: (R,) int64, 1..C; targets: (R, M, M) float32, 0..1.
    """
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, targets, reduction="sum") / max(own.numel(), 1)
