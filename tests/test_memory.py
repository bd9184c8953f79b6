"""Sizes as people write them, and the limits of containers on made-up /proc trees."""

from __future__ import annotations

import resource
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from fbcache import memory
from fbcache.memory import default_budget, parse_size, resident_memory, usable_memory

UNLIMITED_V1 = "9223372036854771712"
GB = 10**9


@pytest.mark.parametrize(
    ("spec", "nbytes"),
    [
        (1, 1),
        (2**63 - 1, 2**63 - 1),
        (2e9, 2 * GB),
        (1536.5, 1536),
        (np.int64(4096), 4096),
        (np.float64(4096), 4096),
        ("1", 1),
        ("12345", 12345),
        ("100B", 100),
        ("2GB", 2 * GB),
        ("2gb", 2 * GB),
        ("2 G", 2 * GB),
        (" 512MiB ", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("512Mi", 512 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        (".5KB", 500),
        ("1.KB", 1000),
        ("3TB", 3 * 10**12),
        ("1PiB", 2**50),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(spec: int | float | str, nbytes: int) -> None:
    assert parse_size(spec) == nbytes and type(parse_size(spec)) is int


def test_shares_and_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "usable_memory", lambda: 8 * GB)
    assert parse_size("50%") == 4 * GB
    assert parse_size("12.5 %") == GB
    assert parse_size("100%") == 8 * GB
    assert parse_size(None) == default_budget() == 4 * GB


@pytest.mark.parametrize(
    "spec", [True, False, b"2GB", [1], object(), 1j, Fraction(5, 2), np.float32(3), np.True_]
)
def test_what_is_no_size_is_a_type_error_that_says_what_would_do(spec: object) -> None:
    with pytest.raises(TypeError, match=r"min_free must not be of type.*'2GB'"):
        parse_size(spec, name="min_free")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [
        0,
        -1,
        0.5,
        -2e9,
        float("nan"),
        float("inf"),
        float("-inf"),
        2**63,
        1e30,
        "0",
        "-1GB",
        "",
        "GB",
        "2 XB",
        "2GBs",
        "1,5GB",
        "1e9",
        "1_000",
        "nan",
        "inf",
        "50%%",
        "101%",
        "0%",
        "99999999TB",
        "9" * 400 + "%",
        "9" * 400 + ".5GB",
        "٣GB",
    ],
)
def test_absurd_sizes_are_value_errors_that_say_what_would_do(spec: int | float | str) -> None:
    with pytest.raises(ValueError, match=r"memory.*'2GB', '512MiB' or '50%'"):
        parse_size(spec)


def test_the_least_size_can_be_chosen() -> None:
    assert parse_size(0, least=0) == 0
    with pytest.raises(ValueError, match="at least 100 bytes"):
        parse_size(99, least=100)


# ------------------------------------------------------------------ what may be used


class FakeRoot:
    """A tree with the parts of /proc and /sys that matter."""

    def __init__(self, path: Path, cgroup: str, mountinfo: str) -> None:
        self.path = path
        (path / "proc/self").mkdir(parents=True)
        (path / "proc/self/cgroup").write_text(cgroup)
        (path / "proc/self/mountinfo").write_text(mountinfo)

    def limit(self, file: str, text: str) -> None:
        target = self.path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def usable(self) -> int:
        return usable_memory(self.path)


@pytest.fixture(autouse=True)
def a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Total:
        total = 64 * GB

    monkeypatch.setattr(psutil, "virtual_memory", Total)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


V2_MOUNT = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
OTHER_MOUNTS = (
    "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
)


def test_without_limits_it_is_physical_memory(tmp_path: Path) -> None:
    assert usable_memory(tmp_path) == 64 * GB
    assert default_budget() <= 32 * GB


def test_v2_the_least_limit_up_to_the_top(tmp_path: Path) -> None:
    root = FakeRoot(tmp_path, "0::/user.slice/job\n", OTHER_MOUNTS + V2_MOUNT)
    root.limit("sys/fs/cgroup/user.slice/job/memory.max", "max\n")
    assert root.usable() == 64 * GB
    root.limit("sys/fs/cgroup/user.slice/memory.max", f"{8 * GB}\n")
    assert root.usable() == 8 * GB
    root.limit("sys/fs/cgroup/user.slice/job/memory.max", f"{4 * GB}\n")
    assert root.usable() == 4 * GB


def test_v2_in_a_namespace_the_mount_is_the_group(tmp_path: Path) -> None:
    root = FakeRoot(tmp_path, "0::/\n", OTHER_MOUNTS + V2_MOUNT)
    root.limit("sys/fs/cgroup/memory.max", f"{2 * GB}\n")
    assert root.usable() == 2 * GB


def test_v2_a_group_outside_of_the_namespace(tmp_path: Path) -> None:
    root = FakeRoot(tmp_path, "0::/../../elsewhere\n", V2_MOUNT)
    root.limit("sys/fs/cgroup/memory.max", f"{2 * GB}\n")
    root.limit("sys/elsewhere/memory.max", "1\n")
    assert root.usable() == 2 * GB


def test_v1_the_least_limit_up_to_the_top(tmp_path: Path) -> None:
    root = FakeRoot(
        tmp_path, "3:cpu,cpuacct:/a\n4:memory:/outer/inner\n1:name=systemd:/\n", OTHER_MOUNTS + V1_MOUNT
    )
    root.limit("sys/fs/cgroup/memory/memory.limit_in_bytes", UNLIMITED_V1)
    root.limit("sys/fs/cgroup/memory/outer/memory.limit_in_bytes", f"{3 * GB}\n")
    root.limit("sys/fs/cgroup/memory/outer/inner/memory.limit_in_bytes", f"{UNLIMITED_V1}\n")
    assert root.usable() == 3 * GB


def test_v1_in_a_container_that_sees_only_its_own_part(tmp_path: Path) -> None:
    """Docker without namespaces: the mount's root is the container's group."""
    mount = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    root = FakeRoot(tmp_path, "4:memory:/docker/abc\n", mount)
    root.limit("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{GB}\n")
    assert root.usable() == GB


def test_v1_a_group_that_only_starts_like_the_mounts(tmp_path: Path) -> None:
    mount = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    root = FakeRoot(tmp_path, "4:memory:/docker/abcdef\n", mount)
    root.limit("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{GB}\n")
    assert root.usable() == GB


def test_both_versions_at_once(tmp_path: Path) -> None:
    mounts = V1_MOUNT + V2_MOUNT.replace("/sys/fs/cgroup rw", "/sys/fs/cgroup/unified rw")
    root = FakeRoot(tmp_path, "4:memory:/a\n0::/b\n", mounts)
    root.limit("sys/fs/cgroup/memory/a/memory.limit_in_bytes", f"{5 * GB}\n")
    root.limit("sys/fs/cgroup/unified/b/memory.max", f"{6 * GB}\n")
    assert root.usable() == 5 * GB


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    root = FakeRoot(tmp_path, "0::/\n", V2_MOUNT.replace("/sys/fs/cgroup", "/sys/my\\040groups"))
    root.limit("sys/my groups/memory.max", f"{GB}\n")
    assert root.usable() == GB


def test_limits_of_the_process_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_AS: 7 * GB, resource.RLIMIT_DATA: 6 * GB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY))
    assert usable_memory(tmp_path) == 6 * GB


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0 < resident_memory() < psutil.virtual_memory().total
    assert 0 < usable_memory() <= psutil.virtual_memory().total
    assert default_budget() == usable_memory() // 2
