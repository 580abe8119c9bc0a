"""Install what the notebook needs and the machine lacks; check that the GPU computes."""

# %%
# @title Install missing packages, check the GPU
from importlib import invalidate_caches, metadata
import os
import subprocess
import sys
from warnings import filterwarnings

NEEDED = """torch>=2.6 torchvision>=0.21 timm>=1.0.3 safetensors>=0.4.3 accelerate>=1.1
    psutil>=5.9.5 pandas>=2.0 scikit-learn>=1.3 scipy>=1.11 scikit-image>=0.22 pillow>=10.0
    tifffile>=2024.1.30 pycocotools>=2.0.8 jinja2>=3.1 tqdm>=4.66 matplotlib>=3.8 ipython>=7.34"""
PACKAGES = dict.fromkeys(NEEDED.split(), "") | {  # optional ones: what happens without them
    "imagecodecs>=2024.6.1": "Pillow reads the compressed images",
    "roifile>=2024.1.10": "no ROIs for ImageJ are written",
    "faster-coco-eval>=1.6": "pycocotools computes AP, more slowly",
}
GPU_CHECK = """
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(", ".join(names), flush=True)
for i in range(len(names)):
    depthwise = torch.nn.Conv2d(8, 8, 7, padding=3, groups=8)  # as in ConvNeXt
    layers = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), depthwise).half().cuda(i)
    layers(torch.ones(2, 8, 16, 16).half().cuda(i)).sum().backward()
    layers[0].weight.grad.sum().item()  # waits for the GPU
"""


def install_missing(packages=PACKAGES) -> None:
    """Install what is missing of `PACKAGES`; ModuleNotFoundError where a needed one cannot be."""
    filterwarnings("ignore", "IProgress not found")  # progress bars are text then
    present = {str(item.name).lower().replace("_", "-") for item in metadata.distributions()}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries=1", "--timeout=10"]
    fixed = {"numpy", "torch", "torchvision"} & present
    pip += [f"{name}=={metadata.version(name)}" for name in fixed]  # these keep their versions
    for requirement, without in packages.items():
        if requirement.split(">")[0] not in present:
            print(f"Installing {requirement}")  # alone: one that fails does not stop others
            if subprocess.run([*pip, requirement], stderr=subprocess.DEVNULL).returncode:
                help_text = "Turn the internet on (Kaggle: Session options), or install its wheel."
                if not without:
                    raise ModuleNotFoundError(f"{requirement} is missing: pip fails. {help_text}")
                print(f"{requirement} is missing: {without}.")
    invalidate_caches()


def check_gpu() -> str:
    """Print and return the GPUs' names, "" for none; RuntimeError where one cannot compute."""
    # From here on GPUs are counted, not used, and accelerate takes no TPU
    os.environ |= dict(PYTORCH_NVML_BASED_CUDA_CHECK="1", USE_TORCH_XLA="0")
    done = subprocess.run([sys.executable, "-c", GPU_CHECK], capture_output=True, text=True)
    name = done.stdout.strip()
    if done.returncode:
        reason = next((v for v in done.stderr.splitlines() if "Error: " in v), done.stderr[-200:])
        help_text = "Choose another accelerator (Kaggle: GPU T4 x2; Colab: T4, L4, A100), update "
        help_text += "its driver, or set CUDA_VISIBLE_DEVICES to others, '' to take the CPU."
        raise RuntimeError(f"{name or 'The GPU'} cannot be used: {reason}. {help_text}")
    print(f"GPU: {name or 'none; to choose one: Settings > Accelerator (Kaggle), Runtime (Colab)'}")
    return name
