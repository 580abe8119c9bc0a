import pytest

from tests.environments import absent_packages, ROOT, wanted_packages


@pytest.mark.parametrize("name", ["kaggle", "colab"])
def test_absent_packages_are_not_installed(name):
    constraints = ROOT / "tests" / "constraints" / f"{name}.txt"
    wanted = wanted_packages(constraints)
    assert {"imagecodecs", "faster-coco-eval"} <= set(absent_packages(constraints))
    assert not [line for line in wanted if line.startswith(("imagecodecs", "faster-coco-eval"))]
    assert any(line.startswith("torchmetrics") for line in wanted) == (name == "kaggle")
    assert any(line.startswith("torch>") for line in wanted)


def test_a_package_that_is_not_used_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("# absent: no-such-package\n")
    with pytest.raises(ValueError, match="no-such-package are not used"):
        wanted_packages(tmp_path / "x.txt")
