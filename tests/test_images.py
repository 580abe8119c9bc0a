import numpy as np
from PIL import Image
import pytest
import tifffile

from src_snippets.data.images import read_cell_folder, read_image, read_instance_map
from tests.conftest import real_data, refused, save, write_folder

RGB = np.random.default_rng(1).integers(0, 256, (10, 14, 3), dtype=np.uint8)
GREY = RGB[..., 0]


# Images


@pytest.mark.parametrize(
    ("pixels", "options", "wanted"),
    [
        (RGB, dict(photometric="rgb"), RGB),
        (RGB, dict(photometric="rgb", compression="lzw", predictor=True), RGB),
        (np.moveaxis(RGB, 2, 0), dict(photometric="rgb", planarconfig="separate"), RGB),
        (np.dstack([RGB, GREY]), dict(photometric="rgb", extrasamples=["unassalpha"]), RGB),
        (GREY, {}, np.dstack([GREY] * 3)),
        (GREY, dict(photometric="miniswhite"), 255 - np.dstack([GREY] * 3)),
        (RGB.astype(np.uint16) * 256 + 255, dict(photometric="rgb"), RGB),
        (GREY.astype(np.uint16) * 16, {}, np.dstack([GREY] * 3)),  # 12 bits in a 16-bit file
        (RGB.astype(np.float32), dict(photometric="rgb"), RGB),
        (RGB / 255.0, dict(photometric="rgb"), RGB),
        (GREY > 99, dict(photometric="minisblack"), np.dstack([(GREY > 99) * 255] * 3)),
    ],
)
def test_images_of_all_kinds(tmp_path, pixels, options, wanted):
    if pixels.dtype == np.uint16:
        pixels = pixels.copy()
        pixels.flat[0] = 2 ** (12 if pixels.ndim == 2 else 16) - 1
        wanted = wanted.copy()
        wanted[0, 0, :] = np.where(np.arange(3) < (3 if pixels.ndim == 2 else 1), 255, wanted[0, 0])
    image = read_image(save(tmp_path / "image.tif", pixels, **options))
    assert (image.dtype, image.shape) == (np.uint8, (3, 10, 14))
    assert np.array_equal(np.moveaxis(image, 0, 2), wanted)


def test_palette_and_jpeg(tmp_path):
    picture = Image.fromarray(RGB).quantize(8)
    picture.save(tmp_path / "palette.tif")
    wanted = np.asarray(picture.convert("RGB"))
    assert np.array_equal(np.moveaxis(read_image(tmp_path / "palette.tif"), 0, 2), wanted)
    smooth = np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (1, 64, 3))
    Image.fromarray(smooth).save(tmp_path / "jpeg.tif", compression="jpeg", quality=95)
    found = read_image(tmp_path / "jpeg.tif").astype(int)
    assert np.abs(np.moveaxis(found, 0, 2) - smooth).max() < 12


def test_images_that_are_refused(tmp_path):
    path = tmp_path / "image.tif"
    with refused("values from nan", save(path, np.full((4, 4), np.nan, np.float32))):
        read_image(path)
    with refused(r"values from 0.0 to 300.0; expected 0..1 or 0..255", path):
        read_image(save(path, np.array([[0, 300.0]])))
    with refused("values from -3 to 4", path):
        read_image(save(path, np.array([[-3, 4]], np.int16)))
    with refused("1 channels of complex64", path):
        read_image(save(path, np.ones((4, 4), np.complex64)))
    with refused("expected one image", path):
        read_image(save(path, np.zeros((3, 8, 8), np.uint8), photometric="minisblack"))
    with refused("colour model SEPARATED", path):
        read_image(save(path, np.zeros((8, 8, 4), np.uint8), photometric="separated"))
    path.write_text("no picture")
    with refused("cannot be read", path):
        read_image(path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.tif")


@pytest.mark.parametrize("compression", [None, "lzw", "jpeg"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_truncated_files_are_refused(tmp_path, compression, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / "image.tif", noise, compression=compression, photometric="rgb")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with refused("cut short|cannot be read", path):
        read_image(path)


def without_codec(*args, **kwargs):
    """What tifffile says of LZW where imagecodecs is missing."""
    raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")


def test_without_imagecodecs_pillow_reads_the_same(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a", {})
    Image.fromarray(RGB).quantize(8).save(tmp_path / "palette.tif", compression="tiff_lzw")
    Image.fromarray(GREY).save(tmp_path / "grey.tif", compression="tiff_lzw")
    paths = [folder / "image.tif", tmp_path / "palette.tif", tmp_path / "grey.tif"]
    expected = [read_image(path) for path in paths]
    ids = save(tmp_path / "class1.tif", GREY.astype(np.uint16), compression="lzw")
    float_ids = save(tmp_path / "class2.tif", GREY.astype(np.float64), compression="lzw")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", without_codec)
    for path, wanted in zip(paths, expected, strict=True):
        assert np.array_equal(read_image(path), wanted)
    found = read_instance_map(ids)
    assert found.size == GREY.shape
    assert np.array_equal(found.ids, GREY[GREY > 0])
    assert np.array_equal(found.pixels, np.flatnonzero(GREY))
    with refused("Install imagecodecs", float_ids):
        read_instance_map(float_ids)


def test_alpha_does_not_set_the_brightness(tmp_path):
    twelve_bits = np.dstack([RGB.astype(np.uint16) * 16, np.full(GREY.shape, 65535, np.uint16)])
    twelve_bits[0, 0, 0] = 4095
    options = dict(photometric="rgb", extrasamples=["unassalpha"])
    found = read_image(save(tmp_path / "rgba.tif", twelve_bits, **options))
    assert np.array_equal(found[1:], np.moveaxis(RGB, 2, 0)[1:])
    grey = np.dstack([twelve_bits[..., 0], twelve_bits[..., 3]])
    options = dict(photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"])
    found = read_image(save(tmp_path / "grey.tif", grey, **options))
    assert found[0, 5, 5] == GREY[5, 5]


def test_axes_of_length_one_are_no_stack(tmp_path):
    found = read_image(save(tmp_path / "a.tif", GREY[None], photometric="minisblack"))
    assert np.array_equal(found[0], GREY)
    two = save(tmp_path / "b.tif", RGB[..., :2], photometric="minisblack", planarconfig="contig")
    with refused("2 channels of uint8; expected RGB or grey", two):
        read_image(two)


def test_pillow_is_not_let_change_values(tmp_path, monkeypatch):
    deep = save(tmp_path / "deep.tif", RGB.astype(np.uint16), photometric="rgb")
    white = save(tmp_path / "white.tif", GREY, photometric="miniswhite")
    monkeypatch.setattr(tifffile.TiffPage, "asarray", without_codec)
    for path in (deep, white):
        with refused("Install imagecodecs", path):
            read_image(path)


# Instance maps


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "int32", "int64", "uint8", "uint16", "uint32", "bool"]
)
def test_instance_maps_of_all_types(tmp_path, dtype):
    ids = np.array([[0, 1, 1], [0, 0, 1]])
    found = read_instance_map(save(tmp_path / "class1.tif", ids.astype(dtype)))
    assert (found.ids.tolist(), found.pixels.tolist(), found.size) == ([1, 1, 1], [1, 2, 5], (2, 3))
    assert found.ids.dtype == np.int32


@pytest.mark.parametrize(
    ("ids", "cause"),
    [
        (np.array([[0, 1.5]]), r"ids \[1.5\]; expected whole numbers"),
        (np.array([[0, -1.0]]), r"ids \[-1.\]; expected whole numbers"),
        (np.array([[0, -7]], np.int32), r"ids \[-7\]; expected whole numbers"),
        (np.array([[0, np.nan]]), "ids .*; expected whole numbers"),
        (np.array([[0, np.inf]]), "ids .*; expected whole numbers"),
        (np.array([[0, 1e300]]), "expected whole numbers"),
        (np.array([[0, 2**63]], np.uint64), r"ids \[9223372036854775808\]; expected"),
        (np.zeros((4, 5, 3), np.uint8), r"expected \(H, W\)"),
    ],
)
def test_maps_that_are_refused(tmp_path, ids, cause):
    options = dict(photometric="rgb") if ids.ndim == 3 else {}
    path = save(tmp_path / "class1.tif", ids, **options)
    with refused(cause, path):
        read_instance_map(path)


def test_lossy_maps_are_refused(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "class1.tif", compression="jpeg")
    with refused("changes ids. Save it without loss", tmp_path / "class1.tif"):
        read_instance_map(tmp_path / "class1.tif")


# Folders


def test_ids_restart_and_leave_gaps_and_overlap(tmp_path):
    one, two = np.zeros((12, 16)), np.zeros((12, 16))
    one[:2], one[4:6] = 7, 90
    two[5:7, :3], two[9, 9] = 7, 1  # id 7 again: another cell, overlapping that of class 1
    sample = read_cell_folder(write_folder(tmp_path / "a", {1: one, 3: two}), 4)
    assert (sample.size, sample.name) == ((12, 16), "a/image.tif")
    assert sample.labels.tolist() == [1, 1, 3, 3]
    assert sample.layers.shape == (2, 12, 16)
    assert [(sample.layers == i).sum().item() for i in (1, 2, 3, 4)] == [32, 32, 1, 6]


def test_absent_and_empty_classes(tmp_path):
    sample = read_cell_folder(write_folder(tmp_path / "a", {2: np.zeros((12, 16))}), 4)
    assert (sample.layers.shape, len(sample.labels)) == ((1, 12, 16), 0)
    sample = read_cell_folder(write_folder(tmp_path / "b", {}), 4)
    assert (sample.layers.shape, len(sample.labels)) == ((1, 12, 16), 0)


def test_folders_that_are_refused(tmp_path):
    folder = write_folder(tmp_path / "a", {1: np.zeros((12, 15))})
    with refused(r"\(12, 15\) \(H, W\); expected \(12, 16\) as of image", folder / "class1.tif"):
        read_cell_folder(folder, 4)
    names = (
        "class5.tif class0.tif classA.tif class1.tiff class01.tif Class1.tif mask.tif other.TIFF"
    )
    for name in names.split():
        other = write_folder(tmp_path / name, {})
        (other / name).write_bytes(b"")
        with refused(f"{name} is no known class; expected class1.tif .. class4.tif", other):
            read_cell_folder(other, 4)
    (tmp_path / "bare").mkdir()
    with refused("no image.tif, but nothing", tmp_path / "bare"):
        read_cell_folder(tmp_path / "bare", 4)


def test_other_files_beside_the_class_files_are_passed_over(tmp_path):
    folder = write_folder(tmp_path / "a", {1: np.eye(12, 16)})
    for name in ("notes.txt", "._class1.tif", "image.png"):
        (folder / name).write_bytes(b"")
    assert read_cell_folder(folder, 1).labels.tolist() == [1]


def test_a_pixel_of_two_classes_goes_to_the_first_without_overlaps(tmp_path):
    folder = write_folder(tmp_path / "a", {1: np.eye(12, 16), 2: np.ones((12, 16))})
    sample = read_cell_folder(folder, 2, overlaps=False)
    assert sample.layers.shape[0] == 1
    assert np.bincount(sample.layers.numpy().ravel()).tolist() == [0, 12, 12 * 16 - 12]


# Real data


def test_the_real_hw3_folder_loads():
    sample = read_cell_folder(real_data("hw3-real") / "train" / "sample", 4)
    assert (sample.size, len(sample.labels)) == ((397, 482), 161)
    assert sample.labels.bincount().tolist() == [0, 2, 159]


def test_a_mask_of_cells_and_background_is_refused(tmp_path):
    """One id in many pieces; a cell that is torn, or has slivers beside it, is one."""
    ids = np.zeros((40, 60))
    for column in range(0, 60, 10):
        ids[5:10, column : column + 4] = 255
    folder = write_folder(tmp_path / "cells", {2: ids}, ids.shape)
    with refused("one id, 255, in 6 pieces: a mask of cells and background", folder / "class2.tif"):
        read_cell_folder(folder, 4)
    ids[:, 30:] = 0
    ids[20, ::2] = 255
    torn = write_folder(tmp_path / "torn", {2: ids}, ids.shape)
    assert read_cell_folder(torn, 4).labels.tolist() == [2]
    ids[30:35, 40:45] = 7
    two = write_folder(tmp_path / "two", {2: ids}, ids.shape)
    assert read_cell_folder(two, 4).labels.tolist() == [2, 2]
