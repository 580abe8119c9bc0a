"""What `run.py` measures: each case does the same work the stock way and ours.

A case is a function of `side` that prepares its input and returns the function to time. `stock` is
torchvision's and pycocotools' public functions as their tutorials use them: one boolean mask an
instance, `COCOeval`.
"""

import atexit
from collections.abc import Callable
from contextlib import redirect_stdout
import io
from pathlib import Path
import shutil
import tempfile

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
import pycocotools.mask
import tifffile
import torch
from torchvision import tv_tensors
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops import box_iou, masks_to_boxes
from torchvision.transforms import v2

from src_snippets.config import recipe
from src_snippets.evaluate import average_precision, coco_results
from src_snippets.forms import coco_truth, Instances
from src_snippets.model import BlockMatcher, mask_targets, paste_masks
from src_snippets.readers import read_cell_folder, read_image
from src_snippets.transforms import augment_sample, augmentation, training_target
from tests.conftest import jittered, make_sample, SHARED_DATA


def real_folder() -> Path:
    """The real HW3 training folder: 161 cells on 397 x 482 px."""
    return SHARED_DATA / "hw3-real" / "train" / "sample"


def tiled_folder(times: int) -> Path:
    """The real folder laid side by side `times` x `times`, with ids of its own for each copy."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    for path in sorted(real_folder().glob("*.tif")):
        if path.name == "image.tif":
            image = np.tile(np.moveaxis(read_image(path), 0, 2), (times, times, 1))
            tifffile.imwrite(folder / path.name, image, photometric="rgb", compression="lzw")
            continue
        ids = tifffile.imread(path)
        rows = []
        for row in range(times):
            shifts = [(row * times + column) * 1000 for column in range(times)]
            rows.append(np.hstack([ids + shift * (ids > 0) for shift in shifts]))
        tifffile.imwrite(folder / path.name, np.vstack(rows))
    return folder


# One training sample: read, augment, targets


def read_dense(folder: Path):
    """Image and one boolean mask an instance, as torchvision's tutorial reads them."""
    image = torch.from_numpy(tifffile.imread(folder / "image.tif")[..., :3].copy()).permute(2, 0, 1)
    masks, labels = [], []
    for path in sorted(folder.glob("class*.tif")):
        ids = torch.from_numpy(tifffile.imread(path))
        values = ids.unique()[1:]
        masks.append(ids == values[:, None, None])
        labels += [int(path.stem[5:])] * len(values)
    return tv_tensors.Image(image), torch.cat(masks), torch.tensor(labels)


def stock_sample(folder: Path, crop: int) -> Callable:
    chain = v2.Compose(
        [
            v2.ScaleJitter((crop, crop), (0.8, 1.25)),
            v2.RandomCrop((crop, crop), pad_if_needed=True),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ColorJitter(0.2, 0.2, 0.2, 0.05),
            v2.SanitizeBoundingBoxes(),
        ]
    )

    def work():
        image, masks, labels = read_dense(folder)
        boxes = tv_tensors.BoundingBoxes(
            masks_to_boxes(masks), format="XYXY", canvas_size=image.shape[-2:]
        )
        return chain(image, {"boxes": boxes, "labels": labels, "masks": tv_tensors.Mask(masks)})

    return work


def training_sample(side: str, times: int) -> Callable:
    """Read, augment and derive the targets of a field of 161 x times^2 cells."""
    folder, crop = tiled_folder(times), 512
    if side == "stock":
        return stock_sample(folder, crop)
    if side == "decode":
        return lambda: [tifffile.imread(path) for path in sorted(folder.glob("*.tif"))]
    chain = augmentation(recipe("baseline", crop=crop, blur=0.0))
    return lambda: training_target(augment_sample(read_cell_folder(folder, 4), chain), 4)


# Mask targets


def box_targets(side: str) -> Callable:
    """Mask targets of 128 boxes on a field of 644 cells, 794 x 964 px."""
    sample = read_cell_folder(tiled_folder(2), 4)
    target = training_target(sample, 1)
    torch.manual_seed(0)
    matched = torch.randint(len(target["ids"]), (128,))
    boxes = target["boxes"][matched] + torch.randn(128, 4)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    if side == "ours":
        return lambda: mask_targets(target, boxes, matched, 28, True)
    ids = torch.arange(1, len(sample.labels) + 1)[:, None, None]
    masks = (sample.layers == ids).to(torch.uint8)  # the stock target; made before the clock runs
    return lambda: project_masks_on_boxes(masks, boxes, matched, 28)


# Anchors matched to cells


def matching(side: str) -> Callable:
    """1,449 cells and the anchors of a 1024 px crop, 8 px and larger: 261,888 of them."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1449, 2, generator=generator) * 990
    cells = torch.cat([corner, corner + 8 + 24 * torch.rand(1449, 2, generator=generator)], 1)
    config = recipe("baseline")
    sizes = tuple((size,) for size in config.anchor_sizes)
    levels = [torch.zeros(1, 1, 1024 // s, 1024 // s) for s in (4, 8, 16, 32, 64)]
    images = ImageList(torch.zeros(1, 3, 1024, 1024), [(1024, 1024)])
    (anchors,) = AnchorGenerator(sizes, (config.anchor_ratios,) * 5)(images, levels)
    if side == "ours":
        return lambda: BlockMatcher(0.7, 0.3, allow_low_quality_matches=True)((cells, anchors))
    stock = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    return lambda: stock(box_iou(cells, anchors))


# Detections to run lengths


def paste(side: str, count: int, height: int, width: int) -> Callable:
    """Predicted 28 x 28 masks of `count` cells of 10 to 40 px to COCO RLEs."""
    torch.manual_seed(0)
    corner = torch.rand(count, 2) * torch.tensor([width - 41, height - 41])
    boxes = torch.cat([corner, corner + 10 + 30 * torch.rand(count, 2)], 1)
    masks = torch.nn.functional.avg_pool2d(torch.rand(count, 1, 28, 28), 9, 1, 4)
    if side == "ours":
        return lambda: paste_masks(masks[:, 0], boxes, (height, width), 0.5, True)

    def work():
        pasted = paste_masks_in_image(masks, boxes, (height, width))[:, 0] >= 0.5
        dense = np.asfortranarray(pasted.permute(1, 2, 0).numpy(), dtype=np.uint8)
        return pycocotools.mask.encode(dense)

    return work


# Average precision


def random_truth(images: int, cells: int, size: int) -> dict:
    """Fields of `cells` square cells on a grid."""
    side = int(np.ceil(np.sqrt(cells)))
    step = size // side
    numbers = np.arange(1, side * side + 1).reshape(side, side)
    ids = np.where(numbers <= cells, numbers, 0).repeat(step, 0).repeat(step, 1)
    ids[::step] = 0
    ids[:, ::step] = 0
    samples = [make_sample([ids], [1 + k % 4]) for k in range(images)]
    return coco_truth(samples, 4)


def ap(side: str, images: int, cells: int) -> Callable:
    """AP of `images` fields with about `cells` detections each, 100 and uncapped."""
    truth = random_truth(images, cells, 512)
    answers: dict[int, Instances] = jittered(truth)
    if side == "ours":
        return lambda: average_precision(truth, answers)
    results = coco_results(answers)

    def work():
        with redirect_stdout(io.StringIO()):
            side_truth = COCO()
            side_truth.dataset = truth
            side_truth.createIndex()
            evaluator = COCOeval(side_truth, side_truth.loadRes(results), "segm")
            evaluator.params.maxDets = [1, 100, 1000]
            evaluator.evaluate()
            evaluator.accumulate()
        return evaluator

    return work
