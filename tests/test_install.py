from importlib.metadata import version
from pathlib import Path
import subprocess
import sys

import pytest

from src_snippets import install
from src_snippets.install import ask_gpu, check_gpu, install_missing, keep_versions, PACKAGES

ROOT = Path(__file__).parent.parent


def test_requirements_state_the_same_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines[: lines.index("")] if not line.startswith("#")]
    assert sorted(listed) == sorted(requirement for _, requirement, _ in PACKAGES)
    assert any(line.startswith("nbval") for line in lines)


def test_nothing_missing_installs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    install_missing()
    assert capsys.readouterr().out == ""


def test_only_what_is_missing_is_installed_beside_what_is_there(monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **k: commands.append(command))
    packages = (("json", "json", None), ("no_such_module", "no-such-package>=1", "x"))
    install_missing(packages)
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-1] == "no-such-package>=1"
    assert f"torch=={version('torch')}" in command
    assert keep_versions(["no-such-package"]) == []


def test_offline_an_optional_package_is_told_and_a_needed_one_stops(monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    optional = (("no_such_module", "no-such-package", "Pillow reads the images"),)
    install_missing(optional)
    assert "no_such_module is missing: Pillow reads the images." in capsys.readouterr().out
    needed = (("no_such_module", "no-such-package", None),)
    with pytest.raises(ModuleNotFoundError, match=r"no-such-package is missing.*internet on"):
        install_missing(needed)
    assert install.find_spec("no_such_module") is None


def test_a_gpu_that_cannot_compute_is_refused(capsys):
    p100 = dict(
        name="Tesla P100-PCIE-16GB",
        works=False,
        error="no kernel image is available for execution on the device",
        capability="sm_60",
        built_for=["sm_70", "sm_75"],
    )
    with pytest.raises(RuntimeError, match=r"P100.* \(sm_60\) cannot be used: no .*T4 x2"):
        check_gpu(p100)
    check_gpu(dict(name="Tesla T4", works=True, error="", count=1))
    check_gpu(dict(name="Tesla T4", works=True, error="", count=2))
    check_gpu(dict(name="", works=True, error=""))
    out = capsys.readouterr().out.splitlines()
    assert out.pop().endswith("on Colab: Runtime > Change runtime type.")
    assert out.pop().startswith('no GPU: set RECIPE = "demo" below, all others would take days')
    assert out == ["GPU: Tesla T4", "GPU: Tesla T4 x2"]


def test_the_gpu_is_asked_in_a_process_of_its_own(monkeypatch):
    found = ask_gpu()
    assert found["works"]
    assert found["name"] == "" or found["capability"].startswith("sm_")
    monkeypatch.setattr(install, "GPU_QUESTION", "raise OSError('driver is broken')")
    broken = ask_gpu()
    assert (broken["works"], broken["error"]) == (False, "OSError: driver is broken")
