from importlib.metadata import version
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from src_snippets.setup import install
from src_snippets.setup.install import check_gpu, install_missing, PACKAGES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def commands(monkeypatch):
    """The commands that would be run."""
    commands, done = [], SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or done)
    return commands


def test_requirements_state_the_same_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines[: lines.index("")] if not line.startswith("#")]
    assert sorted(listed) == sorted(PACKAGES)


def test_nothing_missing_installs_nothing(commands, capsys):
    install_missing()
    assert (commands, capsys.readouterr().out) == ([], "")


def test_only_what_is_missing_is_installed_and_torch_keeps_its_version(commands):
    install_missing({"pytest>=1": "", "no-such-package>=1": "x"})
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-1] == "no-such-package>=1"
    assert {f"{name}=={version(name)}" for name in ("numpy", "torch", "torchvision")} < {*command}


def test_packages_that_lie_twice_or_are_broken_do_no_harm(commands, monkeypatch):
    """The version that is imported counts, not that of a second copy behind it on the path."""
    names = ("numpy", "torch", None)  # None: what an uninstall that failed leaves
    there = [SimpleNamespace(name=name, version="0.1") for name in names]
    monkeypatch.setattr(install.metadata, "distributions", lambda: there)
    install_missing({"no-such-package>=1": "x"})
    assert {f"numpy=={version('numpy')}", f"torch=={version('torch')}"} < {*commands[0]}


def test_offline_a_needed_package_stops_and_another_one_does_not(monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    install_missing({"no-such-package": "Pillow reads the images"})
    assert "no-such-package is missing: Pillow reads the images." in capsys.readouterr().out
    with pytest.raises(ModuleNotFoundError, match=r"no-such-package is missing.*internet on"):
        install_missing({"no-such-package": ""})


def test_a_gpu_that_cannot_compute_is_refused(monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "")  # and back after the test
    script = """
import sys, torch
print("Tesla P100-PCIE-16GB", flush=True)
print("UserWarning: found GPU0 of capability sm_60", file=sys.stderr)
raise RuntimeError("CUDA error: no kernel image is available\\nCompile with TORCH_USE_CUDA_DSA")
"""
    monkeypatch.setattr(install, "GPU_CHECK", script)
    expected = r"P100-PCIE-16GB cannot be used: RuntimeError: CUDA error: no kernel.*T4 x2"
    with pytest.raises(RuntimeError, match=expected):
        check_gpu()


def test_a_depthwise_convolution_in_fp16_is_tried_forward_and_backward(monkeypatch, capsys):
    """What ConvNeXt needs and some cards cannot do; here on the CPU, with what it ran noted."""
    layers = []

    class Watched(torch.nn.Conv2d):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            layers.append(self)

    monkeypatch.setattr(torch.nn, "Conv2d", Watched)
    used = []
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda layer, index: used.append(index) or layer)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda values, index: values)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", "card {}".format)
    exec(install.GPU_CHECK, {})
    assert (used, capsys.readouterr().out) == ([0, 1], "card 0, card 1\n")  # each one
    layer = layers[0]  # the other one takes cuDNN
    assert (layer.kernel_size, layer.groups, layer.in_channels) == ((7, 7), 8, 8)
    assert layer.weight.grad.dtype == torch.float16
    assert layer.weight.grad.abs().sum() > 0


def test_the_gpu_is_named_and_this_process_leaves_it_alone(monkeypatch, capsys):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "")
    code = "from src_snippets.setup.install import check_gpu; name = check_gpu(); import os, sys; "
    code += "print([name, 'torch' in sys.modules, os.environ['PYTORCH_NVML_BASED_CUDA_CHECK']])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    told, found = done.stdout.splitlines()
    name, has_torch, checked = eval(found)
    assert (has_torch, checked) == (False, "1")
    absent = "none; to choose one: Settings > Accelerator (Kaggle), Runtime (Colab)"
    assert told == f"GPU: {name or absent}"
    monkeypatch.setattr(install, "GPU_CHECK", "print('Tesla T4, Tesla T4')")
    names = "Tesla T4, Tesla T4"
    assert (check_gpu(), capsys.readouterr().out) == (names, f"GPU: {names}\n")
