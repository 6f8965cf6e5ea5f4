"""Directories and files that are whole or not there, JSON that may be anything, locks."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from poetx.errors import UserError
from poetx.files import locked, new_directory, read_json, write_text


def fill(final: Path, *, fail: Exception | None = None) -> None:
    with new_directory(final, remedy="go on") as directory:
        (directory / "part").mkdir()
        (directory / "part" / "file").write_text("new")
        (directory / "other").write_text("new")
        if fail is not None:
            raise fail


def names(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def prepare(final: Path, before: str) -> None:
    if before != "nothing":
        final.mkdir(parents=True)
    if before == "old":
        (final / "old").write_text("old")


@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_a_directory_is_new_as_a_whole_or_as_it_was(tmp_path: Path, before: str) -> None:
    final = tmp_path / "a" / "final"
    prepare(final, before)
    then = names(tmp_path)
    with pytest.raises(UserError, match=r"final: .* written \(Disk quota exceeded\); free some space, then go"):
        fill(final, fail=OSError(122, "Disk quota exceeded"))
    with pytest.raises(UserError, match=r"\(Device busy\); make the place writable or choose another, then go on"):
        fill(final, fail=OSError(16, "Device busy"))
    with pytest.raises(KeyError):
        fill(final, fail=KeyError("ours"))
    assert names(tmp_path) == (then or ["a"])
    fill(final)
    assert names(final) == ["other", "part", "part/file"]
    assert names(final.parent) == ["final", "final/other", "final/part", "final/part/file"]


def test_an_empty_directory_stays_the_one_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a mounted one, or where the user stands: neither can be renamed."""
    monkeypatch.chdir(tmp_path)
    number = tmp_path.stat().st_ino
    fill(Path())
    assert names(Path()) == ["other", "part", "part/file"]
    assert tmp_path.stat().st_ino == number


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    for name in (".final.tmp", f".final.tmp-{os.getpid()}", ".final.tmp-0123abcd"):
        (tmp_path / name).mkdir()
    (tmp_path / ".final.tmp-file").write_text("a file")
    (tmp_path / "mine").write_text("mine")
    fill(tmp_path / "final")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "mine"]


@pytest.mark.parametrize("failing", ["write_text", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_text_file_is_the_new_one_or_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path, real = tmp_path / "a" / "page.html", getattr(Path, failing)
    write_text(path, "old")

    def fails(self: Path, *args: object, **options: object) -> None:
        real(self, *args, **options) if failing == "write_text" else None
        raise error

    monkeypatch.setattr(Path, failing, fails)
    match = r"page\.html: could not be written \(No space left .*\); free some space" if error.args else None
    with pytest.raises(UserError if error.args else KeyboardInterrupt, match=match):
        write_text(path, "new")
    monkeypatch.undo()
    assert (names(tmp_path), path.read_text()) == (["a", "a/page.html"], "old")


def test_a_text_file_is_no_directory_and_in_none_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "place").mkdir()
    with pytest.raises(UserError, match=r"place: is a directory; name a file in it"):
        write_text(tmp_path / "place", "text")
    with pytest.raises(UserError, match=r"page\.html: could not be written"):
        write_text(tmp_path / "file" / "page.html", "text")
    assert names(tmp_path) == ["file", "place"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        (b"", r"not JSON"),
        (b"\xff", r"not JSON"),
        (b"{" + b'"a": {' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"null", "holds NoneType, not a JSON object"),
        (b"[{}]", "holds list, not a JSON object"),
    ],
)
def test_json_that_is_no_object_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "facts.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"facts\.json: .*{message}|facts\.json: {message}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)
    path.write_text('{"a": 1}', encoding="utf-8-sig")  # as editors on Windows may write it
    assert read_json(path) == {"a": 1}


def test_a_lock_is_held_by_one_and_its_file_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, busy="in use", keep=False) as held:
        assert held
        with pytest.raises(UserError, match="in use"), locked(path, busy="in use"):
            pass
    assert not path.exists()
    with locked(path) as held:
        assert held
    assert path.exists()


def test_a_lock_whose_file_goes_when_it_is_let_go_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", [], []

    def hold(worker: int) -> None:
        for _ in range(150):
            with locked(path, keep=False):
                inside.append(worker)
                most.append(len(inside))
                inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, range(8)))
    assert max(most) == 1
    assert len(most) == 8 * 150


def test_of_several_that_make_the_same_directory_without_a_lock_the_first_one_stays(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with new_directory(final, remedy="try", alone=False) as second:
        (second / "b").write_text("second")
        with new_directory(final, remedy="try", alone=False) as first:
            (first / "a").write_text("first")
    assert [(path.name, path.read_text()) for path in final.iterdir()] == [("a", "first")]
    assert list(tmp_path.iterdir()) == [final]
    with new_directory(final, remedy="try", alone=False) as third:  # there already, so meant to be replaced
        (third / "c").write_text("third")
    assert [path.name for path in final.iterdir()] == ["c"]
