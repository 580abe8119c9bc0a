"""Where the dataset is found and where results go."""

# %% [markdown]
# ## Where is the data, and where do results go?
# A dataset is a folder that holds `train/` with class files in its folders, or with `train.csv` or
# a COCO file such as `train.json` beside it. It is looked for in `DATA`, else where Kaggle and
# Colab put uploads, then in `./data`; hidden folders are passed over. `DATA` may also name a folder
# of pictures alone, to be answered by `CHECKPOINTS`.

# %%
from collections.abc import Sequence
from contextlib import contextmanager
import os
from pathlib import Path
import shutil

# %%
MAPPING_NAME = "test_image_name_to_ids.json"
PICTURES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
SEARCHED_FOLDERS = ("/kaggle/input", "/content", "data")
KAGGLE_RESULTS = Path("/kaggle/working")  # is there on Kaggle, and kept when a run has ended
NO_UPLOADS = ("sample_data", "drive", "results", "hw3.ipynb")  # what else lies there on Colab


def find_dataset(wanted: str, searched: Sequence[str] = SEARCHED_FOLDERS) -> Path | None:
    """Finds the dataset's root folder.

    Args:
        wanted: the root or a folder above it; `demo` for the drawn dataset; empty to search.
        searched: folders looked through, six levels deep, when `wanted` is empty.

    Returns:
        The root, or None where the demo is asked for or nothing was uploaded.

    Raises:
        FileNotFoundError: no dataset is in `wanted`, or in what was uploaded.
    """
    if wanted == "demo":
        return None
    if wanted:
        roots = list(dataset_roots(Path(wanted)))
        if not roots and pictures_in(Path(wanted)):
            return Path(wanted)
        if not roots:
            raise FileNotFoundError(
                f"DATA={wanted!r}: {listed(Path(wanted))}; expected a folder with train/ and its "
                "truth (class files, train.csv or train.json; at most six levels down), or with "
                f"pictures ({', '.join(PICTURES)}). Correct the path, or set it to 'demo'."
            )
    else:
        roots = search_uploads(searched)
    if len(roots) > 1:
        others = ", ".join(map(str, roots[1:]))
        print(f"Several datasets found, the first is used; set DATA for another: {others}")
    return roots[0] if roots else None


# %%
def uploads(folder: Path) -> list[str]:
    """The names in a folder that somebody may have put there."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if name[0] != "." and name not in NO_UPLOADS]


def listed(folder: Path) -> str:
    """What a folder holds, in a few words."""
    if folder.is_file():
        return "it is a file; unpack it, if it is an archive"
    if not folder.is_dir():
        return "there is no such folder"
    held = f"it holds {', '.join(uploads(folder)[:5]) or 'nothing'}"
    bare = (folder / "train").is_dir() and not has_truth(folder)
    return held + ", and no folder of train/ a class file such as class1.tif" * bare


def search_uploads(searched: Sequence[str]) -> list[Path]:
    """All datasets below some folders. Raises FileNotFoundError where other things were uploaded.

    The demo in their place would look like an answer to them.
    """
    roots = [root for folder in searched for root in dataset_roots(Path(folder))]
    others = [Path(folder) for folder in searched if uploads(Path(folder))]
    if others and not roots:
        raise FileNotFoundError(
            f"No dataset found below {others[0]}: {listed(others[0])}. Unpack archives, and set "
            "DATA to the folder that holds train/; or set DATA to 'demo'."
        )
    return roots


# %%
def dataset_roots(folder: Path, depth: int = 6):
    """Yields the folders at or below `folder` that hold a dataset."""
    if has_truth(folder):
        yield folder
    elif depth > 0 and folder.is_dir():
        for child in sorted(p for p in folder.iterdir() if p.is_dir()):
            if child.name != "train" and not child.name.startswith("."):
                yield from dataset_roots(child, depth - 1)


def has_truth(folder: Path) -> bool:
    """Whether a folder is a dataset to learn from."""
    marks = (folder / MAPPING_NAME, folder / "train.csv")
    marked = any(mark.is_file() for mark in marks) or coco_file(folder, "train")
    classes = next((folder / "train").glob("*/class*.tif"), None)
    return (folder / "train").is_dir() and bool(marked or classes)


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie directly in a folder, by name."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in there if p.suffix.lower() in PICTURES and p.name[0] != "."]


# %%
def coco_file(root: Path, part: str) -> tuple[Path, Path] | None:
    """The COCO file of `train` or `test` and the folder of its images, None where there is none."""
    folder = root / part
    names = (f"{part}.json", f"{part}_gt.json", f"annotations/{part}.json")
    names += (f"annotations/instances_{part}.json", f"{part}/_annotations.coco.json")
    path = next((p for name in names if (p := root / name).is_file()), None)
    return (path, folder) if path else None


# %%
def output_folder(wanted: str) -> Path:
    """The folder for results, made if absent: `wanted`, else `/kaggle/working`, else `results`.

    Raises:
        OSError: nothing can be written there.
    """
    folder = Path(wanted or (KAGGLE_RESULTS if KAGGLE_RESULTS.is_dir() else "results"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / ".probe") as partial:
            partial.write_text("")
        (folder / ".probe").unlink()
    except OSError as error:
        raise OSError(
            f"OUT={str(folder)!r}: results cannot be written there ({error}). Set OUT to a folder "
            "that can be written."
        ) from error
    return folder


def fresh_folder(folder: Path, suffix: str) -> Path:
    """A folder without the files of that suffix that an earlier run left in it, made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"*{suffix}"):
        path.unlink()
    return folder


# %%
def session_hours(wanted: float) -> float:
    """Hours after which a session ends, 0 for no end.

    Args:
        wanted: the same; below 0: 8.8 on Kaggle, whose shortest sessions have 9, else no end.
    """
    if wanted >= 0:
        return wanted
    return 8.8 if KAGGLE_RESULTS.is_dir() else 0.0


def check_free(folder: Path, needed: int) -> None:
    """Raises OSError where the disk of a folder has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: {free / 1e9:.1f} GB are free, checkpoints need up to {needed / 1e9:.1f}. "
            "Free some, or set OUT to a folder on another disk."
        )


# %%
@contextmanager
def written_whole(path: Path):
    """Yields a temporary path beside `path`; it gets the final name only if the block succeeds.

    A reader never sees half a file: it is flushed to disk, then renamed in one step.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
