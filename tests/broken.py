"""Stores and codecs that break one promise each, and the test of the kits that has to notice."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID, uuid4

import numpy as np

from fbcache.codec import MsgpackCodec
from fbcache.codec.frames import Frames
from fbcache.errors import (
    CorruptBlobError,
    DiskFullError,
    PickleRefusedError,
    StorageError,
    UnsupportedTypeError,
)
from fbcache.store.files import FileStore
from fbcache.store.protocol import Loan, StoreLimits

# ------------------------------------------------------------------ stores


class Store(FileStore):
    """Keeps all promises, and writes many one by one; what derives from it breaks one.

    Attributes
    ----------
    fails : str
        The test that notices.
    """

    fails: ClassVar[str]

    def write_many(self, items: Sequence[tuple[UUID, Frames]]) -> list[int | StorageError]:
        results: list[int | StorageError] = []
        for key, frames in items:
            try:
                results.append(self.write(key, frames))
            except StorageError as error:
                results.append(error)
        return results


class LosesTheNote(Store):
    fails = "test_frames_come_back_as_they_were"

    def read(self, key: UUID, **how: Any) -> Frames:
        frames = super().read(key, **how)
        return Frames(frames.codec, frames.tree, frames.buffers)


class TakesBytesOnly(Store):
    fails = "test_any_contiguous_memory_can_be_a_buffer"

    def write(self, key: UUID, frames: Frames) -> int:
        assert all(isinstance(buffer, bytes) for buffer in frames.buffers)
        return super().write(key, frames)


class KeepsTheWritersMemory(Store):
    fails = "test_a_blob_is_a_copy_of_what_was_written"

    def write(self, key: UUID, frames: Frames) -> int:
        self.__dict__.setdefault("kept", {})[key] = frames
        return super().write(key, frames)

    def read(self, key: UUID, **how: Any) -> Frames:
        super().read(key, **how)
        return self.__dict__["kept"][key]


class NeverWriteable(Store):
    fails = "test_buffers_are_bytes_and_as_writeable_as_asked_for"

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        return super().read(key, writable=False, verify=verify)


class AlwaysWriteable(Store):
    fails = "test_buffers_are_bytes_and_as_writeable_as_asked_for"

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        return super().read(key, writable=True, verify=verify)


class SharesMemoryAmongReaders(Store):
    fails = "test_writeable_buffers_are_memory_of_their_own"

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        read = self.__dict__.setdefault("read_before", {})
        if (key, writable) not in read:
            read[key, writable] = super().read(key, writable=writable, verify=verify)
        return read[key, writable]


class ReusesMemory(Store):
    fails = "test_what_was_read_outlives_its_blob_and_the_store"

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        frames = super().read(key, writable=True, verify=verify)
        self.__dict__.setdefault("given", {})[key] = frames
        buffers = [memoryview(buffer).toreadonly() for buffer in frames.buffers]
        return Frames(frames.codec, frames.tree, buffers, frames.pickled)

    def delete(self, key: UUID) -> None:
        super().delete(key)
        for buffer in self.__dict__.get("given", {}).pop(key, Frames("", b"", ())).buffers:
            memoryview(buffer)[:] = bytes(len(buffer))


class ShowsAPartFirst(Store):
    fails = "test_a_blob_is_there_whole_or_not_at_all"

    def write(self, key: UUID, frames: Frames) -> int:
        seen = self.__dict__["seen"] = threading.Event()
        super().write(key, Frames(frames.codec, frames.tree, frames.buffers[:1], frames.pickled))
        seen.wait(10)
        return super().write(key, frames)

    def read(self, key: UUID, **how: Any) -> Frames:
        frames = super().read(key, **how)
        self.__dict__["seen"].set()
        return frames


class RaisesKeyError(Store):
    fails = "test_what_is_not_there_is_damaged"

    def read(self, key: UUID, **how: Any) -> Frames:
        try:
            return super().read(key, **how)
        except CorruptBlobError as error:
            raise KeyError(key) from error


class NamesNoKey(Store):
    fails = "test_what_is_not_there_is_damaged"

    def read(self, key: UUID, **how: Any) -> Frames:
        try:
            return super().read(key, **how)
        except CorruptBlobError as error:
            raise CorruptBlobError(error.reason) from error


class NeverVerifies(Store):
    fails = "test_damage_to_a_buffer_is_found_by_its_checksum"

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        return super().read(key, writable=writable, verify=False)


class TrustsHeaders(Store):
    fails = "test_damage_to_a_header_is_always_found"

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        try:
            return super().read(key, writable=writable, verify=verify)
        except CorruptBlobError:
            if verify:
                raise
            return Frames("kit", b"whatever is there", ())


class GivesUpAfterDamage(Store):
    fails = "test_damage_to_one_blob_leaves_the_others"

    def read(self, key: UUID, **how: Any) -> Frames:
        if "is_broken" in self.__dict__:
            raise StorageError("something was damaged")
        try:
            return super().read(key, **how)
        except CorruptBlobError:
            self.__dict__["is_broken"] = True
            raise


class LeavesAFile(Store):
    fails = "test_a_failed_write_leaves_nothing"

    def write(self, key: UUID, frames: Frames) -> int:
        try:
            return super().write(key, frames)
        except StorageError:
            Path(self.path, f"{key}.tmp").write_bytes(b"half a blob")
            raise


class KeepsTheRoom(Store):
    fails = "test_a_failed_write_leaves_nothing"

    def write(self, key: UUID, frames: Frames) -> int:
        try:
            return super().write(key, frames)
        except StorageError:
            self._ledger.reserve(frames.nbytes, 2**40)
            raise


class RaisesAsItCame(Store):
    fails = "test_a_failed_write_leaves_nothing"

    def write(self, key: UUID, frames: Frames) -> int:
        try:
            return super().write(key, frames)
        except StorageError as error:
            raise OSError(error.errno, "as it came") from error


class NeverRecovers(Store):
    fails = "test_a_failed_write_leaves_nothing"

    def write(self, key: UUID, frames: Frames) -> int:
        if key in self.__dict__.setdefault("failed", set()):
            raise StorageError("it failed before")
        try:
            return super().write(key, frames)
        except StorageError:
            self.__dict__["failed"].add(key)
            raise


class HasNoLimits(Store):
    fails = "test_a_limit_in_the_way_is_a_full_disk"

    def __init__(self, directory: str, *, limits: StoreLimits, **options: Any) -> None:
        super().__init__(directory, **options)


class SaysTooLittle(Store):
    fails = "test_a_limit_in_the_way_is_a_full_disk"

    def write(self, key: UUID, frames: Frames) -> int:
        try:
            return super().write(key, frames)
        except DiskFullError as error:
            raise DiskFullError("no room", needed=0, free=0) from error


class FillsTheDisk(HasNoLimits):
    fails = "test_min_free_is_left_free"


class CountsNothing(Store):
    fails = "test_room_is_counted"
    disk_bytes = 0  # type: ignore[assignment]


class SaysThereIsRoom(Store):
    fails = "test_room_is_counted"
    bytes_free = 2**40  # type: ignore[assignment]


class HasNoLimitsAtOnce(HasNoLimits):
    fails = "test_writers_at_once_stay_within_the_limit"


class MixesThreadsUp(Store):
    fails = "test_threads_write_read_and_delete_at_once"

    def write(self, key: UUID, frames: Frames) -> int:
        self.__dict__["last"] = key
        return super().write(key, frames)

    def read(self, key: UUID, **how: Any) -> Frames:
        return super().read(self.__dict__["last"], **how)


class DeletesOnce(Store):
    fails = "test_deleting_is_for_good_and_may_be_repeated"

    def delete(self, key: UUID) -> None:
        if not os.path.exists(self.locate(key)):
            raise KeyError(key)
        super().delete(key)


class SaysPaths(Store):
    fails = "test_places_are_text"

    def locate(self, key: UUID) -> Any:
        return Path(super().locate(key))


class LeavesBlobs(Store):
    fails = "test_close_removes_what_the_store_made_and_nothing_else"

    def close(self) -> None:
        pass


class RemovesEverything(Store):
    fails = "test_close_removes_what_the_store_made_and_nothing_else"

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.path, ignore_errors=True)


class IsNeverClosed(Store):
    fails = "test_a_closed_store_refuses_and_its_directory_can_be_used_again"

    def write(self, key: UUID, frames: Frames) -> int:
        self._ledger._closed = False
        return super().write(key, frames)


class LeadsToAnotherFile(Store):
    fails = "test_the_file_of_a_blob_is_exactly_the_blob"

    def write(self, key: UUID, frames: Frames) -> int:
        nbytes = super().write(key, frames)
        with open(super().file_of(key), "rb") as file:
            Path(self.path, key.hex).write_bytes(file.read() + b"and more")
        return nbytes

    def file_of(self, key: UUID) -> str:
        path = Path(self.path, key.hex)
        return str(path) if path.exists() else super().file_of(key)


class GivesBackTwice(Store):
    fails = "test_a_borrowed_blob_is_read_where_it_is_and_given_back_once"

    def delete(self, key: UUID) -> None:
        loan = self._loans.get(key)
        super().delete(key)
        if loan is not None:
            loan.release()


class RemovesWhatIsLent(Store):
    fails = "test_a_borrowed_blob_is_read_where_it_is_and_given_back_once"

    def delete(self, key: UUID) -> None:
        path = self.file_of(key)
        super().delete(key)
        if os.path.exists(path):
            os.unlink(path)


class KeepsLoans(Store):
    fails = "test_closing_gives_back_what_is_borrowed"

    def close(self) -> None:
        self._loans.clear()
        super().close()


class TrustsLenders(Store):
    fails = "test_a_borrowed_blob_that_is_another_than_was_lent_is_damaged"

    def borrow(self, key: UUID, loan: Loan) -> None:
        loan.digest = None
        super().borrow(key, loan)


class ForgetsTheLast(Store):
    fails = "test_many_blobs_are_written_at_once"

    def write_many(self, items: Sequence[tuple[UUID, Frames]]) -> list[int | StorageError]:
        return [*super().write_many(items[:-1]), *(frames.nbytes for _, frames in items[-1:])]


class FailsTogether(Store):
    fails = "test_of_many_blobs_those_without_room_fail_alone"

    def write_many(self, items: Sequence[tuple[UUID, Frames]]) -> list[int | StorageError]:
        results = super().write_many(items)
        failed = [result for result in results if isinstance(result, StorageError)]
        for key, _ in items if failed else ():
            self.delete(key)
        return failed * len(items) if failed else results


class RaisesForMany(Store):
    fails = "test_many_blobs_fail_on_a_disk_that_does_not_work"

    def write_many(self, items: Sequence[tuple[UUID, Frames]]) -> list[int | StorageError]:
        return [self.write(key, frames) for key, frames in items]


# ------------------------------------------------------------------ codecs


class Codec(MsgpackCodec):
    """Keeps all promises; what derives from it breaks one."""

    fails: ClassVar[str]


class Rounds(Codec):
    fails = "test_values_come_back_as_they_were"

    def encode(self, value: Any, **how: Any) -> Frames:
        return super().encode(round(value) if type(value) is float else value, **how)


class PicklesWithoutLeave(Codec):
    fails = "test_values_come_back_as_they_were"

    def encode(self, value: Any, **how: Any) -> Frames:
        frames = super().encode(value, **how)
        return Frames(frames.codec, frames.tree, frames.buffers, "value: pickled")


class HasTwoNames(Codec):
    fails = "test_frames_carry_the_codecs_name"
    name = "another"


class LeavesArraysAsBuffers(Codec):
    fails = "test_a_tree_is_bytes_and_buffers_are_memory_in_one_piece"

    def encode(self, value: Any, **how: Any) -> Frames:
        frames = super().encode(value, **how)
        buffers = [np.frombuffer(buffer, "<u2").data for buffer in frames.buffers]
        return Frames(frames.codec, frames.tree, buffers, frames.pickled)


class Sorts(Codec):
    fails = "test_encoding_leaves_the_value_as_it_was"

    def encode(self, value: Any, **how: Any) -> Frames:
        frames = super().encode(value, **how)
        if type(value) is list:
            value.reverse()
        return frames


class Freezes(Codec):
    fails = "test_encoding_leaves_the_value_as_it_was"

    def encode(self, value: Any, **how: Any) -> Frames:
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
        return super().encode(value, **how)


class DecodesOnce(Codec):
    fails = "test_decoding_leaves_the_frames_as_they_were"

    def decode(self, frames: Frames, **how: Any) -> Any:
        value = super().decode(frames, **how)
        assert isinstance(frames.buffers, list)
        frames.buffers.clear()
        return value


class CopiesWhatItEncodes(Codec):
    fails = "test_raw_memory_is_not_copied_when_it_is_encoded"

    def encode(self, value: Any, **how: Any) -> Frames:
        frames = super().encode(value, **how)
        return Frames(frames.codec, frames.tree, [bytes(buffer) for buffer in frames.buffers], frames.pickled)


class CopiesWhatItDecodes(Codec):
    fails = "test_raw_memory_comes_out_as_a_view_that_is_as_writeable_as_asked_for"

    def decode(self, frames: Frames, **how: Any) -> Any:
        buffers = [memoryview(bytearray(buffer)) for buffer in frames.buffers]
        return super().decode(Frames(frames.codec, frames.tree, buffers, frames.pickled), **how)


class IsWriteable(Codec):
    fails = "test_raw_memory_comes_out_as_a_view_that_is_as_writeable_as_asked_for"

    def decode(self, frames: Frames, *, writable: bool, allow_pickle: bool) -> Any:
        return super().decode(frames, writable=True, allow_pickle=allow_pickle)


class Allows(Codec):
    fails = "test_pickle_takes_leave"

    def encode(self, value: Any, *, allow_pickle: bool) -> Frames:
        return super().encode(value, allow_pickle=True)


class NamesNoPart(Codec):
    fails = "test_pickle_takes_leave"

    def encode(self, value: Any, *, allow_pickle: bool) -> Frames:
        try:
            return super().encode(value, allow_pickle=allow_pickle)
        except PickleRefusedError as error:
            raise PickleRefusedError("no", "") from error


class SaysNothing(Codec):
    fails = "test_pickle_takes_leave"

    def encode(self, value: Any, **how: Any) -> Frames:
        frames = super().encode(value, **how)
        return Frames(frames.codec, frames.tree, frames.buffers)


class Recurses(Codec):
    fails = "test_what_contains_itself_or_is_too_deep_is_refused"

    def encode(self, value: Any, **how: Any) -> Frames:
        try:
            return super().encode(value, **how)
        except UnsupportedTypeError as error:
            raise RecursionError from error


class Remembers(Codec):
    fails = "test_calls_leave_nothing_behind"

    def encode(self, value: Any, **how: Any) -> Frames:
        frames = super().encode([uuid4(), value], **how)
        return Frames(frames.codec, frames.tree, frames.buffers, frames.pickled)

    def decode(self, frames: Frames, **how: Any) -> Any:
        return super().decode(frames, **how)[1]


class KeepsTheValueMeanwhile(Codec):
    fails = "test_threads_encode_and_decode_at_once"

    def __init__(self) -> None:
        super().__init__()
        self._both = threading.Barrier(2, timeout=10)
        self._value: Any = None

    def encode(self, value: Any, **how: Any) -> Frames:
        self._value = value
        if not self._both.broken:
            try:
                self._both.wait()
            except threading.BrokenBarrierError:
                pass
        return super().encode(self._value, **how)


class TakesAnyFrames(Codec):
    fails = "test_frames_of_another_codec_are_refused"

    def decode(self, frames: Frames, **how: Any) -> Any:
        return super().decode(Frames(self.name, frames.tree, frames.buffers, frames.pickled), **how)


class TrustsTheNote(Codec):
    fails = "test_pickles_are_refused_and_no_code_runs"

    def decode(self, frames: Frames, *, writable: bool, allow_pickle: bool) -> Any:
        return super().decode(frames, writable=writable, allow_pickle=allow_pickle or frames.pickled is None)


class LetsErrorsThrough(Codec):
    fails = "test_random_trees_give_typed_errors_or_a_value"

    def decode(self, frames: Frames, **how: Any) -> Any:
        try:
            return super().decode(frames, **how)
        except CorruptBlobError as error:
            raise IndexError from error


class LetsErrorsOfChangedTreesThrough(LetsErrorsThrough):
    fails = "test_changed_trees_give_typed_errors_or_a_value"


class TakesMemory(Codec):
    fails = "test_changed_trees_give_typed_errors_or_a_value"

    def decode(self, frames: Frames, **how: Any) -> Any:
        bytearray(100 << 20)
        return super().decode(frames, **how)


class TakesAnyLength(Codec):
    fails = "test_trees_that_end_early_are_damaged"

    def decode(self, frames: Frames, **how: Any) -> Any:
        try:
            return super().decode(frames, **how)
        except CorruptBlobError:
            return None


class TakesAnyBuffers(Codec):
    fails = "test_other_buffers_give_typed_errors_or_a_value"

    def decode(self, frames: Frames, **how: Any) -> Any:
        return super().decode(frames, **how) if frames.buffers else None
