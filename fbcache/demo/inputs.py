"""Arrays of the user's own: ``.npy`` files, and the members of ``.npz`` archives.

Guarantees: no pickle is ever loaded; an array is checked by its header before any of it is read;
a member is unpacked to a file of its own, in a directory that the caller removes, so that it is
no more in memory than any other.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fbcache.demo.matrices import InputError, StoredMatrix

_SUFFIX: Final = ".npy"


@dataclass(frozen=True, slots=True)
class Source:
    """One array: a ``.npy`` file, or the member of an archive."""

    path: Path
    member: str | None = None

    @property
    def label(self) -> str:
        """What to call it."""
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"


def find_arrays(paths: Iterable[str]) -> list[Source]:
    """Return the arrays at ``paths``, in order; an archive stands for all of its members.

    Raises
    ------
    InputError
        There is no such file or member, or it is neither a ``.npy`` file nor a ``.npz`` archive.
    """
    return [source for path in paths for source in _find(path)]


def open_matrix(source: Source, side: int, scratch: Path) -> StoredMatrix:
    """Return the matrix that ``source`` is.

    Parameters
    ----------
    side : int
        Rows and columns of a tile.
    scratch : Path
        A directory to unpack members of archives to.

    Raises
    ------
    InputError
        It is damaged, empty, not numeric, or of a shape that is no matrix.
    """
    path = source.path if source.member is None else _unpack(source, scratch)
    array = _map(source.label, path)
    _check(source.label, array)
    return StoredMatrix(source.label, path, array, side)


def _find(given: str) -> Sequence[Source]:
    path, member = Path(given), None
    if not path.exists():
        before, colon, after = given.rpartition(":")
        if not (colon and Path(before).is_file()):
            raise InputError(f"{given}: there is no such file")
        path, member = Path(before), after
    if not path.is_file():
        raise InputError(f"{given}: this is not a file; give .npy or .npz files")
    if not zipfile.is_zipfile(path):
        if member is not None:
            raise InputError(f"{path}: this is not a .npz archive, so it has no member {member!r}")
        return [Source(path)]
    members = _members(path)
    if member is None:
        return [Source(path, name) for name in members]
    if member not in members:
        raise InputError(f"{path}: it has no array {member!r}; it has {', '.join(map(repr, members))}")
    return [Source(path, member)]


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(_SUFFIX) for name in archive.namelist() if name.endswith(_SUFFIX)]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: this archive cannot be read: {error}") from error
    if not names:
        raise InputError(f"{path}: there is no array in this archive; numpy.savez makes such files")
    return names


def _unpack(source: Source, scratch: Path) -> Path:
    """Copy a member to a file, by a name of our own, for its own may point anywhere."""
    target = scratch / f"{len(list(scratch.iterdir()))}{_SUFFIX}"
    try:
        with (
            zipfile.ZipFile(source.path) as archive,
            archive.open(f"{source.member}{_SUFFIX}") as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(f"{source.label}: this archive is damaged, or of a kind unknown: {error}") from error
    return target


def _map(label: str, path: Path) -> npt.NDArray[np.generic]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except PermissionError as error:
        raise InputError(f"{label}: this file may not be read: {error.strerror}") from error
    except (ValueError, EOFError, OSError) as error:
        if "Python objects" in str(error):
            reason = "it holds Python objects, which only pickle can load; save an array of numbers"
        elif path.stat().st_size == 0:
            reason = "it is empty"
        else:
            reason = "it is no whole .npy file; numpy.save makes such files"
        raise InputError(f"{label}: {reason}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{label}: an archive in an archive is not looked into; unpack it first")
    return array


def _check(label: str, array: npt.NDArray[np.generic]) -> None:
    if array.dtype.kind == "c":
        raise InputError(f"{label}: complex numbers are not supported; save real and imaginary parts")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{label}: its elements are {array.dtype}, and not numbers")
    if array.ndim == 0:
        raise InputError(f"{label}: a single number is no matrix")
    if array.size == 0:
        raise InputError(f"{label}: there is nothing in it, its shape being {array.shape}")
    if array.ndim > 2 and not array.flags.c_contiguous:
        raise InputError(
            f"{label}: of more than two axes and in Fortran order; save numpy.ascontiguousarray of it"
        )
