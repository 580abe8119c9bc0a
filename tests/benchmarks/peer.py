"""The side `ultralytics` of `race.py`, by a Python that has it: `PYTHON peer.py DIR SEED HOURS ..`

DIR holds `data.yaml` in the layout of ultralytics; the fractions of the hours at which the weights
are kept follow. Writes `points.json`, and predictions of validation images as `<point>/*.npz`.
"""

import json
import os
from pathlib import Path
import shutil
import sys
import time

import numpy as np
import torch
from ultralytics import YOLO


def main(folder: Path, seed: int, hours: float, fractions: list[float]) -> None:
    """Train, keep, predict."""
    points, model = {}, YOLO("yolo11n-seg.yaml")

    def use_all_cores(trainer):
        torch.set_num_threads(os.cpu_count())  # by default one core is left idle

    def keep(trainer):
        minutes = (time.time() - trainer.train_time_start) / 60
        passed = sum(60 * hours * fraction <= minutes for fraction in fractions)
        if passed > max(map(int, points), default=0):
            shutil.copy(trainer.last, folder / f"{passed}.pt")
            points[str(passed)] = dict(minutes=minutes, wall=minutes, epochs=trainer.epoch + 1)

    model.add_callback("on_train_start", use_all_cores)
    model.add_callback("on_model_save", keep)
    options = dict(data=folder / "data.yaml", project=folder, device="cpu", exist_ok=True)
    model.train(time=hours, val=False, plots=False, verbose=False, seed=seed, **options)
    for number, point in points.items():
        model, seconds = YOLO(folder / f"{number}.pt"), []
        options = dict(conf=0.001, max_det=600, retina_masks=True, device="cpu", verbose=False)
        (folder / number).mkdir(exist_ok=True)
        for path in sorted((folder / "images" / "val").iterdir()):
            (found,) = model.predict(path, **options)
            seconds.append(sum(found.speed.values()) / 1000)
            height, width = found.orig_shape
            masks = np.zeros((0, height, width)) if found.masks is None else found.masks.data
            arrays = dict(boxes=found.boxes.xyxy, scores=found.boxes.conf, labels=found.boxes.cls)
            arrays |= dict(masks=np.packbits(np.asarray(masks) > 0.5, axis=-1), width=width)
            np.savez_compressed(folder / number / f"{path.stem}.npz", **arrays)
        point["seconds_per_image"] = sum(seconds) / len(seconds)
    (folder / "points.json").write_text(json.dumps(points))


if __name__ == "__main__":
    hours, *fractions = map(float, sys.argv[3:])
    main(Path(sys.argv[1]), int(sys.argv[2]), hours, fractions)
