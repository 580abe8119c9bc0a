"""AP50 against time, ours and stock: `python tests/benchmarks/race.py --data DIR --minutes 10`.

Stock is torchvision's pipeline as its tutorial has it: whole fields read from their files in every
epoch, one boolean mask a cell, flips, resized to 800 px, torchvision's anchors, 100 detections. It
has the trunk, heads, optimiser and schedule of the recipe, the same first weights, and answers from
a score of 0.05 on. Each point is a training of its own with a schedule that ends there; ours gets a
tenth, a fifth and half of the minutes. Looks at the validation part do not count. On a CPU the
minutes are those of its cores: see `timed.py`. Results go to `race.json` below `--out`, where what
is there already is not measured again.
"""

from dataclasses import replace
from functools import partial
import math
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[2]))

from matplotlib.figure import Figure
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from src_snippets import train
from src_snippets.config import Config
from src_snippets.datasets import CellSamples, choose_splits, pick
from src_snippets.evaluate import average_precision
from src_snippets.forms import coco_truth
from src_snippets.model import choose_precision, to_instances
from src_snippets.predict import answer_samples
from src_snippets.processes import default_device
from src_snippets.train import by_image_id, fit, load_trained, rate_factor
from src_snippets.transforms import collate
from tests.benchmarks.cases import read_dense, stock_model
from tests.benchmarks.timed import (
    choose_clock,
    command_line,
    for_classes,
    Kept,
    read_samples,
    timed_settings,
)

SHARES = {"stock": (0.2, 1.0), "ours": (0.1, 0.2, 0.5)}  # of the minutes


class WholeFields(Dataset):
    """Training folders with one boolean mask a cell, flipped; those without cells are left out."""

    chain = v2.Compose(
        [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.SanitizeBoundingBoxes()]
    )

    def __init__(self, root: Path, names: list[str]):
        self.folders = [root / "train" / name for name in names]

    def __len__(self):
        return len(self.folders)

    def __getitem__(self, index: int):
        image, masks, labels = read_dense(self.folders[index])
        boxes = tv_tensors.BoundingBoxes(
            masks_to_boxes(masks), format="XYXY", canvas_size=image.shape[-2:]
        )
        target = dict(boxes=boxes, labels=labels, masks=tv_tensors.Mask(masks))
        image, target = self.chain(image, target)
        target["masks"] = target["masks"].to(torch.uint8)
        return image / 255, target


def train_stock(config: Config, root: Path, names: list[str], seconds: float):
    """torchvision's model after so many seconds, and the epochs it went through."""
    device = default_device()
    torch.manual_seed(config.seed)
    own = dict(anchor_sizes=(32, 64, 128, 256, 512), detections=100, score_floor=0.05)
    model = stock_model(replace(config, **own), device.type)
    model.transform.min_size, model.transform.max_size = (800,), 1333
    loader = DataLoader(WholeFields(root, names), 2, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    precision = choose_precision(config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    start, step, share = train.time.perf_counter(), 0, 0.0
    model.train()
    while True:
        for images, targets in loader:
            total = max(math.ceil(step / max(share, 1e-9)), step + 1)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rate_factor(step, config, total)
            images = [image.to(device) for image in images]
            targets = [{key: value.to(device) for key, value in t.items()} for t in targets]
            with torch.autocast(device.type, dtype, enabled=precision != "no"):
                loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            step, share = step + 1, (train.time.perf_counter() - start) / seconds
            if share >= 1:
                return model.eval(), step / len(loader)


@torch.inference_mode()
def answers_of_stock(model, samples, config: Config) -> dict:
    """What torchvision's model finds, with its own way of drawing masks at 0.5."""
    answers = []
    device = next(model.parameters()).device
    own = replace(config, half_pixel=False, mask_threshold=(0.5,))
    for sample in samples:
        image = sample.image.to(device) / 255
        size = tuple(image.shape[-2:])
        batch, _ = model.transform([image])
        features = model.backbone(batch.tensors)
        proposals, _ = model.rpn(batch, features)
        (found,), _ = model.roi_heads(features, proposals, batch.image_sizes)
        # Pasted one by one: the very pixels of torchvision's postprocess, in bounded memory.
        scale = [a / b for a, b in zip(size, batch.image_sizes[0], strict=True)]
        boxes = found["boxes"] * found["boxes"].new_tensor([scale[1], scale[0]] * 2)
        answers.append(to_instances(found | {"boxes": boxes}, size, own))
    return by_image_id(answers)


def measure(options, side: str, share: float, samples: CellSamples) -> dict:
    """One training and its score."""
    minutes = options.minutes * share
    config = timed_settings(options, minutes, weights="none", seed=options.seed)
    config = for_classes(config, samples)
    (split,) = choose_splits(samples, config).values()
    held_out = pick(samples, split["val"])
    if side == "stock":
        names = [name for name in split["train"] if samples.counts[samples.places[name]].any()]
        model, epochs = train_stock(config, options.data, names, 60 * minutes)
        answers = answers_of_stock(model, held_out, config)
    else:
        folder = options.out / f"ours-{share:g}"
        epochs = len(fit(config, pick(samples, split["train"]), [], folder))
        member = load_trained(folder / "best.pt", config)
        answers = by_image_id(answer_samples([member], held_out, config))
    scores = average_precision(coco_truth(held_out, config.num_classes), answers)
    return dict(minutes=minutes, AP50=scores["AP50"], AP=scores["AP"], epochs=round(epochs, 1))


def draw(results: dict[str, dict[str, dict]], path: Path) -> None:
    """AP50 of both sides against minutes of training."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for side, color in (("stock", "#b04a2f"), ("ours", "#1f6fb4")):
        points = sorted((r["minutes"], r["AP50"] or 0.0) for r in results.get(side, {}).values())
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=color, label=side)
    axis.set(xlabel="minutes of training", ylabel="AP50, validation", ylim=(0, None))
    axis.set_xlim(0, None)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_line(__doc__, 10.0, "results/race")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="draw it here, as PNG")
    options = parser.parse_args()
    choose_clock(parser, options.device)
    samples = read_samples(options)
    kept = Kept(options.out / "race.json", options, ("seed",), samples.digest)
    for side, shares in SHARES.items():
        for share in shares:
            found = kept.get(side, f"{share:g}", partial(measure, options, side, share, samples))
            print(side, {key: round(value, 3) for key, value in found.items()}, flush=True)
    if options.figure:
        draw(kept.results, options.figure)


if __name__ == "__main__":
    main()
