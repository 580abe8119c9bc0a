"""Installs what the notebook needs and the machine lacks."""

# %% [markdown]
# ## Is everything installed?
# Kaggle and Colab bring most of it. Only what is missing is installed, and numpy and torch stay as
# they are. Two packages may stay missing, for instance with the internet off.

# %%
import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
import subprocess
import sys

# %%
# Import name, what pip installs, and what happens without it (None: it is needed).
PACKAGES = (
    ("torch", "torch>=2.6", None),
    ("torchvision", "torchvision>=0.21", None),
    ("timm", "timm>=1.0", None),
    ("safetensors", "safetensors>=0.4", None),
    ("accelerate", "accelerate>=1.0", None),
    ("pycocotools", "pycocotools>=2.0.8", None),
    ("scipy", "scipy>=1.11", None),
    ("skimage", "scikit-image>=0.22", None),
    ("PIL", "pillow>=10.0", None),
    ("tifffile", "tifffile>=2024.1.30", None),
    ("torchmetrics", "torchmetrics>=1.4", None),
    ("tqdm", "tqdm>=4.66", None),
    ("matplotlib", "matplotlib>=3.8", None),
    ("IPython", "ipython>=7.34", None),
    ("imagecodecs", "imagecodecs>=2024.1.1", "Pillow reads the compressed images"),
    ("faster_coco_eval", "faster-coco-eval>=1.6", "pycocotools computes AP, more slowly"),
)


# %%
def install_missing(packages=PACKAGES) -> None:
    """Installs packages that cannot be imported, and says what happens where that fails.

    Raises:
        ModuleNotFoundError: a package that is needed is missing and cannot be installed.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "10"]
    for name, requirement, without in packages:
        if find_spec(name) is not None:
            continue
        print(f"installing {requirement}")
        # One at a time: a package that cannot be had must not hold up the others.
        kept = keep_versions(("numpy", "torch", "torchvision"))
        subprocess.run([*pip, *kept, requirement], check=False, stderr=subprocess.DEVNULL)
        importlib.invalidate_caches()
        if find_spec(name) is None and without is None:
            raise ModuleNotFoundError(
                f"{requirement} is missing and cannot be installed. Turn the internet on (Kaggle: "
                "right panel, Session options), or attach its wheel and pip install that."
            )
        if find_spec(name) is None:  # it can be done without
            print(f"{name} is missing: {without}.")


def keep_versions(names) -> list[str]:
    """Requirements that hold packages at the versions the machine has."""
    pinned = []
    for name in names:
        try:
            pinned.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return pinned
