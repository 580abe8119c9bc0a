import subprocess
import sys

from hypothesis import given, settings, strategies
from hypothesis.extra.numpy import array_shapes, arrays
import numpy as np
import tifffile

from src_snippets.data.images import read_instance_map
from tests.conftest import refused, ROOT
from tests.fuzz import damaged


def test_damaged_files_are_read_or_refused_by_name():
    """Some hundreds; `python -m tests.fuzz --cases 5000` has more."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--cases", "2000", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = [line.split() for line in done.stdout.splitlines() if line[-1:].isdigit()]
    assert sum(int(line[-1]) for line in lines) == 2000
    assert sum(int(line[-1]) for line in lines if line[-2] == "read") > 30


def test_faults_are_repeatable_and_change_something():
    content = b'{"id": 17, "name": "a"}' * 9
    first = [damaged(content, np.random.default_rng(k)) for k in range(50)]
    assert first == [damaged(content, np.random.default_rng(k)) for k in range(50)]
    assert sum(one != content for one in first) > 40
    assert isinstance(damaged(b"", np.random.default_rng(0)), bytes)


def test_a_header_that_claims_a_giant_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "giant.tif"
    tifffile.imwrite(path, np.zeros((8, 8), np.float64))
    content = path.read_bytes()
    with tifffile.TiffFile(path) as tif:
        tags = [tif.pages[0].tags[name] for name in ("ImageWidth", "ImageLength")]
        places = [(tag.valueoffset, tag.dtype.name) for tag in tags]
    data = bytearray(content)
    for offset, kind in places:
        size = 2 if kind == "SHORT" else 4
        data[offset : offset + size] = min(100_000, 2 ** (8 * size) - 1).to_bytes(size, "little")
    path.write_bytes(bytes(data))
    with refused("expected at most 1,000,000,000 values", path):
        read_instance_map(path)


@settings(max_examples=60, deadline=None)
@given(strategies.data())
def test_any_map_of_ids_is_read_as_it_was_written(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("maps") / "class1.tif"
    dtype = data.draw(strategies.sampled_from([np.uint8, np.uint16, np.int32, np.float64]))
    shape = data.draw(array_shapes(min_dims=2, max_dims=2, max_side=40))
    ids = data.draw(arrays(np.bool_, shape)) * np.arange(1, np.prod(shape) + 1).reshape(shape)
    ids = np.where(ids < 256, ids, 0).astype(dtype)
    options = data.draw(strategies.sampled_from([{}, {"compression": "lzw"}, {"rowsperstrip": 3}]))
    tifffile.imwrite(path, ids, **options)
    pixels, found, _ = read_instance_map(path)
    again = np.zeros(ids.size, np.int64)
    again[pixels] = found
    assert np.array_equal(again.reshape(shape), ids)
