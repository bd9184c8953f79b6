"""Tensors come back as they were, tied where they were tied, and a write to one kills nobody."""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fbcache import FBPool  # noqa: E402
from fbcache.codec import Frames  # noqa: E402
from fbcache.codec.families.torch_tensors import _DTYPES  # noqa: E402
from fbcache.errors import (  # noqa: E402
    CorruptBlobError,
    FBCacheError,
    PickleRefusedError,
    UnsupportedTypeError,
)
from fbcache.sizeof import sizeof  # noqa: E402
from tests.codec.roundtrip import CODEC, same, through  # noqa: E402

OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)
DTYPES = list(_DTYPES.values())

with warnings.catch_warnings():  # torch warns of complex32, once
    warnings.simplefilter("ignore")
    torch.empty(0, dtype=torch.complex32)


def content(tensor: Any) -> bytes:
    """The elements' bytes, in C order, without asking torch what they mean."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return ctypes.string_at(plain.data_ptr(), plain.numel() * plain.itemsize)


def same_tensor(left: Any, right: Any) -> bool:
    if type(left) is not type(right) or left.dtype != right.dtype or left.shape != right.shape:
        return False
    if (left.requires_grad, left.is_conj()) != (right.requires_grad, right.is_conj()):
        return False
    if (left.grad is None) != (right.grad is None) or vars(left) != vars(right):
        return False
    if left.grad is not None and not same_tensor(left.grad, right.grad):
        return False
    return content(left) == content(right)


def same_layout(left: Any, right: Any) -> bool:
    return same_tensor(left, right) and left.stride() == right.stride()


def of(dtype: Any, *shape: int) -> Any:
    """A tensor of arbitrary bytes."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(count).integers(0, 2, count, np.uint8)
    flat = torch.frombuffer(bytearray(raw.tobytes() or b"\0"), dtype=torch.uint8)[:count].clone()
    return torch.empty(0, dtype=dtype).set_(flat.untyped_storage(), 0, shape)


def bits(tensor: Any) -> int:
    address: int = tensor.untyped_storage().data_ptr()
    return address


# ------------------------------------------------------------------ what comes back

VIEWS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1),
    "every other": lambda t: t[..., ::2],
    "part": lambda t: t[1:],
    "column": lambda t: t[..., :1],
    "diagonal": lambda t: t.diagonal(dim1=0, dim2=-1) if t.ndim > 1 else t,
    "expanded": lambda t: t.expand(3, *t.shape),
    "flat": lambda t: t.reshape(-1),
}


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 17]), min_size=1, max_size=4),
    views=st.lists(st.sampled_from(list(VIEWS)), max_size=3),
    writable=st.booleans(),
)
def test_tensors_come_back(dtype: Any, shape: list[int], views: list[str], writable: bool) -> None:
    tensor = of(dtype, *shape)
    for view in views:
        if tensor.ndim:
            tensor = VIEWS[view](tensor)
    back = through(tensor, writable=writable)
    assert same_tensor(back, tensor)
    assert back.untyped_storage().nbytes() <= 2 * tensor.numel() * tensor.itemsize


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize(
    "tensor",
    [
        *(of(dtype, 5, 300) for dtype in DTYPES),
        torch.tensor(3.5),
        torch.tensor(True),
        torch.empty(0),
        torch.empty(0, 3, 2),
        torch.empty_strided((0, 3), (1, 7)),
        torch.arange(600.0).reshape(20, 30).T,
        torch.arange(600.0).expand(7, 600),
        torch.ones(2, 3, 8, 8).to(memory_format=torch.channels_last),
        torch.ones(2, 1, 8, 8).to(memory_format=torch.channels_last),
        torch.ones(2, 3, 1, 1).to(memory_format=torch.channels_last),
        torch.ones(3, 2, 2, 4, 2).to(memory_format=torch.channels_last_3d),
        torch.empty_strided((1, 4), (77, 1)).fill_(1),
        torch.ones(3, 3).requires_grad_(),
        torch.nn.Parameter(torch.ones(3)),
        torch.nn.Parameter(torch.ones(3), requires_grad=False),
        torch.nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        torch.ones(3, dtype=torch.complex64).conj().requires_grad_(),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
    ids=lambda t: f"{t.dtype} {tuple(t.shape)} {t.stride()}" if isinstance(t, torch.Tensor) else str(t),
)
def test_awkward_tensors(tensor: Any, writable: bool) -> None:
    assert same_layout(through(tensor, writable=writable), tensor) or tensor.is_neg()
    assert same_tensor(through({"x": [tensor]}, writable=writable)["x"][0], tensor)


def test_the_offset_of_a_view_into_what_is_not_in_the_value_is_left_behind() -> None:
    huge = torch.zeros(1 << 20)
    frames = CODEC.encode(huge[1000:1010], allow_pickle=False)
    assert frames.nbytes < 1000
    frames = CODEC.encode([huge[:100], huge[-100:]], allow_pickle=False)
    assert frames.nbytes < 2000


def test_what_autograd_knows_of_a_leaf_comes_along() -> None:
    parameter = torch.nn.Parameter(torch.arange(4.0))
    (parameter * 3).sum().backward()
    frozen = torch.ones(2)
    back, again, grad, plain = through([parameter, parameter, parameter.grad, frozen], writable=True)
    assert same_tensor(back, parameter) and back is again and back.grad is grad
    assert back.is_leaf and not plain.requires_grad
    (back * 5).sum().backward()
    assert back.grad.tolist() == [8.0] * 4 and parameter.grad.tolist() == [3.0] * 4


def test_attributes_come_along() -> None:
    tensor = torch.ones(2)
    tensor.tag, tensor.other = "x", torch.zeros(1)
    back = through(tensor)
    assert back.tag == "x" and same_tensor(back.other, tensor.other)


def test_a_value_that_is_loaded_in_inference_mode_is_good_for_training_too() -> None:
    with torch.inference_mode():
        back = through([torch.ones(3), torch.nn.Parameter(torch.ones(3))])
    assert not back[0].is_inference()
    (back[1] * back[0]).sum().backward()


def test_a_default_device_of_the_users_own_does_not_matter() -> None:
    with torch.device("meta"):
        back = through([torch.ones(300, device="cpu"), torch.empty(0, device="cpu")])
    assert [t.device.type for t in back] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    "value",
    [torch.Size([1, 2, 3]), torch.Size([]), torch.float8_e5m2, torch.quint8, torch.device("cuda:1")],
    ids=str,
)
def test_sizes_dtypes_and_devices(value: Any) -> None:
    back = through({"x": value})["x"]
    assert type(back) is type(value) and back == value


# ------------------------------------------------------------------ ties


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: [x, x.view(30, 20), x[5:], x.T, x.reshape(-1)[::7]],
        lambda x: [x[:10], x[10:]],
        lambda x: list(x.split(3)),
        lambda x: list(reversed(x.split(1))),
        lambda x: [x[:5], x[15:], x[6:14]],
        lambda x: [torch.nn.Parameter(x), x.detach(), x.T],
        lambda x: [x.view(torch.int32), x, x.view(torch.uint8)[:, 4:8]],
    ],
    ids=["overlapping", "halves", "parts", "backwards", "gap that is filled", "parameter", "dtypes"],
)
def test_tensors_of_one_storage_are_of_one_again(make: Callable[[Any], Any], writable: bool) -> None:
    tensors = make(torch.arange(600.0).reshape(20, 30))
    back = through(tensors, writable=writable)
    assert all(map(same_layout, back, tensors))
    assert len(set(map(bits, back))) == 1
    for mine, theirs in zip(tensors, back, strict=True):
        for tensor in (mine, theirs):
            tensor.detach().zero_()
        assert all(map(same_tensor, back, tensors))


def test_a_write_to_one_is_seen_in_the_other_and_in_an_array() -> None:
    array = np.arange(1000.0)
    value = {"array": array, "tensor": torch.from_numpy(array), "part": torch.from_numpy(array[500:])}
    back = through(value, writable=True)
    back["part"][0] = -1
    assert back["tensor"][500] == -1 and back["array"][500] == -1
    assert array[500] == 500


def test_shared_tensors_are_one_object() -> None:
    tensor = torch.ones(3)
    back = through([tensor, (tensor,), {"x": tensor}])
    assert back[0] is back[1][0] is back[2]["x"]


def test_a_user_may_still_resize_what_was_encoded() -> None:
    tensor = torch.ones(3)
    CODEC.encode(tensor, allow_pickle=False)
    tensor.resize_(1000)


def test_a_state_dict_keeps_its_ties_and_versions() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8))
    model[2].weight = model[0].weight
    state = model.state_dict()
    back = through(state, writable=True)
    assert type(back) is OrderedDict and list(back) == list(state)
    assert all(same_tensor(back[name], state[name]) for name in state)
    assert bits(back["0.weight"]) == bits(back["2.weight"])
    assert back._metadata == state._metadata and type(back._metadata) is OrderedDict
    model.load_state_dict(back)


def test_ordered_dicts_come_back() -> None:
    for value in (OrderedDict(), OrderedDict(b=1, a=[2]), OrderedDict({(1, "x"): OrderedDict(y=b"z")})):
        back = through([value, value])
        assert type(back[0]) is OrderedDict and same(list(back[0].items()), list(value.items()))
        assert back[0] is back[1] and vars(back[0]) == {}


# ------------------------------------------------------------------ what is refused

W = torch.ones(3, requires_grad=True)


def hooked() -> Any:
    tensor = torch.ones(3, requires_grad=True)
    tensor.register_hook(lambda grad: grad)
    return tensor


def freed() -> Any:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: W * 2, r"detach\(\)"),
        (hooked, "hooks"),
        (lambda: torch.eye(3).to_sparse(), r"to_dense\(\)"),
        (lambda: torch.ones(3, device="meta"), "without data"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), r"dequantize\(\)"),
        (freed, "freed"),
        (lambda: torch.ones((1,) * 70), "dimension"),
    ],
    ids=["computed", "hooked", "sparse", "meta", "quantized", "freed", "dimensions"],
)
def test_what_has_no_plain_memory_is_refused_with_advice(make: Callable[[], Any], advice: str) -> None:
    for allow_pickle in (False, True):
        with pytest.raises(UnsupportedTypeError, match=advice) as caught:
            CODEC.encode({"a": [make()]}, allow_pickle=allow_pickle)
        assert caught.value.path == "value['a'][0]"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(UnsupportedTypeError, match="unbind"):
        CODEC.encode(nested, allow_pickle=True)


def test_tensors_within_a_transformation_are_refused() -> None:
    def encode(tensor: Any) -> Any:
        with pytest.raises(UnsupportedTypeError):
            CODEC.encode(tensor, allow_pickle=True)
        return tensor

    torch.func.vmap(encode)(torch.ones(3, 2))


def test_modules_go_by_pickle() -> None:
    module = torch.nn.Linear(3, 3)
    with pytest.raises(PickleRefusedError, match="Linear"):
        CODEC.encode(module, allow_pickle=False)
    assert same_tensor(through(module, allow_pickle=True).weight, module.weight)


# ------------------------------------------------------------------ through a pool

BIG = 100_000


def case() -> dict[str, Any]:
    base = torch.arange(float(BIG))
    return {
        "base": base,
        "part": base[1000:2000],
        "half": torch.arange(BIG, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(300, 300)),
        "small": torch.tensor([1, 2, 3]),
        "complex": torch.ones(1000, dtype=torch.complex128),
        "array": np.arange(BIG),
        "state": torch.nn.BatchNorm1d(4).state_dict(),
        "size": torch.Size([1, 2]),
    }


def same_case(left: dict[str, Any], right: dict[str, Any]) -> bool:
    for name, value in right.items():
        if isinstance(value, torch.Tensor):
            if not same_tensor(left[name], value):
                return False
        elif isinstance(value, OrderedDict):
            if not all(same_tensor(left[name][key], value[key]) for key in value):
                return False
        elif not np.array_equal(left[name], value):
            return False
    return bits(left["base"]) == bits(left["part"])


def permissions(address: int) -> tuple[str, str]:
    """Those of the pages at an address, and the file they are of."""
    with open("/proc/self/maps") as file:
        for line in file:
            start, _, end = line.split()[0].partition("-")
            if int(start, 16) <= address < int(end, 16):
                return line.split()[1], line.split()[-1]
    raise AssertionError(hex(address))


@pytest.fixture
def pool(tmp_path: Path) -> Any:
    with FBPool("1GB", directory=tmp_path / "spill", min_free=0) as pool:
        yield pool


def test_a_tensor_that_is_read_back_is_the_file_and_writing_to_it_changes_no_file(pool: Any) -> None:
    pool.put("x", case())
    pool.evict()
    with pool.get("x") as x:
        assert same_case(x, case())
        mode, path = permissions(x["base"].data_ptr())
        assert mode == "rw-p" and path.startswith("/"), "a private map"
        assert permissions(x["array"].__array_interface__["data"][0])[1] == path
        assert not x["array"].flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            x["array"].flags.writeable = True
        x["base"].add_(1)  # a promise broken
        assert x["part"][0] == 1001
        x["small"].zero_()
        del x
    pool.evict()
    with pool.get("x") as x:
        assert same_case(x, case())


def test_a_value_without_tensors_stays_on_pages_that_nobody_can_write(pool: Any) -> None:
    pool.put("x", {"array": np.arange(BIG)})
    pool.evict()
    with pool.get("x") as x:
        assert permissions(x["array"].__array_interface__["data"][0])[0] == "r--p"


def test_a_kernel_that_refuses_costs_a_copy(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fbcache.codec.pages._mprotect", lambda *_: -1)
    pool.put("x", case())
    pool.evict()
    with pool.get("x") as x:
        assert same_case(x, case())
        x["base"].add_(1)


def test_memory_of_somebody_elses_is_copied() -> None:
    value = torch.arange(1000)
    frames = CODEC.encode(value, allow_pickle=False)
    raw = bytes(frames.buffers[0])
    for buffer in (raw, memoryview(bytearray(raw)).toreadonly()):
        foreign = Frames(frames.codec, frames.tree, [buffer])
        CODEC.decode(foreign, writable=False, allow_pickle=False).zero_()
        assert bytes(buffer) == raw


def test_changes_come_back(pool: Any) -> None:
    mine = case()
    pool.put("x", mine, copy=True)
    pool.evict()
    with pool.get_mut("x") as x:
        x["base"].mul_(2)
        x["parameter"].data.add_(1)
        x["new"] = x["half"][:10]
    pool.evict()
    with pool.get("x") as x:
        assert torch.equal(x["base"], mine["base"] * 2) and x["part"][0] == 2000
        assert x["parameter"].sum() == 2 * 300 * 300
        assert bits(x["new"]) == bits(x["half"])
    assert same_case(mine, case())


SCRIPT = """
import sys
from fbcache import FBPool
from tests.codec.families.test_torch import case, same_case
with FBPool.from_checkpoint(sys.argv[1], memory="1GB", directory=sys.argv[2], min_free=0) as pool:
    with pool.get("x") as x:
        assert same_case(x, case())
        x["base"].add_(1)
    with pool.get_mut("x") as x:
        x["half"].add_(1)
"""


def test_a_checkpoint_opens_elsewhere_without_pickle(pool: Any, tmp_path: Path) -> None:
    pool.put("x", case())
    pool.save(tmp_path / "saved")
    arguments = [str(tmp_path / "saved"), str(tmp_path / "elsewhere")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with FBPool.from_checkpoint(tmp_path / "saved", directory=tmp_path / "more", min_free=0) as again:
        with again.get("x") as x:
            assert same_case(x, case())


# ------------------------------------------------------------------ sizes


def test_sizes_count_each_storage_once() -> None:
    base = torch.zeros(BIG)
    assert sizeof(base) == pytest.approx(base.nbytes, rel=0.01)
    assert sizeof(base[:10]) == pytest.approx(base.nbytes, rel=0.01), "it keeps all of it alive"
    assert sizeof([base, base[5:], base.view(2, -1)]) == pytest.approx(base.nbytes, rel=0.01)
    array = np.zeros(BIG)
    assert sizeof([array, torch.from_numpy(array)]) == pytest.approx(array.nbytes, rel=0.01)
    parameter = torch.nn.Parameter(base)
    parameter.sum().backward()
    assert sizeof(parameter) == pytest.approx(2 * base.nbytes, rel=0.01)
    sparse = torch.ones(300, 300).to_sparse()
    assert sizeof(sparse) == pytest.approx(300 * 300 * (8 + 8 + 4), rel=0.01)
    assert sizeof(torch.ones(BIG, device="meta")) < 1000
    assert sizeof(torch.nn.Linear(300, 300)) == pytest.approx(300 * 301 * 4, rel=0.2)


# ------------------------------------------------------------------ damage


def test_damage_gives_our_errors_or_a_value() -> None:
    value = case()
    value["conjugated"] = torch.ones(3, dtype=torch.complex64).conj()
    value["leaf"] = torch.ones(3, requires_grad=True)
    value["leaf"].grad = torch.ones(3)
    value["odd"] = torch.empty_strided((1, 4), (77, 1)).fill_(1)
    value["device"], value["dtype"] = torch.device("cpu"), torch.float32
    value = {name: part for name, part in value.items() if name not in ("half", "array")}
    frames = CODEC.encode(value, allow_pickle=False)
    buffers = [bytes(buffer) for buffer in frames.buffers]
    rng = random.Random(0)
    for _ in range(1500):
        tree, kept = bytearray(frames.tree), list(buffers)
        for _ in range(rng.choice((1, 1, 2, 5))):
            tree[rng.randrange(len(tree))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            place = rng.randrange(len(kept))
            kept[place] = kept[place][: rng.randrange(len(kept[place]))]
        for writable in (False, True):
            try:
                back = CODEC.decode(
                    Frames(frames.codec, bytes(tree), kept), writable=writable, allow_pickle=False
                )
            except OURS:
                continue
            _use(back)


def _use(value: Any) -> None:
    """Read and write all of every tensor: what reaches beyond its memory crashes, sooner or later."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for part in parts:
        if isinstance(part, dict):
            _use(part)
        elif isinstance(part, torch.Tensor) and part.numel() < 1 << 24:
            content(part)
            if 0 not in part.stride():
                part.detach().copy_(part.detach().clone())


@pytest.mark.parametrize(
    "state",
    [
        ["float32", [48, "<u4", [2**40], b"1234", False], [], False, False, [], []],
        ["float32", [48, "<u8", [1], b"12345678", False], [], False, False, [], []],
        ["float32", [48, "<u4", [1], b"1234", False], [[-1]], False, False, [], []],
        ["float32", [48, "<u4", [1], b"1234", False], [[2**63]], False, False, [], []],
        ["float32", [48, "<u4", [2], b"12345678", False], [[1 << 40]], False, False, [None], [3]],
        ["float32", [48, "<u4", [0], b"", False], [[2**63]], False, False, [], []],
        ["int8", [48, "|u1", [1], b"1", False], [], False, True, [], []],
        ["int8", [48, "|u1", [1], b"1", False], [], False, False, [5], []],
        ["int8", [48, "|u1", [1], b"1", False], [], False, False, [], [[0, [1]]]],
        ["float99", [48, "|u1", [1], b"1", False], [], False, False, [], []],
        ["float32", [49, "<u4", [4], 0, 8, [-4]], [], False, False, [], []],
        ["float32", [49, "<u4", [2], 0, 1, [4]], [], False, False, [], []],
        ["float32", [49, "<u4", [2], 0, 0, [3]], [], False, False, [], []],
        ["float32", [52, [[48, "<u4", [1], b"1234", False], None, None], False], [], False, False, [], []],
        [],
        "float32",
    ],
    ids=str,
)
def test_lies_are_found(state: Any) -> None:
    import msgpack

    for name in ("torch.Tensor", "torch.nn.Parameter"):
        frames = Frames("msgpack", msgpack.packb([10, name, state]), [bytes(64)])
        for writable in (False, True):
            with pytest.raises(FBCacheError) as caught:
                CODEC.decode(frames, writable=writable, allow_pickle=False)
            assert isinstance(caught.value, OURS)


def test_many_tensors_over_one_inline_array_take_one_copy() -> None:
    """A small tree cannot take memory without bound: memory that is copied is copied once."""
    import msgpack

    inline = [48, "|u1", [100_000], bytes(100_000), False]
    first = [10, "torch.Tensor", ["uint8", inline, [], False, False, [], []]]
    others = [[10, "torch.Tensor", ["uint8", [5, 0], [], False, False, [], []]] for _ in range(1000)]
    tree = msgpack.packb([0, [first, *others]])
    back = CODEC.decode(Frames("msgpack", tree, []), writable=False, allow_pickle=False)
    assert len(set(map(bits, back))) == 1
