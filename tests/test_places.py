from pathlib import Path

import pytest

from src_snippets import places
from src_snippets.places import (
    check_free,
    dataset_roots,
    find_dataset,
    has_truth,
    MAPPING_NAME,
    output_folder,
    pictures_in,
    session_hours,
    written_whole,
)


def make_root(folder: Path) -> Path:
    (folder / "train").mkdir(parents=True)
    (folder / MAPPING_NAME).write_text("[]")
    return folder


def test_class_files_alone_are_a_dataset_and_pictures_alone_may_be_answered(tmp_path):
    own = tmp_path / "own"
    (own / "train" / "a").mkdir(parents=True)
    assert not has_truth(own)
    (own / "train" / "a" / "class2.tif").touch()
    assert has_truth(own)
    assert find_dataset("", [str(tmp_path)]) == own
    alone = tmp_path / "pictures"
    alone.mkdir()
    for name in ("b.JPG", "a.tif", ".hidden.png", "notes.txt"):
        (alone / name).touch()
    assert find_dataset(str(alone)) == alone
    assert [path.name for path in pictures_in(alone)] == ["a.tif", "b.JPG"]
    with pytest.raises(FileNotFoundError, match=r"it holds a\.tif, b\.JPG, notes\.txt"):
        find_dataset("", [str(alone)])  # what was not asked for is not taken
    assert pictures_in(tmp_path / "absent") == []


def test_uploads_that_are_no_dataset_are_told(tmp_path):
    """The demo in place of a dataset that was not recognised would look like an answer."""
    for name in ("sample_data", "results", ".config", "drive"):
        (tmp_path / name).mkdir()
    assert find_dataset("", [str(tmp_path)]) is None
    (tmp_path / "data.zip").touch()
    with pytest.raises(FileNotFoundError, match=r"it holds data\.zip\. Unpack archives"):
        find_dataset("", [str(tmp_path)])
    deep = make_root(tmp_path / "datasets" / "owner" / "slug" / "top" / "top")
    assert find_dataset("", [str(tmp_path)]) == deep
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        find_dataset(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="it is a file; unpack it, if it is an archive"):
        find_dataset(str(tmp_path / "data.zip"))
    (tmp_path / "bare" / "train" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no folder of train/ a class file such as class1"):
        find_dataset(str(tmp_path / "bare"))


def test_finds_a_nested_dataset_and_prefers_the_variable(tmp_path):
    nested = make_root(tmp_path / "input" / "upload" / "hw3-data-release")
    named = make_root(tmp_path / "named")
    searched = [str(tmp_path / "absent"), str(tmp_path / "input")]
    assert find_dataset("", searched) == nested
    assert find_dataset(str(named), searched) == named
    assert find_dataset("demo", searched) is None
    assert find_dataset("", [str(tmp_path / "absent")]) is None


def test_wrong_folder_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a folder with train/ and its truth"):
        find_dataset(str(tmp_path))


def test_several_datasets_are_told(tmp_path, capsys):
    first, second = make_root(tmp_path / "a"), make_root(tmp_path / "b")
    assert find_dataset("", [str(tmp_path)]) == first
    assert str(second) in capsys.readouterr().out


def test_the_drawn_demo_is_not_taken_for_a_dataset(tmp_path):
    make_root(tmp_path / "results" / ".demo-dataset")
    assert find_dataset("", [str(tmp_path)]) is None


def test_search_stops_six_levels_down(tmp_path):
    make_root(tmp_path / "1/2/3/4/5/6/7")
    assert list(dataset_roots(tmp_path)) == []
    assert list(dataset_roots(tmp_path / "1")) == [tmp_path / "1/2/3/4/5/6/7"]


def test_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_folder(str(tmp_path / "deep" / "out")).is_dir()
    assert output_folder("") == Path("results")


def test_written_whole_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "file.txt"
    with written_whole(path) as partial:
        partial.write_text("old")

    def fail_halfway():
        with written_whole(path) as partial:
            partial.write_text("half")
            raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"OUT=.*file/out'.*Set OUT to a folder"):
        output_folder(str(tmp_path / "file" / "out"))
    assert list(output_folder(str(tmp_path / "new")).iterdir()) == []  # the probe is gone


def test_a_disk_without_room_is_refused(tmp_path):
    check_free(tmp_path, 0)
    with pytest.raises(OSError, match=r"GB are free, checkpoints need up to 1000000000\.0\."):
        check_free(tmp_path, 10**18)


def test_a_session_ends_by_itself_on_kaggle_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "KAGGLE_RESULTS", tmp_path / "none")
    assert [session_hours(hours) for hours in (-1.0, 0.0, 3.0)] == [0.0, 0.0, 3.0]
    monkeypatch.setattr(places, "KAGGLE_RESULTS", tmp_path)
    assert [session_hours(hours) for hours in (-1.0, 0.0, 11.8)] == [8.8, 0.0, 11.8]
