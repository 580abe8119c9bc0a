"""The law of bounded memory: nothing of cells x height x width is ever made."""

import subprocess
import sys

from src_snippets.config import recipe
from src_snippets.model import build_model
from src_snippets.transforms import TrainingSet
from tests.benchmarks.cases import grid_sample
from tests.benchmarks.run import memory
from tests.conftest import detect, ROOT

CELLS, SIDE = 5000, 4096
LIMIT = 3 * 10**9  # bytes, with the libraries; one boolean mask a cell would take 84e9


def train_and_predict() -> None:
    """A training step and a prediction on a field of 4096 x 4096 px with 5,000 cells, uncropped."""
    config = recipe(
        "demo",
        crop=SIDE,
        zoom=(1.0, 1.0),
        scale=0.25,  # bounds the network's own memory; truth and answers stay at full size
        proposals=2 * CELLS,
        rois=512,
        score_floor=0.0,
        box_nms=1.0,
        rpn_nms=1.0,
        detections=CELLS,
        mask_threshold=0.4,
        overlaps=False,
        mask_nms=0.9,
    )
    sample = grid_sample(CELLS, SIDE)
    model = build_model(config).train()
    image, target = TrainingSet([sample], config)[0]
    assert (tuple(image.shape[1:]), len(target["ids"])) == ((SIDE, SIDE), CELLS)
    losses = model([image], [target])
    sum(losses.values()).backward()
    assert losses["loss_mask"] > 0
    (found,) = detect(model, [sample.image], config)
    print(len(found), memory("VmHWM"))


def test_a_large_dense_field_stays_small():
    script = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT})); "
    script += "from tests.test_memory import train_and_predict; train_and_predict()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, peak = map(int, done.stdout.split())
    print(f"{found} detections, peak {peak / 1e9:.2f} GB")
    assert found > CELLS // 10
    assert peak < LIMIT
