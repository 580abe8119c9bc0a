"""Prediction on test images."""

# %% [markdown]
# ## What is in the test images?
# Each test image is read, shown to the model whole and answered with `Instances`; only the answers
# are kept, so memory does not grow with the number of images.

# %%
from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from src_snippets.config import Config
from src_snippets.forms import Instances
from src_snippets.model import detect
from src_snippets.readers import ImageRecord, read_image


# %%
def predict_images(
    model: nn.Module, images: Sequence[ImageRecord], config: Config
) -> dict[int, Instances]:
    """Finds the cells in test images.

    Args:
        model: from `load_trained`.
        images: from `read_test_mapping`.
        config: see `detect`.

    Returns:
        `Instances` by image id, one for every image.

    Raises:
        BadInput: an image cannot be read; names it.
    """
    answers = {}
    for image in tqdm(images, desc="predicting", unit="image"):
        pixels = torch.from_numpy(read_image(image.path))
        answers[image.image_id] = detect(model, [pixels], config)[0]
    return answers
