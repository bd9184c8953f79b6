"""Small blobs on their way into a tracked directory: in packs, or where they are few in files of their own.

Guarantees
----------
- What was added is in the directory once :meth:`PackWriter.end` has returned, and ``placed`` says where.
- A pack that could not be written leaves no file; what was to go into it is written by the next attempt.
- Memory is bounded by the records of one pack, whatever there is to pack.
- Packs do not rot, and do not grow in number with the saves: see :func:`due`. What rewriting them comes to,
  a damaged record or a full disk, keeps no save from being made, and hides no damage.

One thread uses a writer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar
from uuid import UUID, uuid4

from fbcache.checkpoint.blobset import BlobSet
from fbcache.checkpoint.manifest import Blob, Pack
from fbcache.checkpoint.packs import MOST_RECORDS, copy_records, digest_of, room_in, slot_of
from fbcache.codec.frames import Frames
from fbcache.errors import CorruptBlobError, StorageError
from fbcache.store.records import body_of, head_of

T = TypeVar("T")

#: Fewer small blobs than this in one save get files of their own: a pack would be one file too, and its
#: contents would have to be copied to be restored.
LEAST: Final = 16


class PackWriter:
    """Brings small blobs into ``blobs`` for one save.

    Attributes
    ----------
    placed : dict
        By key, the blobs that have been brought in or moved to another pack, as the manifest is to have them.
    new : dict
        By key, the lengths of those brought in: of records, and of files of their own.
    files : list of UUID
        Keys of the files made, and of those whose making failed.
    """

    def __init__(self, blobs: BlobSet) -> None:
        self._blobs = blobs
        self.placed: dict[UUID, Blob] = {}
        self.new: dict[UUID, int] = {}
        self.files: list[UUID] = []
        self._packing = False  # whether there were enough
        self._few: dict[UUID, tuple[Blob, Frames]] = {}  # until there are
        self._records = bytearray()
        self._inside: dict[UUID, Blob] = {}  # what is in `_records`, with offsets in it
        self._copied: list[UUID] = []  # the last of them, which are not new
        self._new_end = 0  # where in `_records` those begin, if there are any
        self._fresh = 0  # bytes of new records, in all

    @property
    def any(self) -> bool:
        """Whether anything new was added."""
        return bool(self.new or self._inside or self._few)

    def known(self, key: UUID) -> Blob | None:
        """Return what is known of a blob that was added; where it lies is known once it is in ``placed``."""
        few = self._few.get(key)
        return few[0] if few is not None else self.placed.get(key) or self._inside.get(key)

    def add(self, key: UUID, frames: Frames, nbytes: int) -> Blob:
        """Take in the blob of a value of ``nbytes``; return what is known of it by now.

        Raises
        ------
        StorageError
            A pack is full, and could not be written. This blob is not taken in; all others still are.
        """
        if self._packing:
            self._pack_few()
            return self._add_record(key, frames, nbytes)
        blob = Blob(nbytes, 0, frames.codec, frames.pickled, 0)
        self._few[key] = blob, frames
        self._packing = len(self._few) >= LEAST
        return blob

    def _pack_few(self) -> None:
        while self._few:
            key, (blob, frames) = next(iter(self._few.items()))
            self._add_record(key, frames, blob.nbytes)
            del self._few[key]

    def _add_record(self, key: UUID, frames: Frames, nbytes: int) -> Blob:
        body, length = body_of(frames)
        head = head_of(slot_of(key), body, length)
        size = len(head) + len(body)
        self._make_room(size)
        blob = Blob(nbytes, size, frames.codec, frames.pickled, digest_of(head), None, len(self._records))
        self._records += head
        self._records += body
        self._inside[key] = blob
        self._fresh += size
        return blob

    def _make_room(self, nbytes: int) -> None:
        if len(self._records) + nbytes > MOST_RECORDS:
            self._write_pack()

    def end(self, rows: Mapping[UUID, Blob], *, idle: bool) -> None:
        """Bring all in, and rewrite packs that are due; may be called again, after an error too.

        Parameters
        ----------
        rows : mapping
            What the checkpoint is to have, by key.
        idle : bool
            Whether it has nothing that was not in the directory.

        Raises
        ------
        StorageError
            Something new could not be written.
        """
        if self._packing:
            self._pack_few()
        else:
            self._write_few(rows)
        former = {key: blob for key, blob in rows.items() if blob.pack is not None and key not in self.placed}
        try:
            for pack, members in due(former, self._fresh, idle=idle):
                self._copy(pack, members)
            self._write_pack()
        except StorageError:
            if not self._copied:
                raise
            # There is room for what is new, perhaps. Former packs stay as they are.
            self._drop_copies()
            self._write_pack()
        except BaseException:
            self._drop_copies()
            raise

    def _write_few(self, rows: Mapping[UUID, Blob]) -> None:
        self._few = {key: few for key, few in self._few.items() if key in rows}  # some were refused perhaps
        while self._few:
            key, (blob, frames) = next(iter(self._few.items()))
            is_new = not self._blobs.has(key)
            self.files.append(key)
            there = self._blobs.bring_in(key, lambda blobs: blobs.write(key, frames))  # noqa: B023  # called at once
            self.placed[key] = Blob(blob.nbytes, there.disk_bytes, there.codec, there.pickled, there.digest)
            if is_new:
                self.new[key] = there.disk_bytes
            del self._few[key]

    def _copy(self, pack: Pack, members: Sequence[tuple[UUID, Blob]]) -> None:
        """Have the sound ones of these records in the pack being made."""
        records = copy_records(self._blobs.disk, self._blobs.places, pack, members)
        for (key, blob), record in zip(members, _until_the_disk_fails(records), strict=False):
            if isinstance(record, CorruptBlobError):  # its reader will hear of it
                continue
            self._make_room(len(record))
            start = len(self._records)
            if not self._copied:
                self._new_end = start
            self._copied.append(key)
            self._records += record
            self._inside[key] = Blob(
                blob.nbytes, blob.disk_bytes, blob.codec, blob.pickled, blob.digest, None, start
            )

    def _drop_copies(self) -> None:
        if self._copied:
            for key in self._copied:
                self._inside.pop(key, None)
            del self._records[self._new_end :]
            self._copied.clear()

    def _write_pack(self) -> None:
        if not self._inside:
            return
        key = uuid4()
        self.files.append(key)
        try:
            pack = self._blobs.bring_in_pack(key, self._records)
        except BaseException:
            self._records = bytearray(self._records)  # the error's frames may have views of the other
            raise
        start = pack.nbytes - len(self._records)
        for each, blob in self._inside.items():
            self.placed[each] = Blob(
                blob.nbytes, blob.disk_bytes, blob.codec, blob.pickled, blob.digest, pack, start + blob.offset
            )
        moved = set(self._copied)
        self.new.update((each, blob.disk_bytes) for each, blob in self._inside.items() if each not in moved)
        self._records = bytearray()
        self._inside = {}
        self._copied = []


def _until_the_disk_fails(records: Iterator[T]) -> Iterator[T]:
    try:
        yield from records
    except StorageError:  # its readers will hear of it
        return


def due(
    rows: Mapping[UUID, Blob], fresh: int, *, idle: bool
) -> list[tuple[Pack, list[tuple[UUID, Blob]]]]:
    """Return the packs that are to be rewritten at a save, each with its live records in order.

    So is one of which less than half is live; and a smaller one whose live part is no larger than all that is
    packed anew, so that each record is copied a logarithmic number of times, and as many packs there are at
    the most besides large ones. Where nothing is new, only what is less than a quarter live is rewritten.

    Parameters
    ----------
    rows : mapping
        What is live, by key; all of it in packs.
    fresh : int
        Bytes of records that are packed anew.
    idle : bool
        Whether nothing is new.
    """
    packs: dict[Pack, list[tuple[UUID, Blob]]] = {}
    for row in rows.items():
        assert row[1].pack is not None
        packs.setdefault(row[1].pack, []).append(row)
    sizes = {pack: _length(members) for pack, members in packs.items()}
    most_dead = 4 if idle else 2
    chosen = [pack for pack in packs if most_dead * sizes[pack] < room_in(pack)]
    if not idle:
        fresh += sum(sizes[pack] for pack in chosen)
        for pack in sorted(packs.keys() - set(chosen), key=sizes.__getitem__):
            if sizes[pack] <= fresh and 2 * sizes[pack] <= MOST_RECORDS:  # others would be as large again
                chosen.append(pack)
                fresh += sizes[pack]
    return [(pack, sorted(packs[pack], key=lambda row: row[1].offset)) for pack in chosen]


def _length(members: Iterable[tuple[UUID, Blob]]) -> int:
    return sum(blob.disk_bytes for _, blob in members)
