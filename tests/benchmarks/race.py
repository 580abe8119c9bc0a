"""AP50 against time: `python tests/benchmarks/race.py --data DIR --minutes 10`.

The baseline is torchvision's pipeline as its tutorial has it: whole images read from their files in
every epoch, one boolean mask per instance, flips, resized to 800 px, torchvision's anchors, 100
detections. It has the backbone, heads, optimizer and schedule of the recipe, the same initial
weights, and keeps detections from score 0.05 on. Each point is a training of its own with a
schedule that ends there. On a CPU the minutes are those of its cores: see `timed.py`. Results go to
`race.json` below `--out`; what is there is not measured again.
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

from src_snippets.data.samples import CellSamples, make_splits, subset
from src_snippets.data.structures import Instances
from src_snippets.data.transforms import collate
from src_snippets.setup.config import Config
from src_snippets.setup.devices import choose_precision, default_device
from src_snippets.training import trainer
from tests.benchmarks.cases import baseline_model, encode_dense, read_dense
from tests.benchmarks.timed import (
    choose_clock,
    command_line,
    predict_samples,
    read_samples,
    Results,
    score,
    timed_config,
    train_timed,
)

FRACTIONS = {"baseline": (0.2, 1.0), "ours": (0.1, 0.2, 0.5)}  # of the minutes


class WholeImages(Dataset):
    """Training folders with one boolean mask per instance, flipped."""

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


def train_baseline(config: Config, root: Path, names: list[str], seconds: float):
    """torchvision's model after so many seconds of training, and the number of epochs."""
    device = default_device()
    torch.manual_seed(config.seed)
    changes = dict(anchor_sizes=(32, 64, 128, 256, 512), detections=100, score_threshold=0.05)
    model = baseline_model(replace(config, **changes), device.type)
    model.transform.min_size, model.transform.max_size = (800,), 1333
    loader = DataLoader(WholeImages(root, names), 2, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    precision = choose_precision(config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    start, step, fraction = trainer.time.perf_counter(), 0, 0.0
    model.train()
    while True:
        for images, targets in loader:
            total = max(math.ceil(step / max(fraction, 1e-9)), step + 1)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * trainer.lr_factor(step, total, config, [])
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
            step, fraction = step + 1, (trainer.time.perf_counter() - start) / seconds
            if fraction >= 1:
                return model.eval(), step / len(loader)


@torch.inference_mode()
def predict_baseline(model, samples) -> list[Instances]:
    """The detections of torchvision's model, with its own rounding of masks, at threshold 0.5."""
    predictions, device = [], next(model.parameters()).device
    for sample in samples:
        (found,) = model([sample.image.to(device) / 255])
        masks = found["masks"][:, 0] >= 0.5
        filled = masks.flatten(1).any(1).cpu().numpy()
        rles = [rle | {"counts": rle["counts"].decode()} for rle in encode_dense(masks)]
        arrays = (found[name].cpu().numpy() for name in ("boxes", "scores", "labels"))
        predictions.append(Instances(*arrays, rles, sample.size).select(filled))
    return predictions


def measure(options, side: str, fraction: float, samples: CellSamples) -> dict:
    """One training and its score."""
    minutes = options.minutes * fraction
    config = timed_config(options, samples, minutes, weights="none", seed=options.seed)
    (split,) = make_splits(samples, config).values()
    held_out = list(subset(samples, split["val"]))
    if side == "baseline":  # which fails on images without instances
        names = [name for name in split["train"] if samples.counts[samples.positions[name]].any()]
        model, epochs = train_baseline(config, options.data, names, 60 * minutes)
        predictions = predict_baseline(model, held_out)
    else:
        folder = options.out / f"ours-{fraction:g}"
        epochs = train_timed(config, subset(samples, split["train"]), folder)
        predictions = predict_samples(folder / "best.pt", held_out, config)
    scores = score(held_out, predictions, config)
    return dict(minutes=minutes, AP50=scores["AP50"], AP=scores["AP"], epochs=round(epochs, 1))


def plot_race(results: dict[str, dict[str, dict]], path: Path) -> None:
    """AP50 of both sides against minutes of training."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for side, color in (("baseline", "#b04a2f"), ("ours", "#1f6fb4")):
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
    results = Results(options.out / "race.json", options, ("seed",), samples.digest)
    for side, fractions in FRACTIONS.items():
        for fraction in fractions:
            work = partial(measure, options, side, fraction, samples)
            found = results.get(side, f"{fraction:g}", work)
            print(side, {key: round(value, 3) for key, value in found.items()}, flush=True)
    if options.figure:
        plot_race(results.results, options.figure)


if __name__ == "__main__":
    main()
