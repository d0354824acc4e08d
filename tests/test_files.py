"""Files and folders appear whole; what killed processes left is removed by the next, and
nothing else."""

import os
import shutil
import signal

import pytest

from weightregions.files import remove_leftovers, whole_file, whole_folder, write_whole


def apart(work):
    "The exit code of work in a forked process, minus the signal that ended it."
    if not (child := os.fork()):
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def a_folder(target, replace=False, then=lambda: None):
    with whole_folder(target, replace) as beside:
        (beside / "inner").mkdir()
        write_whole(beside / "inner" / "weights", "all of it")
        then()


def a_file(target, then=lambda: None):
    with whole_file(target) as f:
        f.write(b"all of it")
        then()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder):
    return sorted(f.name for f in folder.iterdir())


REMOVED = "the next run removes what is left, and ends well"
writes = pytest.mark.parametrize("write", [a_folder, a_file], ids=["folder", "file"])


@writes
def test_what_killed_processes_left_is_removed_by_the_next(tmp_path, write, tried):
    target, kills = tmp_path / "zoo [1].v2", 3
    for _ in range(kills):
        assert apart(lambda: write(target, then=kill)) == -signal.SIGKILL
        [left] = names(tmp_path)
        assert left.startswith(".zoo [1].v2-") and left.endswith(".part")
    write(target)
    assert names(tmp_path) == ["zoo [1].v2"]
    tried(
        "kill -9 while it writes, again and again",
        write.__name__.replace("_", " "),
        kills,
        REMOVED,
    )


@writes
def test_what_others_are_writing_stays(tmp_path, write, tried):
    target = tmp_path / "x"

    def inner():
        assert apart(lambda: write(target)) == 0
        assert [n.endswith(".part") for n in names(tmp_path)] == [True, False]
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    write(target, then=inner)
    assert names(tmp_path) == ["x"]
    tried(
        "another process writes the same",
        write.__name__.replace("_", " "),
        1,
        "what it writes is no leftover",
    )


def test_only_leftovers_of_the_target_are_removed(tmp_path):
    others = [".x-settings", ".x-abcdefgh", ".x-abcdefg.part", ".xy-abcdefgh.part"]
    others += ["x-abcdefgh.part", ".x-ABCDEFGH.part", ".x-abcdefgh.part.txt", ".y-abcdefgh.old"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "far").mkdir()
    (tmp_path / ".x-aaaaaaaa.part").symlink_to(tmp_path / "far")
    before = names(tmp_path)
    (tmp_path / ".x-bbbbbbbb.part").write_text("left")
    a_file(tmp_path / "x")
    assert names(tmp_path) == sorted([*before, "x"])


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    a_folder(tmp_path / "x")
    (tmp_path / "x" / "mine").write_text("mine")
    with pytest.raises(OSError, match="x"):
        a_folder(tmp_path / "x")
    assert (tmp_path / "x" / "mine").exists() and names(tmp_path) == ["x"]
    a_folder(tmp_path / "x", replace=True)
    assert not (tmp_path / "x" / "mine").exists() and names(tmp_path) == ["x"]


@pytest.mark.parametrize("there", ["link", "file"])
def test_a_link_or_a_file_is_replaced_by_a_folder(tmp_path, there):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "mine").write_text("mine")
    if there == "link":
        (tmp_path / "x").symlink_to(tmp_path / "far")
    else:
        (tmp_path / "x").write_text("old")
    a_folder(tmp_path / "x", replace=True)
    assert names(tmp_path / "far") == ["mine"] and names(tmp_path) == ["far", "x"]
    assert (tmp_path / "x" / "inner" / "weights").read_text() == "all of it"


def test_what_was_set_aside_comes_back(tmp_path, monkeypatch):
    "Killed between two renames: the old one lies under another name, and nothing in its place."
    target, rename = tmp_path / "x", os.rename
    a_folder(target)
    (target / "mine").write_text("mine")

    def once(source, to):
        rename(source, to)
        kill()

    def killed():
        monkeypatch.setattr(os, "rename", once)
        a_folder(target, replace=True)

    assert apart(killed) == -signal.SIGKILL
    assert not target.exists() and len(names(tmp_path)) == 2
    remove_leftovers(target)
    assert names(tmp_path) == ["x"] and (target / "mine").exists()


def test_an_error_while_it_replaces_leaves_the_old_one(tmp_path, monkeypatch):
    target, rename = tmp_path / "x", os.rename
    a_folder(target)
    (target / "mine").write_text("mine")

    def second_fails(source, to):
        if str(source).endswith(".part"):
            raise OSError(28, "No space left on device")
        rename(source, to)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="No space left on device"):
        a_folder(target, replace=True)
    assert names(tmp_path) == ["x"] and (target / "mine").exists()


def test_where_there_are_no_locks_leftovers_stay(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / ".x-bbbbbbbb.part").write_text("whose?")
    a_file(tmp_path / "x"), a_folder(tmp_path / "y")
    assert names(tmp_path) == [".x-bbbbbbbb.part", "x", "y"]
