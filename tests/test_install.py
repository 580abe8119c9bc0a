from importlib.metadata import version
from pathlib import Path
import subprocess
import sys

import pytest

from src_snippets import install
from src_snippets.install import install_missing, keep_versions, PACKAGES

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
