"""Reading what others may have damaged, and writing so that a file or directory is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from poetx.errors import UserError, one_line


def reason(error: BaseException) -> str:
    """Why a file could not be read or written, in a few words."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


def check_fetched(path: Path) -> None:
    """Raise :class:`UserError` where a clone without Git LFS has left what stands for a large file."""
    pointer = b"version https://git-lfs"
    with path.open("rb") as file:
        if file.read(len(pointer)) == pointer:
            raise UserError(f"{path}: a pointer of Git LFS, not the file itself; fetch that first (git lfs pull)")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: no such file, no JSON, too deeply nested, or another value than an object; the message has the path.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise UserError(f"{path}: not JSON ({one_line(error)})") from None
    except RecursionError:
        raise UserError(f"{path}: brackets nested too deeply to be read") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file beside itself and rename it, so that a kill leaves the former one or this one.

    Raises:
        UserError: the place is a directory, full or not writable; what was there is as it was.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a file in it")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise unwritten(path, error) from None


@contextlib.contextmanager
def new_directory(final: Path, *, remedy: str, sync: bool = False, alone: bool = True) -> Iterator[Path]:
    """A directory to fill, which becomes ``final`` at the end of the ``with`` block, or is removed after an exception.

    What was there before is replaced as a whole. An empty directory that exists is filled in place: it may be a mounted
    one, or where the user stands.

    Args:
        remedy: what to do once there is room to write, the end of the message.
        sync: have files and directories on the disk before the rename, as a checkpoint must be.
        alone: nobody else writes to ``final`` now: remove what killed processes left half-written. Otherwise others may
            be making the same, and the first one's stays.

    Raises:
        UserError: the disk is full or not writable; ``final`` is as it was.
    """
    inside = final.is_dir() and not final.is_symlink() and not any(final.iterdir())
    parent = final if inside else final.parent
    temporary, moved, first = _beside(final, parent), [], not (alone or os.path.lexists(final))
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if alone:
            for leftover in parent.glob(f".{glob.escape(final.name)}.tmp*"):
                remove(leftover)
        temporary.mkdir()
        yield temporary
        if sync:
            for path in (*temporary.iterdir(), temporary):
                sync_to_disk(path)
        if inside:
            for path in sorted(temporary.iterdir()):
                moved.append(path.replace(final / path.name))
            temporary.rmdir()
        elif first:
            try:
                temporary.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
                remove(temporary)
        else:
            _replace(temporary, final)
        if sync:
            sync_to_disk(parent)
    except BaseException as error:
        for path in (temporary, *moved):
            with contextlib.suppress(OSError):
                remove(path)
        if not is_write_error(error):
            raise
        raise UserError(f"{unwritten(final, error)}, then {remedy}") from None


def is_write_error(error: BaseException) -> bool:
    """Whether a disk refused. Writers in Rust (safetensors, tokenizers) say so with classes of their own."""
    if isinstance(error, UserError):
        return False
    return isinstance(error, OSError) or "os error" in str(error) or type(error).__name__ == "SafetensorError"


def unwritten(path: Path | str, error: BaseException) -> UserError:
    """One line about a file or directory that could not be written, and what to do."""
    return UserError(f"{path}: could not be written ({reason(error)}); {hint(error)}")


#: What to do about an error of the system, by its number.
_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST), "move what is there away, or choose another place"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "choose another place"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n)"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "see that the disk is well and there"),
    errno.ENOENT: "see that nobody removes it meanwhile",
}


def hint(error: BaseException) -> str:
    """What to do about an error of reading or writing."""
    if re.search(r"No space|os error (28|122|27)\b|too large", str(error)):
        return _HINTS[errno.ENOSPC]
    return _HINTS.get(getattr(error, "errno", None) or 0, "make the place writable or choose another")


def _beside(final: Path, parent: Path) -> Path:
    """A new hidden name, random because a process of the same number may have left one (in containers all are 1)."""
    return parent / f".{final.name}.tmp-{secrets.token_hex(4)}"


def _replace(new: Path, final: Path) -> None:
    """Rename over what is there; the old one goes only when the new one has its place."""
    old = _beside(final, final.parent) if os.path.lexists(final) else None
    if old is not None:
        final.rename(old)
    try:
        new.rename(final)
    except OSError:
        if old is not None:
            old.rename(final)
        raise
    if old is not None:
        remove(old)


def remove(path: Path) -> None:
    """Remove a directory with all that is in it, a file, or a link (not what it points to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_at_once(path: Path) -> None:
    """Remove a directory or file that others may be reading: they find the whole of it, or nothing."""
    gone = _beside(path, path.parent)
    path.rename(gone)
    remove(gone)


def sha256(path: Path) -> str:
    """Hash of a file, hexadecimal; about a second a GB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_to_disk(path: Path) -> None:
    """Have a file's contents, or a directory's names, on the disk."""
    if path.is_dir() and os.name == "nt":  # which opens no directories, and syncs only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, busy: str | None = None, keep: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path`` in the ``with`` block; the system lets go of it when the process ends in any way.

    Yields False, and holds nothing, where the file system or the operating system (Windows) has no such locks.

    Args:
        busy: what :class:`UserError` says when another process holds it; without, wait until it lets go.
        keep: leave the file, which is empty, afterwards.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    held = None
    while held is None:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(str(busy)) from None
            except OSError:
                held = False
            else:  # a file that its last holder has removed meanwhile locks nothing
                held = True if _is_at(file, path) else None
            if held is not None:
                try:
                    yield held
                finally:
                    if held and not keep:
                        path.unlink(missing_ok=True)


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether ``path`` still names the open ``file``; another process may remove either at any moment."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
