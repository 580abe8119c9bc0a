import numpy as np
from PIL import Image
import pytest
import tifffile

from src_snippets.data.images import (
    read_image,
    read_image_values,
    read_instance_map,
)
from tests.conftest import read_cell_folder, real_data, refused, save, write_folder

RGB = np.random.default_rng(1).integers(0, 256, (10, 14, 3), dtype=np.uint8)
RGB[0, :2], RGB[1, :2] = 0, 255  # the ends of the range, twice: one pixel may be an outlier
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
        (RGB.astype(np.uint16) * 257, dict(photometric="rgb"), RGB),
        (RGB.astype(np.float32), dict(photometric="rgb"), RGB),
        (RGB / 255.0, dict(photometric="rgb"), RGB),
        (GREY > 99, dict(photometric="minisblack"), np.dstack([(GREY > 99) * 255] * 3)),
    ],
)
def test_images_of_all_kinds(tmp_path, pixels, options, wanted):
    image = read_image(save(tmp_path / "image.tif", pixels, **options))
    assert (image.dtype, image.shape) == (np.uint8, (3, 10, 14))
    assert np.array_equal(np.moveaxis(image, 0, 2), wanted)


def test_colour_of_16_bits_in_a_png_is_refused(tmp_path):
    """Pillow reads the high bytes alone."""
    imagecodecs = pytest.importorskip("imagecodecs")
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(RGB.astype(np.uint16) * 16))
    with refused("RGB of 16 bits in a PNG. Save it as TIFF", path):
        read_image(path)


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
    with refused("NaN or infinite values", save(path, np.full((4, 4), np.nan, np.float32))):
        read_image(path)
    with refused("1 channels of complex64", path):
        read_image(save(path, np.ones((4, 4), np.complex64)))
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
    numbers = np.arange(140, dtype=np.uint16).reshape(10, 14)
    ids = save(tmp_path / "class1.tif", numbers, compression="lzw")
    float_ids = save(tmp_path / "class2.tif", numbers.astype(np.float64), compression="lzw")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", without_codec)
    for path, wanted in zip(paths, expected, strict=True):
        assert np.array_equal(read_image(path), wanted)
    found = read_instance_map(ids)
    assert found[0].tolist() == found[1].tolist() == list(range(1, 140))
    with refused("Install imagecodecs", float_ids):
        read_instance_map(float_ids)


def test_alpha_does_not_set_the_brightness(tmp_path):
    twelve_bits = np.dstack([RGB.astype(np.uint16) * 16, np.full(GREY.shape, 65535, np.uint16)])
    options = dict(photometric="rgb", extrasamples=["unassalpha"])
    found = read_image(save(tmp_path / "rgba.tif", twelve_bits, **options))
    assert np.array_equal(found, np.moveaxis(RGB, 2, 0))
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


# Brightness, pages and tags


def steps(low, middle, high, dtype) -> np.ndarray:
    """(40, 60): three steps of rows, and one far higher pixel at a corner."""
    pixels = np.repeat([low, middle, high], [10, 10, 20])[:, None].repeat(60, 1).astype(dtype)
    pixels[0, 0] = np.iinfo(dtype).max if dtype in (np.uint16, np.int16, np.int8) else 1e6
    return pixels


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ((100, 140, 200), np.uint16),  # 8 bits
        ((0, 400, 1000), np.uint16),  # 10 bits
        ((1000, 2000, 3500), np.uint16),  # 12 bits
        ((-30, 10, 70), np.int8),
        ((-1000, 0, 1500), np.int16),
        ((0.0, 0.4, 1.0), np.float32),
        ((-0.5, 0.1, 1.0), np.float64),
    ],
)
def test_brightness_comes_from_percentiles(tmp_path, values, dtype):
    path, pixels = tmp_path / "image.png", steps(*values, dtype)
    images = [read_image(save(tmp_path / "image.tif", pixels))]
    if dtype == np.uint16:  # PNG has no other numbers beyond 8 bits
        Image.fromarray(pixels).save(path)
        images.append(read_image(path))
    for found in images:
        assert found[:, [1, 15, 35], 30].tolist() == [[0, 102, 255]] * 3  # 0, 2/5, 1
        assert found[:, 0, 0].tolist() == [255] * 3


def test_brightness_of_flat_and_nearly_empty_images(tmp_path):
    flat = np.full((40, 60), 700, np.uint16)
    assert not read_image(save(tmp_path / "flat.tif", flat)).any()
    flat[5, 5] = 900  # below a thousandth: the whole range
    assert read_image(save(tmp_path / "one.tif", flat))[0, 5, 4:7].tolist() == [0, 255, 0]
    assert read_image(save(tmp_path / "small.tif", np.array([[3, 9]], np.uint16))).shape == (
        3,
        1,
        2,
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_spans_its_range(tmp_path, bits):
    top, values = 2**bits - 1, np.tile([0, 1], (4, 8)).astype(np.uint8)
    save(tmp_path / "a.tif", values, bitspersample=bits)
    wanted = np.tile([0, 255 // top], (4, 8))
    assert np.array_equal(read_image(tmp_path / "a.tif")[0], wanted)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_palettes_of_all_depths(tmp_path, bits):
    colors = np.zeros((3, 2**bits), np.uint16)
    colors[:, 1] = 10 * 256, 20 * 256, 200 * 256
    indices = np.tile([0, 1], (4, 8)).astype(np.uint16 if bits == 16 else np.uint8)
    extra = dict(extratags=[(320, "H", colors.size, colors.ravel(), True)])
    extra |= dict(bitspersample=bits) if bits < 8 else {}
    path = save(tmp_path / "a.tif", indices, photometric="minisblack", **extra)
    with tifffile.TiffFile(path, mode="r+") as tif:  # tifffile writes palettes of 8 and 16 bits
        tif.pages[0].tags["PhotometricInterpretation"].overwrite(3)
    found = read_image(path)
    assert found[:, 0, :2].T.tolist() == [[0, 0, 0], [10, 20, 200]]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("joined", [False, True])
def test_stacks_are_refused_with_their_count(tmp_path, count, joined):
    path, pages = tmp_path / "image.tif", np.zeros((count, 8, 9), np.uint8)
    with tifffile.TiffWriter(path) as tif:
        for part in [pages] if joined else pages:
            tif.write(part, photometric="minisblack", metadata={} if joined else None)
    with refused(f"{count} pages of similar size; expected one image", path):
        read_image(path)
    tifffile.imwrite(path, pages, imagej=True, metadata={"axes": "CYX" if count < 5 else "ZYX"})
    with refused(f"{count} pages of similar size; expected one image. .*Type > RGB Color", path):
        read_image(path)


PLANES = np.stack([np.roll(GREY, k) * np.uint16(9 + 50 * k) for k in range(4)])
STACKS = {
    "imagej": dict(imagej=True),
    "ome": dict(ome=True, metadata=dict(axes="CYX")),
    "pages": dict(metadata=None),
    "samples": dict(planarconfig="contig", extrasamples=["unspecified"] * 3),
}


@pytest.mark.parametrize("kind", STACKS)
def test_chosen_channels_become_red_green_and_blue(tmp_path, kind):
    pixels = np.moveaxis(PLANES, 0, 2) if kind == "samples" else PLANES
    path = save(tmp_path / "a.tif", pixels, photometric="minisblack", **STACKS[kind])
    with refused(
        "4 channels of uint16" if kind == "samples" else "4 pages .*or set channels", path
    ):
        read_image(path)
    rolled = [np.roll(GREY, k) for k in range(4)]  # each from 0 to 255 again
    values, image = read_image_values(path, (3, 1))
    assert np.array_equal(values, PLANES)
    assert np.array_equal(image, [rolled[2], rolled[0], 0 * GREY])
    assert np.array_equal(read_image(path, (2,)), [rolled[1]] * 3)
    assert np.array_equal(read_image(path, (4, 2, 1)), [rolled[k] for k in (3, 1, 0)])
    with refused(r"4 channels, but channels=\(5, 1\) set", path):
        read_image(path, (5, 1))


@pytest.mark.parametrize("axes", ["CZYX", "TCYX", "ZCYX"])
def test_planes_of_z_and_time_are_not_taken_for_channels(tmp_path, axes):
    planes = np.stack([PLANES, PLANES])
    options = dict(ome=True) if axes == "CZYX" else dict(imagej=True)
    path = save(tmp_path / "a.tif", planes, metadata=dict(axes=axes), **options)
    with refused(r"axes ...X, shape \(2, 4, .*8 pages of similar size; expected one image", path):
        read_image(path, (1, 2))


def test_channels_of_colour_images(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    expected = [RGB[..., 1], RGB[..., 0], 0 * GREY]
    assert np.array_equal(read_image(tmp_path / "a.png", (2, 1)), expected)
    path = save(tmp_path / "b.tif", np.zeros((65, 8, 9), np.uint8), metadata=None)
    with refused("65 pages of similar size", path):
        read_image(path, (1,))


@pytest.mark.parametrize("kind", ["imagej", "ome", "pages"])
def test_a_list_of_pages_that_is_cut_off_is_refused(tmp_path, kind):
    path = save(tmp_path / "a.tif", PLANES, photometric="minisblack", **STACKS[kind])
    with tifffile.TiffFile(path) as tif:
        second = tif.pages[1].offset
    path.write_bytes(path.read_bytes()[:second])
    for channels in ((), (1,)):
        with refused("cut short, its list of pages goes on after its end", path):
            read_image(path, channels)


def test_pages_in_a_circle_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tif:
        for value in range(2):
            tif.write(np.full((8, 9), value, np.uint8), contiguous=False, metadata=None)
    with tifffile.TiffFile(path) as tif:
        first, second = (page.offset for page in tif.pages)
    content = bytearray(path.read_bytes())
    next_page = second + 2 + 12 * int.from_bytes(content[second : second + 2], "little")
    content[next_page : next_page + 4] = first.to_bytes(4, "little")  # of the last page
    path.write_bytes(content)
    with refused("cannot be read", path):
        read_image(path)


def test_previews_beside_the_image_are_passed_over(tmp_path):
    for name, first, second, options in (
        ("sub", RGB, RGB[::2, ::2], dict(subifds=1)),
        ("behind", RGB, RGB[::2, ::2], {}),
        ("before", RGB[::2, ::2], RGB, {}),
        ("reduced", RGB, RGB[1:], {}),
    ):
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as tif:
            tif.write(first, photometric="rgb", metadata=None, **options)
            kind = 1 if name == "reduced" else 0
            tif.write(second, photometric="rgb", metadata=None, subfiletype=kind)
        found = read_image(tmp_path / f"{name}.tif")
        assert np.array_equal(np.moveaxis(found, 0, 2), RGB), name


def test_ome_positions_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "image.ome.tif") as tif:
        for _ in range(2):
            tif.write(GREY, photometric="minisblack")
    with refused("2 pages of similar size", tmp_path / "image.ome.tif"):
        read_image(tmp_path / "image.ome.tif")


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, orientation, suffix, monkeypatch):
    ramp = np.zeros((16, 32), np.uint8)
    ramp[:8, :8] = 250  # the first corner
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"image.{suffix}"
    options = dict(compression="tiff_lzw") if suffix == "tif" else {}
    Image.fromarray(ramp).save(path, exif=exif, **options)
    found = read_image(path)[0]
    assert found.shape == ((16, 32) if orientation < 5 else (32, 16))
    row, column = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0)}.get(orientation, (0, 0))
    row, column = {6: (0, 1), 7: (1, 1), 8: (1, 0)}.get(orientation, (row, column))
    assert found[-row, -column] > 200
    assert (found > 200).sum() == 64
    if suffix == "tif":
        monkeypatch.setattr(tifffile.TiffPage, "asarray", without_codec)
        assert np.array_equal(read_image(path)[0], found)


def test_the_content_decides_not_the_suffix(tmp_path):
    for name, format in (("a.tif", "png"), ("b.PNG", "tiff"), ("c.TIF", "tiff"), ("d.tif", "bmp")):
        Image.fromarray(RGB).save(tmp_path / name, format=format)
        assert np.array_equal(np.moveaxis(read_image(tmp_path / name), 0, 2), RGB)
    ids = np.arange(140, dtype=np.uint8).reshape(10, 14)
    Image.fromarray(ids).save(tmp_path / "class1.tif", format="png")
    assert read_instance_map(tmp_path / "class1.tif")[1].tolist() == list(range(1, 140))


def test_phone_pictures_and_giants(tmp_path, monkeypatch):
    first, second = Image.new("RGB", (16, 8), (200, 0, 0)), Image.new("RGB", (16, 8))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.jpg")[0].min() > 190
    first.save(tmp_path / "b.gif", save_all=True, append_images=[second])
    with refused("several images; expected one", tmp_path / "b.gif"):
        read_image(tmp_path / "b.gif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.fromarray(RGB).save(tmp_path / "c.png")
    with refused("Cut it into fields of view", tmp_path / "c.png"):
        read_image(tmp_path / "c.png")


def test_a_missing_photometric_tag_is_no_negative(tmp_path):
    path = save(tmp_path / "a.tif", GREY, photometric="minisblack")
    content = path.read_bytes()
    tag = (262).to_bytes(2, "little") + (3).to_bytes(2, "little")
    assert content.count(tag) == 1
    path.write_bytes(content.replace(tag, (263).to_bytes(2, "little") + tag[2:]))
    assert np.array_equal(read_image(path)[0], GREY)


# Instance maps


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "int32", "int64", "uint8", "uint16", "uint32", "bool"]
)
def test_instance_maps_of_all_types(tmp_path, dtype):
    ids = np.array([[0, 1, 1], [0, 0, 1]])
    pixels, found, _ = read_instance_map(save(tmp_path / "class1.tif", ids.astype(dtype)))
    assert (found.tolist(), pixels.tolist(), found.dtype) == ([1, 1, 1], [1, 2, 5], np.int32)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_instance_maps_shown_in_colours(tmp_path, suffix):
    ids = np.array([[0, 1, 1], [0, 0, 7]], np.uint8)
    image = Image.fromarray(ids)
    image.putpalette([index * 37 % 256 for index in range(768)])
    image.save(tmp_path / f"a_masks.{suffix}")
    pixels, found, _ = read_instance_map(tmp_path / f"a_masks.{suffix}")
    assert (found.tolist(), pixels.tolist()) == ([1, 1, 7], [1, 2, 5])


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
    with refused(r"\(12, 15\) \(H, W\); expected \(12, 16\) as of the", folder / "class1.tif"):
        read_cell_folder(folder, 4)
    names = (
        "class5.tif class0.tif classA.tif class1.tiff class01.tif Class1.tif mask.tif other.TIFF"
    )
    for name in names.split():
        other = write_folder(tmp_path / f"of {name}" / "a", {})
        (other / name).write_bytes(b"")
        with refused(f"{name} is no known class; expected class1.tif .. class4.tif", other):
            read_cell_folder(other, 4)
    bare = tmp_path / "bare" / "a"
    bare.mkdir(parents=True)
    with refused("no image.tif, but nothing", bare):
        read_cell_folder(bare, 4)


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


# What is an instance map


def discs(rows=4, columns=5, radius=8, step=24) -> np.ndarray:
    """Cells of ids 1.. in a grid, (rows * step, columns * step) float64."""
    y, x = np.indices((rows * step, columns * step))
    inside = np.hypot(y % step - step // 2, x % step - step // 2) <= radius
    return inside * (y // step * columns + x // step + 1.0)


def smooth(values, size=(150, 190)) -> np.ndarray:
    """Resized bilinearly and rounded, as picture programs do."""
    picture = Image.fromarray(values.astype(np.float32)).resize(size[::-1], Image.BILINEAR)
    return np.round(np.asarray(picture))


MASK = (discs() > 0) * 255
WRAPPED = discs(20, 14)
SEMANTIC = (discs() > 0) * (1 + discs() % 4)


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        (MASK, "1 ids in 20 pieces"),
        (discs(1, 2, step=80) > 0, "1 ids in 2 pieces, 1 ids far apart"),
        (np.where(MASK, 255, 0) - 127 * (discs(radius=6) > 0), "2 ids in 40 pieces"),
        (SEMANTIC, "4 ids in 20 pieces"),
        (smooth(MASK), "blurred by resizing"),
        (smooth(discs() * 10), "blurred by resizing"),
        (np.where(WRAPPED, (WRAPPED - 1) % 255 + 1, 0), "255 ids in 280 pieces, 25 ids far apart"),
        (
            np.where(discs(3, 86), (discs(3, 86) - 1) % 255 + 1, 0),
            "255 ids in 258 pieces, 3 ids far",
        ),
        (255 - MASK, "id 255 is around 20 pieces: the background"),
        (discs() + 1, "id 1 is around 20 pieces"),
        (np.where(discs(), discs(), 65535), "id 65535 is around 20 pieces"),
        (discs(radius=12) + 1, "id 1 is around 20 pieces"),  # cells that touch, as of a watershed
        ((discs(1, 2, step=30) > 0) * 255, "1 ids in 2 pieces"),  # neighbours
    ],
)
def test_what_is_no_instance_map_is_refused(tmp_path, values, cause):
    path = save(tmp_path / "class2.tif", values.astype(np.uint16))
    with refused(cause, path):
        read_instance_map(path)


HALVES = discs()
HALVES[:, 10:15] = 99  # a cell that covers the middle of others
BANDS = np.where(np.indices((60, 80))[0] // 10 % 2, 7.0, 0) * (np.indices((60, 80))[1] < 40)


@pytest.mark.parametrize(
    "ids",
    [
        discs(),
        discs() * 1000 + 17 * (discs() > 0),  # gaps
        discs(radius=12),  # cells that touch
        discs(3, 85),  # 255 of them
        smooth(discs(), (96, 120)),  # of the same size: unchanged
        discs(1, 1),
        np.ones((40, 50)),  # a cell that fills the tile
        np.where(np.hypot(*(np.indices((90, 90)) - 45)) < 55, 3, 0),
        HALVES,
        BANDS,  # one cell in three pieces
        np.eye(60, 90),
        np.zeros((5, 5)),
    ],
)
def test_instance_maps_are_read_whole(tmp_path, ids):
    pixels, _, strays = read_instance_map(save(tmp_path / "class1.tif", ids.astype(np.int32)))
    assert np.array_equal(pixels, np.flatnonzero(ids))
    assert strays == 0


def test_stray_pixels_are_left_out_and_told(tmp_path):
    ids = discs()
    ids[0, 0], ids[95, 119], ids[48, 119] = 8, 8, 20
    ids[1, 12] = 1  # beside its cell: no stray
    pixels, _, strays = read_instance_map(save(tmp_path / "class1.tif", ids))
    assert strays == 3
    assert len(pixels) == (discs() > 0).sum() + 1
    sample = read_cell_folder(write_folder(tmp_path / "a", {1: ids}, ids.shape), 1)
    assert sample.left_out == {"stray pieces": 3}
    rows, columns = np.nonzero(sample.layers[0].numpy() == 8)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (28, 44, 52, 68)


def test_every_real_class_file_is_an_instance_map():
    paths = sorted(real_data("hw3-real").rglob("class*.tif"))
    assert len(paths) == 2
    for path in paths:
        assert read_instance_map(path)[2] == 0


def test_cells_that_cover_each_other_in_part_are_instances(tmp_path):
    rng = np.random.default_rng(5)
    for count in (1, 3, 80, 80):
        ids, grid = np.zeros((90, 120), np.uint16), np.indices((90, 120))
        for number in range(1, count + 1):
            y, x = grid - np.array([rng.integers(90), rng.integers(120)])[:, None, None]
            ids[(y / rng.uniform(2, 25)) ** 2 + (x / rng.uniform(2, 12)) ** 2 < 1] = number
        _, found, _ = read_instance_map(save(tmp_path / "class1.tif", ids))
        assert set(found) == set(ids[ids > 0])
