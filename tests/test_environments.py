import pytest

from tests.environments import absent_packages, packages_to_install, ROOT


@pytest.mark.parametrize("name", ["kaggle", "colab"])
def test_absent_packages_are_not_installed(name):
    constraints = ROOT / "tests" / "constraints" / f"{name}.txt"
    packages = packages_to_install(constraints)
    absent = absent_packages(constraints)
    assert {"imagecodecs", "faster-coco-eval"} <= set(absent)
    assert not [line for line in packages if line.startswith(tuple(absent))]
    assert {"torch>=2.6", "timm>=1.0"} <= set(packages)


def test_a_package_that_is_not_used_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("# absent: no-such-package\n")
    with pytest.raises(ValueError, match="no-such-package are not used"):
        packages_to_install(tmp_path / "x.txt")
