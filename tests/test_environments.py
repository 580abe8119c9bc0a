import sys

import pytest

from tests.environments import absent_packages, find_python, packages_to_install, ROOT


@pytest.mark.parametrize("name", ["kaggle", "colab"])
def test_absent_packages_are_not_installed(name):
    constraints = ROOT / "tests" / "constraints" / f"{name}.txt"
    packages = packages_to_install(constraints)
    absent = absent_packages(constraints)
    assert {"imagecodecs", "faster-coco-eval"} <= set(absent)
    assert not [line for line in packages if line.startswith(tuple(absent))]
    assert {"torch>=2.6", "timm>=1.0.3"} <= set(packages)


def test_a_package_that_is_not_used_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("# absent: no-such-package\n")
    with pytest.raises(ValueError, match="no-such-package are not used"):
        packages_to_install(tmp_path / "x.txt")


def test_the_platforms_python_is_taken_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    constraints = tmp_path / "x.txt"
    constraints.write_text("# An image, Python 3.99. absent: none\n")
    assert find_python(constraints) == sys.executable
    assert "No Python 3.99" in capsys.readouterr().out
    python = tmp_path / "versions" / "3.99.1" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")  # as a shim of a version that is not installed
    python.chmod(0o755)
    assert find_python(constraints) == sys.executable
    python.write_text("#!/bin/sh\nexit 0\n")
    assert find_python(constraints) == str(python)
