import pytest
import torch

from tests.faults import digests, flat, half_saved, kill_and_compare, start


def test_killed_at_any_moment_it_ends_with_the_same_bytes(demo_root, tmp_path):
    """A few kills; `python -m tests.faults --kills 20` has more."""
    points = kill_and_compare(2, 3, tmp_path, demo_root)
    assert len(points) == 2
    found = digests(tmp_path / "cut")
    assert len([name for name in found if name.endswith("best.pt")]) == 2
    assert "test-results.json" in found


def test_a_run_that_fails_is_not_taken_for_a_killed_one(tmp_path):
    with pytest.raises(RuntimeError, match="Expected train/ and its ground truth"):
        start(tmp_path / "out", tmp_path / "nothing", 0)


def test_halves_are_damaged_and_differences_seen(tmp_path):
    half_saved({"a": torch.ones(1000)}, tmp_path / "x.pt")
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "x.pt")
    assert flat({"a": [torch.ones(2), 1]}) == flat({"a": [torch.ones(2), 1]})
    assert flat([torch.ones(2)]) != flat([torch.tensor([1.0, 1.0 + 1e-7])])
