"""Prediction on test images, by one model or several."""

# %% [markdown]
# ## What is in the test images?
# Each test image is read, shown to every model whole and answered with `Instances`; only the
# answers are kept, so memory does not grow with the number of images.

# %%
from collections.abc import Sequence

import torch
from torch import nn, Tensor
from tqdm.auto import tqdm

from src_snippets.config import Config
from src_snippets.datasets import ImageRecord
from src_snippets.forms import Instances
from src_snippets.fusion import fuse
from src_snippets.model import detect
from src_snippets.readers import read_image

# %%
Member = tuple[nn.Module, Config]  # a model and the settings it was made with


def detect_together(members: Sequence[Member], image: Tensor, config: Config) -> Instances:
    """What several models find in one image (3, H, W) uint8; of one model, its own answer."""
    answers = [detect(model, [image], own)[0] for model, own in members]
    return answers[0] if len(answers) == 1 else fuse(answers, config)


def predict_images(
    members: Sequence[Member], images: Sequence[ImageRecord], config: Config
) -> dict[int, Instances]:
    """Finds the cells in test images.

    Args:
        members: from `load_trained`, at least one.
        images: the test images of a dataset.
        config: see `detect` and `fuse`.

    Returns:
        `Instances` by image id, one for every image.

    Raises:
        BadInput: an image cannot be read; names it.
    """
    answers = {}
    for image in tqdm(images, desc="predicting", unit="image"):
        pixels = torch.from_numpy(read_image(image.path))
        answers[image.image_id] = detect_together(members, pixels, config)
    return answers
