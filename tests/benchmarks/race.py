"""AP50 against time: `python tests/benchmarks/race.py --data DIR --recipe light --minutes 60`.

One training a side, on the same images; its weights after a twelfth, a quarter, a half and all of
the minutes are scored on the same validation images, all in one view, at most 600 detections.

torchvision: its pipeline as its tutorial has it: whole images read from their files in every epoch,
    one boolean mask per instance, flips, resized to 800 px, torchvision's anchors. It has the
    backbone, heads, optimizer, schedule and initial weights of the recipe, in float32 (in bfloat16
    its boxes of small cells become empty and the losses NaN); scores from 0.05 on.
ultralytics: `yolo11n-seg.yaml` from random weights with its defaults, but for `time`, both cores in
    place of one, and no validation in between; scores from 0.001 on, as in its own validation. It
    runs in an environment of its own: `python -m venv DIR && DIR/bin/pip install ultralytics`, then
    `--peer DIR/bin/python`; without it this side is left out.
ours: the recipe; also from random weights, and with a schedule of a sixth of the minutes.

On a CPU the minutes are those of its cores (see `timed.py`), for ultralytics those of the clock;
`wall` are those of the clock. Results go to `race.json` below `--out`; what is there is not
measured again.
"""

from dataclasses import replace
from functools import partial
import json
import math
from pathlib import Path
import shutil
import subprocess
import sys
import time

sys.path.insert(0, str(Path(__file__).parents[2]))

from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from src_snippets.data.rle import crop_mask
from src_snippets.data.samples import CellSamples, make_splits, subset
from src_snippets.data.structures import ground_truth, Instances
from src_snippets.data.transforms import collate
from src_snippets.export.exports import trace_polygons
from src_snippets.setup.config import Config
from src_snippets.setup.devices import default_device
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
)

POINTS = (1 / 12, 1 / 4, 1 / 2, 1)  # of the minutes, when the weights are kept
SIDES = {  # fraction of the minutes, changes of the settings
    "ours, a sixth": (1 / 6, {}),
    "torchvision": (1, {}),
    "ultralytics": (1, {}),
    "ours": (1, {}),
    "ours, random weights": (1, dict(weights="none")),
}
LABELS = {"ours, a sixth": "this notebook", "ours": "this notebook"}
LABELS |= {"ultralytics": "YOLO11n-seg from random weights"}
LABELS |= {"ours, random weights": "this notebook from random weights"}
COLORS = ("#6ab0ff", "#b04a2f", "#e0a030", "#1f6fb4", "#888888")


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


def train_baseline(config: Config, root: Path, names: list[str], seconds: float, keep):
    """Trains torchvision's model for so many seconds; `keep(model, fraction, epochs)` each step."""
    device = default_device()
    torch.manual_seed(config.seed)
    changes = dict(anchor_sizes=(32, 64, 128, 256, 512), score_threshold=0.05)
    model = baseline_model(replace(config, **changes), device.type)
    model.transform.min_size, model.transform.max_size = (800,), 1333
    loader = DataLoader(WholeImages(root, names), 2, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    start, step, fraction = trainer.time.perf_counter(), 0, 0.0
    model.train()
    while True:
        for images, targets in loader:
            total = max(math.ceil(step / max(fraction, 1e-9)), step + 1)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * trainer.lr_factor(step, total, config, [])
            images = [image.to(device) for image in images]
            targets = [{key: value.to(device) for key, value in t.items()} for t in targets]
            loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if not norm.isfinite():
                raise FloatingPointError(f"gradients of torchvision's model at step {step}: {norm}")
            optimizer.step()
            step, fraction = step + 1, (trainer.time.perf_counter() - start) / seconds
            keep(model, fraction, step / len(loader))
            if fraction >= 1:
                return model.eval()


def dense_instances(boxes, scores, labels, masks: torch.Tensor) -> Instances:
    """Detections with masks (N, H, W) bool at image size, those without a pixel left out."""
    rles = [rle | {"counts": rle["counts"].decode()} for rle in encode_dense(masks)]
    found = Instances(boxes, scores, labels, rles, tuple(masks.shape[1:]))
    return found.select(masks.flatten(1).any(1).cpu().numpy())


@torch.inference_mode()
def predict_baseline(model, samples) -> list[Instances]:
    """The detections of torchvision's model, with its own rounding of masks, at threshold 0.5."""
    predictions, device = [], next(model.parameters()).device
    for sample in samples:
        (found,) = model([sample.image.to(device) / 255])
        arrays = (found[name].cpu().numpy() for name in ("boxes", "scores", "labels"))
        predictions.append(dense_instances(*arrays, found["masks"][:, 0] >= 0.5))
    return predictions


class Keeper:
    """Keeps files of weights at `POINTS`: with minutes of training, of the clock, and epochs."""

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.minutes, self.kept, self.passed = folder, minutes, [], 0
        self.start = time.time()
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, save, fraction: float, epochs: float) -> None:
        """Calls `save(path)` where the next point is reached."""
        passed = sum(point <= fraction for point in POINTS)
        if passed > self.passed:
            self.passed, path = passed, self.folder / f"{passed}.pt"
            save(path)
            minutes, wall = self.minutes * fraction, (time.time() - self.start) / 60
            self.kept.append((path, dict(minutes=minutes, wall=wall, epochs=epochs)))


def train_ours(config: Config, samples, folder: Path, keeper: Keeper) -> None:
    """Trains the recipe until the time is over."""

    def keep(history, example, is_last):
        def save(path):
            run.save_best()
            shutil.copy(folder / "best.pt", path)

        keeper(save, run.seconds / (3600 * config.train_hours), len(history))

    folder.mkdir(parents=True, exist_ok=True)
    run = trainer.Trainer(config, samples, [], folder, callback=keep, resume=False)
    run.fit()


def write_yolo(parts: dict, names: list[str], folder: Path) -> None:
    """Writes samples by part as ultralytics reads them: the longest outline of each instance."""
    for part, samples in parts.items():
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        for index, sample in enumerate(samples):
            lines, truth = [], ground_truth(sample)
            for label, rle in zip(truth.labels, truth.rles, strict=True):
                rings = [rings[0] for rings in trace_polygons(*crop_mask(rle))]
                ring = np.array(max(rings, key=len)[:-1]) / sample.size[::-1]
                lines.append(" ".join(map(str, [label - 1, *ring.ravel().round(5)])))
            (folder / "labels" / part / f"{index:04}.txt").write_text("\n".join(lines))
            pixels = np.moveaxis(sample.image.numpy(), 0, 2)
            Image.fromarray(pixels).save(folder / "images" / part / f"{index:04}.png")
    content = dict(path=str(folder), train="images/train", val="images/val", names=names)
    (folder / "data.yaml").write_text(json.dumps(content))  # JSON is YAML


def read_peer(folder: Path, count: int) -> list[Instances]:
    """The predictions that `peer.py` wrote for so many images, in their order."""
    predictions = []
    for index in range(count):
        with np.load(folder / f"{index:04}.npz") as found:
            masks = np.unpackbits(found["masks"], axis=-1, count=int(found["width"]))
            arrays = found["boxes"], found["scores"], found["labels"].astype(np.int64) + 1
            predictions.append(dense_instances(*arrays, torch.from_numpy(masks).bool()))
    return predictions


def measure(options, side: str, samples: CellSamples) -> list[dict]:
    """One training; time and scores of its points."""
    fraction, changes = SIDES[side]
    minutes = options.minutes * fraction
    config = timed_config(options, samples, minutes, tta="none", seed=options.seed, **changes)
    (split,) = make_splits(samples, config).values()
    held_out = list(subset(samples, split["val"]))
    folder = options.out / side
    keeper = Keeper(folder, minutes)
    if side == "torchvision":  # which fails on images without instances
        names = [name for name in split["train"] if samples.counts[samples.positions[name]].any()]

        def keep(model, fraction, epochs):
            keeper(partial(torch.save, model.state_dict()), fraction, epochs)

        model = train_baseline(config, options.data, names, 60 * minutes, keep)
    elif side == "ultralytics":
        train = list(subset(samples, split["train"]))
        folder = folder.resolve()
        write_yolo(dict(train=train, val=held_out), list(config.class_names), folder)
        arguments = folder, options.seed, minutes / 60, *POINTS
        command = [options.peer, Path(__file__).with_name("peer.py"), *arguments]
        subprocess.run(list(map(str, command)), check=True)
        kept = json.loads((folder / "points.json").read_text())
        keeper.kept = [(folder / number, point) for number, point in kept.items()]
    else:
        train_ours(config, subset(samples, split["train"]), folder / "run", keeper)
    points = []
    for path, point in keeper.kept:
        start = time.perf_counter()
        if side == "torchvision":
            model.load_state_dict(torch.load(path, weights_only=True))
            predictions = predict_baseline(model, held_out)
        elif side == "ultralytics":
            predictions = read_peer(path, len(held_out))
        else:
            predictions = predict_samples(path, held_out, config)
        seconds = (time.perf_counter() - start) / len(held_out)
        point = dict(seconds_per_image=seconds) | point  # ultralytics has its own
        scores = score(held_out, predictions, config)
        points.append(point | dict(AP50=scores["AP50"], AP=scores["AP"]))
    return points


def plot_race(results: dict[str, dict[str, dict]], path: Path) -> None:
    """AP50 of all sides against minutes of training."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    labels = set()
    for side, color in zip(SIDES, COLORS, strict=True):
        for row in results.get(side, {}).values():
            points = [(point["minutes"], point["AP50"] or 0.0) for point in row]
            label = f"{LABELS.get(side, side)}, {row[-1]['minutes']:.0f} min"
            known = None if label in labels else label
            axis.plot(*zip(*points, strict=True), "o-", color=color, label=known)
            labels.add(label)
    axis.set(xlabel="minutes of training", ylabel="AP50, validation", ylim=(0, None))
    axis.set_xlim(0, None)
    axis.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_line(__doc__, 60.0, "results/race")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--peer", type=Path, help="the Python that has ultralytics")
    parser.add_argument("--figure", type=Path, help="draw it here, as PNG")
    options = parser.parse_args()
    choose_clock(parser, options.device)
    samples = read_samples(options)
    results = Results(options.out / "race.json", options, (), samples.digest)
    for side in options.sides:
        if side == "ultralytics" and not options.peer:
            continue
        for point in results.get(side, str(options.seed), partial(measure, options, side, samples)):
            print(side, {key: round(value, 3) for key, value in point.items()}, flush=True)
    if options.figure:
        plot_race(results.results, options.figure)


if __name__ == "__main__":
    main()
