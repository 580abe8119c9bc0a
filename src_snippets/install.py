"""Installs what the notebook needs and the machine lacks."""

# %% [markdown]
# ## Is everything installed?
# Kaggle and Colab bring most of it. Only what is missing is installed, and numpy and torch stay as
# they are. Two packages may stay missing, for instance with the internet off. A GPU is asked for
# one small product, in a process of its own: some are listed and cannot compute.

# %%
import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
import json
import subprocess
import sys
import warnings

# %%
# Import name, what pip installs, and what happens without it (None: it is needed).
PACKAGES = (
    ("torch", "torch>=2.6", None),
    ("torchvision", "torchvision>=0.21", None),
    ("timm", "timm>=1.0", None),
    ("safetensors", "safetensors>=0.4", None),
    ("accelerate", "accelerate>=1.0", None),
    ("psutil", "psutil>=5.9", None),
    ("jinja2", "jinja2>=3.1", None),
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
GPU_QUESTION = """
import json, torch
found = dict(name="", works=True, error="")
if torch.cuda.is_available():
    found["name"] = torch.cuda.get_device_name()
    found["count"] = torch.cuda.device_count()
    found["capability"] = "sm_%d%d" % torch.cuda.get_device_capability()
    found["built_for"] = torch.cuda.get_arch_list()
    try:
        square = torch.ones(8, 8, device="cuda")
        found["works"] = float((square @ square).sum()) == 512
    except Exception as error:
        found.update(works=False, error=str(error).splitlines()[0])
print(json.dumps(found))
"""


def ask_gpu() -> dict:
    """What a process of its own finds out about the GPU; this one leaves it alone before training.

    Returns:
        name (empty without a GPU), works, error, and with a GPU count, capability and built_for.
    """
    command = [sys.executable, "-c", GPU_QUESTION]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return dict(name="GPU", works=False, error=last, capability="", built_for=[])
    return json.loads(done.stdout.splitlines()[-1])


# %%
def check_gpu(found: dict) -> None:
    """Says which GPU there is; refuses one that says it is there but cannot compute.

    Args:
        found: from `ask_gpu`.

    Raises:
        RuntimeError: it is listed and does not work, as Kaggle's P100 with newer torch.
    """
    if not found["works"]:
        raise RuntimeError(
            f"{found['name']} ({found['capability']}) cannot be used: {found['error']}. This torch "
            f"is built for {', '.join(found['built_for'])}. Choose another accelerator: on Kaggle "
            "GPU T4 x2, on Colab T4, L4 or A100."
        )
    if found["name"]:
        print(f"GPU: {found['name']}" + f" x{found['count']}" * (found["count"] > 1))
    else:
        print('no GPU: set RECIPE = "demo" below, all others would take days. Or choose one, on')
        print("Kaggle: Settings > Accelerator; on Colab: Runtime > Change runtime type.")


# %%
def install_missing(packages=PACKAGES) -> None:
    """Installs packages that cannot be imported, and says what happens where that fails.

    Raises:
        ModuleNotFoundError: a package that is needed is missing and cannot be installed.
    """
    warnings.filterwarnings("ignore", "IProgress not found")  # bars are drawn as text then
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
