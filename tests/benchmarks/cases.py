"""The work that `run.py` measures, done by torchvision's and pycocotools' functions and by ours.

A case is a function of `side` and `device` that prepares its input and returns the function to
time; numbers which that returns go into the table. `baseline` is what the tutorials of torchvision
and pycocotools do: one boolean mask per instance, `COCOeval`.
"""

import atexit
from collections.abc import Callable
from contextlib import redirect_stdout
import io
import json
from pathlib import Path
import shutil
import tempfile
import time

from accelerate.utils import send_to_device
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
import pycocotools.mask
import tifffile
import timm
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import box_iou, masks_to_boxes, MultiScaleRoIAlign
from torchvision.transforms import v2

from src_snippets.data.images import read_image
from src_snippets.data.layouts import ImageRecord
from src_snippets.data.structures import (
    CellSample,
    coco_annotations,
    coco_ground_truth,
)
from src_snippets.data.transforms import build_augmentation, collate, training_target, TrainingSet
from src_snippets.inference.predict import predict_image
from src_snippets.model.detect import paste_masks
from src_snippets.model.heads import BlockMatcher, sample_mask_targets
from src_snippets.model.mask_rcnn import build_model, InputTransform, to_device
from src_snippets.model.roi_align import CellRoIAlign
from src_snippets.setup.config import Config, make_config
from src_snippets.setup.devices import autocast_for, choose_precision
from src_snippets.training.metrics import average_precision
from src_snippets.training.trainer import build_optimizer, Trainer, training_loader
from tests.conftest import (
    cell_folder_reader,
    jittered,
    make_sample,
    read_cell_folder,
    SHARED_DATA,
)

CLASSES = {k: f"class{k}" for k in range(1, 5)}


def new_folder() -> Path:
    """An empty folder that lives as long as the process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def real_folder() -> Path:
    """The real HW3 training folder: 161 instances on 397 x 482 px."""
    return SHARED_DATA / "hw3-real" / "train" / "sample"


def tiled_folder(times: int) -> Path:
    """The real image laid side by side `times` x `times`, each copy with ids of its own."""
    folder = new_folder() / "train" / "sample"
    folder.mkdir(parents=True)
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
    """Image and one boolean mask per instance, as torchvision's tutorial reads them."""
    image = torch.from_numpy(tifffile.imread(folder / "image.tif")[..., :3].copy()).permute(2, 0, 1)
    masks, labels = [], []
    for path in sorted(folder.glob("class*.tif")):
        ids = torch.from_numpy(tifffile.imread(path))
        values = ids.unique()[1:]
        masks.append(ids == values[:, None, None])
        labels += [int(path.stem[5:])] * len(values)
    return tv_tensors.Image(image), torch.cat(masks), torch.tensor(labels)


def baseline_sample(folder: Path, crop: int) -> Callable:
    """A function that reads and augments the folder as torchvision's tutorials do."""
    chain = v2.Compose(
        [
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


def colour(side: str, device: str) -> Callable:
    """Random brightness, contrast and saturation; in the baseline's tutorial hue too."""
    crop = tv_tensors.Image(torch.randint(0, 256, (3, 512, 512), dtype=torch.uint8))
    change = v2.ColorJitter(0.2, 0.2, 0.2, 0.05)
    if side == "ours":
        chain = build_augmentation(make_config("baseline")).transforms
        (change,) = (step for step in chain if isinstance(step, v2.ColorJitter))

    def work():
        change(crop)

    return work


def training_sample(side: str, device: str, times: int) -> Callable:
    """Read, augment and derive the targets of an image of 161 x times^2 instances."""
    folder, crop = tiled_folder(times), 512
    if side == "baseline":
        return baseline_sample(folder, crop)
    if side == "decode":
        return lambda: [tifffile.imread(path) for path in sorted(folder.glob("*.tif"))]
    config = make_config("baseline", crop=crop, batch_size=1)  # 1: no mosaic
    if side == "cached":
        samples = TrainingSet([read_cell_folder(folder, 4)], config)
        return lambda: samples[0]
    read = cell_folder_reader(folder, 4)
    return lambda: TrainingSet([read()], config)[0]


def padding(side: str, device: str, batch: int) -> Callable:
    """100 batches of crops from images of 50 real sizes: how much of them is padding?"""
    known = json.loads((SHARED_DATA / "hw3-real" / "masks50_coco.json").read_text())
    samples = []
    for size in ((image["height"], image["width"]) for image in known["images"]):
        white = torch.full((3, *size), 255, dtype=torch.uint8)
        layers = torch.zeros((1, *size), dtype=torch.int16)
        samples.append(CellSample(white, layers, torch.zeros(0, dtype=torch.int64)))
    # Mosaics fill up the crops of batches of two or more; the baseline pads to the largest.
    config = make_config("baseline", color_jitter=0.0, batch_size=1 if side == "baseline" else 2)
    crops = TrainingSet(samples, config)

    def work():
        torch.manual_seed(0)
        fractions = []
        for _ in range(100):
            chosen = torch.randint(len(samples), (batch,)).tolist()
            images = [crops.augmented(index).image for index in chosen]
            height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
            white = sum(int((image[0] == 255).sum()) for image in images)
            fractions.append(1 - white / (batch * height * width))
        return {
            "padding % mean": 100 * sum(fractions) / len(fractions),
            "padding % worst": 100 * max(fractions),
        }

    return work


# Mask targets


def box_targets(side: str, device: str) -> Callable:
    """Mask targets of 128 boxes on an image of 644 instances, 794 x 964 px."""
    sample = read_cell_folder(tiled_folder(2), 4)
    target = training_target(sample)
    torch.manual_seed(0)
    matched = torch.randint(len(target["ids"]), (128,))
    boxes = target["boxes"][matched] + torch.randn(128, 4)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    boxes, matched = boxes.to(device), matched.to(device)
    target = {key: value.to(device) for key, value in target.items()}
    if side == "ours":
        return lambda: sample_mask_targets(target, boxes, matched, 28)
    ids = torch.arange(1, len(sample.labels) + 1, device=device)[:, None, None]
    masks = (target["layers"] == ids).to(torch.uint8)  # made before the clock runs
    return lambda: project_masks_on_boxes(masks, boxes, matched, 28)


# RoIAlign and its gradient


def pooling(side: str, device: str, count: int, channels: int, size: int) -> Callable:
    """Features of `count` boxes of 8 to 60 px on two images of `size` px, and their gradients."""
    torch.manual_seed(0)
    maps = {}
    for level in range(4):
        shape = (2, channels, size // 4 >> level, size // 4 >> level)
        maps[str(level)] = torch.randn(shape).to(device, memory_format=torch.channels_last)
    maps["0"].requires_grad_()  # the level of all these boxes
    low, sides = torch.rand(count, 2) * (size - 60), 8 + 52 * torch.rand(count, 2)
    boxes = list(torch.cat([low, low + sides], 1).to(device).chunk(2))
    levels = [str(level) for level in range(4)]
    align = CellRoIAlign(14) if side == "ours" else MultiScaleRoIAlign(levels, 14, 2)

    def work():
        pooled = align(maps, boxes, [(size, size)] * 2)
        torch.autograd.grad(pooled.sum(), maps["0"])

    return work


# Anchors matched to instances


def matching(side: str, device: str, count: int) -> Callable:
    """`count` instances and the anchors of a 1024 px crop, 8 px and larger: 261,888 of them."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 990
    boxes = torch.cat([corner, corner + 8 + 24 * torch.rand(count, 2, generator=generator)], 1)
    config = make_config("baseline")
    sizes = tuple((size,) for size in config.anchor_sizes)
    levels = [torch.zeros(1, 1, 1024 // s, 1024 // s) for s in (4, 8, 16, 32, 64)]
    images = ImageList(torch.zeros(1, 3, 1024, 1024), [(1024, 1024)])
    (anchors,) = AnchorGenerator(sizes, (config.anchor_ratios,) * 5)(images, levels)
    boxes, anchors = boxes.to(device), anchors.to(device)
    if side == "ours":
        ours = BlockMatcher(0.7, 0.3, allow_low_quality_matches=True)
        return lambda: {"matched": int((ours((boxes, anchors)) >= 0).sum())}
    baseline = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    return lambda: {"matched": int((baseline(box_iou(boxes, anchors)) >= 0).sum())}


# Detections to RLE


def predicted_masks(count: int, height: int, width: int, device: str):
    """Boxes of `count` instances of 10 to 40 px and blurred noise as their 28 x 28 masks."""
    torch.manual_seed(0)
    corner = torch.rand(count, 2) * torch.tensor([width - 41, height - 41])
    boxes = torch.cat([corner, corner + 10 + 30 * torch.rand(count, 2)], 1)
    masks = torch.nn.functional.avg_pool2d(torch.rand(count, 1, 28, 28), 9, 1, 4)
    return boxes.to(device), masks.to(device)


def encode_dense(masks: torch.Tensor) -> list[dict]:
    """COCO RLEs of (N, H, W) booleans."""
    return pycocotools.mask.encode(
        np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy(), np.uint8)
    )


def paste(side: str, device: str, count: int, height: int, width: int) -> Callable:
    """Predicted 28 x 28 masks of `count` instances of 10 to 40 px to COCO RLEs."""
    boxes, masks = predicted_masks(count, height, width, device)
    if side == "ours":
        return lambda: paste_masks(masks[:, 0], boxes, (height, width), 0.5)
    return lambda: encode_dense(paste_masks_in_image(masks, boxes, (height, width))[:, 0] >= 0.5)


# Average precision


def grid_of_cells(images: int, cells: int, size: int) -> dict:
    """COCO ground truth of images with `cells` square instances on a grid."""
    side = int(np.ceil(np.sqrt(cells)))
    step = size // side
    numbers = np.arange(1, side * side + 1).reshape(side, side)
    ids = np.where(numbers <= cells, numbers, 0).repeat(step, 0).repeat(step, 1)
    ids[::step] = 0
    ids[:, ::step] = 0
    samples = [make_sample([ids], [1 + k % 4]) for k in range(images)]
    return coco_ground_truth(samples, CLASSES)


def ap(side: str, device: str, images: int, cells: int) -> Callable:
    """AP of `images` images with about `cells` detections each, 100 and uncapped."""
    known = grid_of_cells(images, cells, 512)
    predictions = jittered(known)
    if side == "ours":
        return lambda: {"AP": average_precision(known, predictions)["AP_100"]}
    results = coco_annotations(predictions, [kind["id"] for kind in known["categories"]])

    def work():
        with redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = known
            coco.createIndex()
            evaluator = COCOeval(coco, coco.loadRes(results), "segm")
            evaluator.params.maxDets = [100, 1000]  # as ours: two caps, one range of areas
            evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluator.evaluate()
            evaluator.accumulate()
        table = evaluator.eval["precision"][:, :, :, 0, 0]
        return {"AP": float(table[table > -1].mean())}

    return work


# A training epoch


def benchmark_config(device: str, **changes) -> Config:
    """The recipe a device is measured with, from random weights: nothing is downloaded."""
    name = "demo" if device == "cpu" else "baseline"
    return make_config(name, **dict(weights="none", score_threshold=0.05) | changes)


def baseline_model(config: Config, device: str) -> MaskRCNN:
    """torchvision's Mask R-CNN with the backbone, heads and thresholds of the settings."""
    ours = build_model(config).to(memory_format=torch.contiguous_format)
    sizes = tuple((size,) for size in config.anchor_sizes)
    model = MaskRCNN(
        ours.backbone,
        min_size=round(config.scale * config.crop),
        max_size=100_000,
        image_mean=ours.backbone.mean,
        image_std=ours.backbone.std,
        rpn_anchor_generator=AnchorGenerator(sizes, (config.anchor_ratios,) * 5),
        rpn_head=RPNHead(config.fpn_channels, len(config.anchor_ratios), config.rpn_convs),
        box_head=ours.roi_heads.box_head,
        box_predictor=ours.roi_heads.box_predictor,
        box_score_thresh=config.score_threshold,
        box_nms_thresh=config.box_nms,
        box_detections_per_img=config.detections,
        box_batch_size_per_image=config.roi_batch_size,
        mask_head=ours.roi_heads.mask_head,
        mask_predictor=ours.roi_heads.mask_predictor,
        **{
            f"rpn_{when}_nms_top_n_{part}": config.proposals
            for when in ("pre", "post")
            for part in ("train", "test")
        },
    )
    model.rpn.head.load_state_dict(ours.rpn.head.state_dict())
    return model.to(device)


class BaselineSet(Dataset):
    """A folder read `count` times per epoch, one boolean mask per instance."""

    def __init__(self, folder: Path, count: int, crop: int):
        self.count, self.sample = count, baseline_sample(folder, crop)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image, target = self.sample()
        return image / 255, target


def waited(batches, spent: list):
    """Yields batches; appends to `spent` the seconds that each was waited for."""
    batches = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        spent.append(time.perf_counter() - start)
        if batch is None:
            return
        yield batch


def baseline_epoch(model, loader, device: str, precision: str) -> None:
    """One pass as in torchvision's detection reference, without clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    model.train()
    for images, targets in loader:
        images = [image.to(device) for image in images]
        targets = [{key: value.to(device) for key, value in t.items()} for t in targets]
        with torch.autocast(device, dtype, enabled=precision != "no"):
            losses = model(images, targets)
            total = sum(losses.values())
        assert torch.isfinite(total)
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()


class Counted(list):
    """Samples with their counts by image and class, as `CellSamples` has them."""

    def __init__(self, samples, classes: int):
        super().__init__(samples)
        labels = [sample.labels[sample.labels > 0].numpy() for sample in self]
        self.counts = np.stack([np.bincount(own, minlength=classes + 1) for own in labels])


def counted_subset(samples, classes: int = 4) -> Subset:
    """Drawn samples as a trainer expects them."""
    return Subset(Counted(samples, classes), range(len(samples)))


def new_trainer(config: Config, samples) -> Trainer:
    """A trainer in a folder of its own, ready for steps."""
    samples = counted_subset(samples, config.num_classes)
    trainer = Trainer(config, samples, [], new_folder())
    loader = training_loader(samples, config, config.batch_size)
    trainer.loader = trainer.accelerator.prepare(loader)
    trainer.max_steps = trainer.total_steps = 1000
    trainer.model.train()
    trainer.good_statistics = [values.clone() for values in trainer.statistics()]
    return trainer


def training(side: str, device: str, times: int) -> Callable:
    """An epoch of 8 images (64 on a GPU) of 161 x times^2 instances.

    The baseline reads each from its files, ours from memory, as in any epoch after the first.
    """
    folder, count = tiled_folder(times), 8 if device == "cpu" else 64
    config = benchmark_config(device, lr=1e-4)
    spent = []
    if side == "baseline":
        model = baseline_model(config, device)
        data = BaselineSet(folder, count, config.crop)
        workers = 0 if device == "cpu" else 4
        loader = DataLoader(data, config.batch_size, True, num_workers=workers, collate_fn=collate)
        precision = choose_precision(config, torch.device(device))

        def epoch():
            baseline_epoch(model, waited(loader, spent), device, precision)
    else:
        trainer = new_trainer(config, [read_cell_folder(folder, 4)] * count)

        def epoch():
            for images, targets in waited(trainer.loader, spent):
                trainer.step(images, targets)

    def work():
        spent.clear()
        start = time.perf_counter()
        epoch()
        seconds = time.perf_counter() - start
        return {"images/s": count / seconds, "waits for data %": 100 * sum(spent) / seconds}

    return work


# A test set


def synthetic_test_set(step: int) -> list[ImageRecord]:
    """Every `step`-th image of the real test mapping, the real image repeated to its size."""
    folder = new_folder()
    path = SHARED_DATA / "hw3-real" / "test_image_name_to_ids.json"
    real = np.moveaxis(read_image(real_folder() / "image.tif"), 0, 2)
    records = []
    for row in json.loads(path.read_text())[::step]:
        size = (row["height"], row["width"])
        tiles = [-(-side // length) for side, length in zip(size, real.shape, strict=False)]
        image = np.tile(real, (*tiles, 1))[: size[0], : size[1]]
        tifffile.imwrite(folder / row["file_name"], image, photometric="rgb", compression="lzw")
        records.append(ImageRecord(folder / row["file_name"], row["id"], *size))
    return records


@torch.inference_mode()
def baseline_results(model, records: list[ImageRecord], config: Config, device: str) -> list[dict]:
    """COCO results as the tutorials make them."""
    rows = []
    for record in records:
        image = torch.from_numpy(tifffile.imread(record.path)).permute(2, 0, 1) / 255
        model.transform.min_size = (round(min(image.shape[1:]) * config.scale),)
        (found,) = model([image.to(device)])
        masks = found["masks"][:, 0] >= config.mask_threshold
        for rle, box, score, label in zip(
            encode_dense(masks),
            found["boxes"].tolist(),
            found["scores"].tolist(),
            found["labels"].tolist(),
            strict=True,
        ):
            x1, y1, x2, y2 = box
            rows.append(
                dict(
                    image_id=record.image_id,
                    category_id=label,
                    segmentation=rle | {"counts": rle["counts"].decode()},
                    score=score,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                )
            )
    return rows


def inference(side: str, device: str, step: int, detections: int) -> Callable:
    """Reads every `step`-th image of the test set, predicts it and writes the JSON."""
    records, path = synthetic_test_set(step), new_folder() / "results.json"
    config = benchmark_config(device, detections=detections)
    build = baseline_model if side == "baseline" else lambda *_: to_device(build_model(config))
    model = build(config, device).eval()

    def work():
        start = time.perf_counter()
        if side == "baseline":
            rows = baseline_results(model, records, config, device)
        else:
            predictions = {}
            for record in records:
                image = torch.from_numpy(read_image(record.path))
                predictions[record.image_id] = predict_image([model], image, config)
            rows = coco_annotations(predictions, range(1, config.num_classes + 1))
        path.write_text(json.dumps(rows))
        seconds = time.perf_counter() - start
        return {"images/s": len(records) / seconds, "detections": len(rows)}

    return work


# A single choice: here `baseline` is ours without it


def training_steps(config: Config, device: str, change: Callable) -> Callable:
    """Four training steps on a batch of the real image; `change` gives model and optimizer."""
    parts = counted_subset([read_cell_folder(real_folder(), 4)] * config.batch_size)
    samples = TrainingSet(parts, config)
    torch.manual_seed(0)
    images, targets = collate([samples[index] for index in range(len(samples))])
    for target in targets:
        del target["name"]
    images, targets = send_to_device((images, targets), device)
    model = to_device(build_model(config))
    model, optimizer = change(model.train(), build_optimizer(model, config))

    def work():
        for _ in range(4):
            optimizer.zero_grad()
            with autocast_for(config, torch.device(device)):
                losses = model(images, targets)
            sum(losses.values()).backward()
            optimizer.step()

    return work


def step_layout(side: str, device: str) -> Callable:
    """`training_steps` with and without our layout and AdamW."""

    def change(model, optimizer):
        if side == "baseline":
            model = model.to(memory_format=torch.contiguous_format)
            model.transform.batch_images = super(InputTransform, model.transform).batch_images
            optimizer = torch.optim.AdamW(optimizer.param_groups)
            for group in optimizer.param_groups:
                group["fused"] = None
        return model, optimizer

    return training_steps(benchmark_config(device, precision="no"), device, change)


def step_norms(side: str, device: str, baseline: str) -> Callable:
    """`training_steps` of recipe `light` with frozen norms; baseline: "live" or those of "timm"."""

    def change(model, optimizer):
        if side == "baseline" and baseline == "timm":
            model.backbone.body = timm.layers.freeze_batch_norm_2d(model.backbone.body)
        return model, optimizer

    norm = "batch" if side == "baseline" else "frozen"
    precision = "bf16" if device == "cpu" else "auto"
    config = make_config("light", weights="none", precision=precision, norm=norm)
    return training_steps(config, device, change)


# How cost grows


def grid_sample(cells: int, size: int) -> CellSample:
    """An image with square instances of at most 20 px on a grid."""
    side = int(np.ceil(np.sqrt(cells)))
    places = np.arange(cells)
    pitch = size // side
    length = min(pitch - 1, 20)
    ids = np.zeros((size, size), np.int32)
    for number, (row, column) in enumerate(zip(*divmod(places, side), strict=True), start=1):
        top, left = row * pitch, column * pitch
        ids[top : top + length, left : left + length] = number
    return make_sample([ids], [1])


def there_and_back(side: str, device: str, cells: int, size: int) -> Callable:
    """Instance map to mask targets of 128 boxes, and `cells` predicted masks to RLE.

    These are the four places where the baseline makes one mask per instance at image size.
    """
    sample = grid_sample(cells, size)
    torch.manual_seed(0)
    matched = torch.randint(cells, (128,))
    boxes, masks = predicted_masks(cells, size, size, device)

    def ours():
        target = training_target(sample)
        sample_mask_targets(target, target["boxes"][matched], matched, 28)
        paste_masks(masks[:, 0], boxes, (size, size), 0.5)

    def baseline():
        dense = sample.layers == torch.arange(1, cells + 1)[:, None, None]
        tight = masks_to_boxes(dense)
        project_masks_on_boxes(dense.to(torch.uint8), tight[matched], matched, 28)
        encode_dense(paste_masks_in_image(masks, boxes, (size, size))[:, 0] >= 0.5)

    return ours if side == "ours" else baseline
