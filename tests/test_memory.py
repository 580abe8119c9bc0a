"""The law of bounded memory: nothing of shape (instances, H, W) is ever made."""

from pathlib import Path
import subprocess
import sys

import numpy as np

from src_snippets.data.transforms import TrainingSet
from src_snippets.inference.predict import predict_image
from src_snippets.model.mask_rcnn import build_model
from src_snippets.setup.config import make_config
from tests.conftest import make_sample, ROOT

CELLS, SIDE = 5000, 4096
LIMIT = 3 * 10**9  # bytes, with the libraries; one boolean mask per instance would take 84e9


def grid_of_cells():
    """An image of 4096 x 4096 px with 5,000 squares of 20 px on a grid."""
    ids, columns = np.zeros((SIDE, SIDE), np.int32), 71
    for number in range(CELLS):
        top, left = (k * (SIDE // columns) for k in divmod(number, columns))
        ids[top : top + 20, left : left + 20] = number + 1
    return make_sample([ids], [1])


def train_and_predict() -> None:
    """One training step and one prediction on the whole image, then the peak of memory."""
    config = make_config(
        "demo",
        crop=SIDE,
        scale_jitter=(1.0, 1.0),
        scale=0.25,  # bounds the network's own memory; targets and predictions have full size
        proposals=2 * CELLS,
        roi_batch_size=512,
        score_threshold=0.0,
        box_nms=1.0,
        detections=CELLS,
        mask_threshold=0.4,
        overlaps=False,
    )
    sample = grid_of_cells()
    model = build_model(config).train()
    model.rpn.nms_thresh = 1.0
    image, target = TrainingSet([sample], config)[0]
    assert (tuple(image.shape[1:]), len(target["ids"])) == ((SIDE, SIDE), CELLS)
    losses = model([image], [target])
    sum(losses.values()).backward()
    assert losses["loss_mask"] > 0
    predictions = predict_image([model], sample.image, config)
    status = Path("/proc/self/status").read_text()
    print(len(predictions), int(status.split("VmHWM:")[1].split()[0]) * 1024)


def test_a_large_dense_image_stays_small():
    script = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT})); "
    script += "from tests.test_memory import train_and_predict; train_and_predict()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, peak = map(int, done.stdout.split()[-2:])
    print(f"{count} detections, peak {peak / 1e9:.2f} GB")
    assert count > CELLS // 10
    assert peak < LIMIT
