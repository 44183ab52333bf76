"""PyTorch's files, however they come about: read as PyTorch reads them, and no pickle in them runs."""

from __future__ import annotations

import io
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickles import CALLED, FORMS, ODDITIES, pth, text

from blip2nb.errors import RequestError
from blip2nb.weights.hashing import DTYPE_NAMES
from blip2nb.weights.sources import open_checkpoint, open_file
from blip2nb.weights.stored import Stored, digest_of
from blip2nb.weights.torchfile import Odd, read_torch_file

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NORM = "ln_vision.weight"
FC1 = "opt_model.model.decoder.layers.0.fc1.weight"
Copy = Callable[[str], Path]


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.complex32, torch.uint16, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
]  # fmt: skip


@st.composite
def views(draw: st.DrawFn, storages: list[torch.Tensor]) -> torch.Tensor:
    """A tensor cut from one of these, at any place and with any steps between its elements."""
    held = storages[draw(st.integers(0, len(storages) - 1))]
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    strides = [draw(st.integers(0, 5)) for _ in shape]
    last = sum(max(n - 1, 0) * step for n, step in zip(shape, strides, strict=True))
    if last >= len(held):
        shape, strides, last = shape[:1], [1][: len(shape)], max(min(shape[:1], default=1) - 1, 0)
    offset = draw(st.integers(0, len(held) - last - 1))
    form = draw(st.sampled_from(["strided", "whole", "parameter", "attributes"]))
    if form == "whole":
        return held
    view = held.as_strided(shape, strides, offset)
    if form == "attributes":
        view.scale = 2.0  # some trainers note things on their tensors
    if form == "parameter" and view.dtype.is_floating_point:
        return torch.nn.Parameter(view, requires_grad=draw(st.booleans()))
    return view


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(max_size=4),
    st.binary(min_size=1, max_size=4), st.lists(st.integers(), max_size=2), st.sets(st.integers(), max_size=2),
    st.just(torch.float16), st.just(torch.Size([2])), st.just(torch.device("cpu")), st.just((1, "a")),
    st.just(bytearray(b"x")),
)  # fmt: skip


@st.composite
def checkpoints(draw: st.DrawFn, dtypes: list[torch.dtype]) -> dict:
    """Dicts in dicts of tensors, some of which share their storage, and of plain values."""
    storages, leaves = [], [PLAIN, st.just(torch.zeros(0, 3)[:, 1:])]
    for number in range(draw(st.integers(1, 3))):
        values = torch.randn(draw(st.integers(20, 40)), generator=torch.Generator().manual_seed(number)) * 50
        storages.append(values.abs().to(draw(st.sampled_from(dtypes))))
    names = st.text(st.characters(codec="utf-8"), max_size=5)
    leaf = st.one_of(views(storages), views(storages), *leaves)
    return draw(st.dictionaries(names, st.recursive(leaf, lambda inner: st.dictionaries(names, inner, max_size=3))))


def check_same(found: object, expected: object, where: str = "") -> int:
    """Every tensor, by its bits; the number of them."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), where
        assert list(found) == list(expected), where
        return sum(check_same(found[name], expected[name], f"{where}/{name}") for name in expected)
    if not isinstance(expected, torch.Tensor):
        assert not isinstance(found, Stored | Odd), where
        return 0
    assert isinstance(found, Stored | Odd), where
    assert found.shape == tuple(expected.shape), where
    if expected.dtype in DTYPE_NAMES:
        assert isinstance(found, Stored), where
        expected = expected.new_empty(expected.shape).copy_(expected.detach())
        assert found.digest() == digest_of(expected), where
        assert digest_of(found.tensor()) == digest_of(expected), where
    else:
        assert isinstance(found, Odd), where
    return 1


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
def test_a_file_is_read_as_pytorch_itself_reads_it(tmp_path: Path, zipped: bool):
    path = tmp_path / "weights.pth"
    seen = []

    @given(checkpoints(DTYPES if zipped else DTYPES[:12]))
    @settings(max_examples=150)
    def same(content: dict) -> None:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        seen.append(check_same(read_torch_file(path), torch.load(path, weights_only=True)))

    same()
    assert sum(seen) > 100


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), st.integers(0, 3), min_size=1))
@settings(max_examples=40)
def test_a_distributed_runs_prefix_is_taken_away_and_nobody_elses(
    tmp_path_factory: pytest.TempPathFactory, names: dict[str, int]
):
    path = tmp_path_factory.getbasetemp() / "prefixed.pth"
    tensors = {f"module.{name}": torch.arange(size) for name, size in names.items()}
    for content in (tensors, {"model": tensors, "module.epoch": 3}):
        torch.save(content, path)
        found, _ = open_checkpoint(path)
        assert {name: one.digest() for name, one in found.items()} == {
            name.removeprefix("module."): digest_of(tensor) for name, tensor in tensors.items()
        }
    torch.save({**tensors, "mod": torch.zeros(1)}, path)
    assert set(open_checkpoint(path)[0]) == {*tensors, "mod"}


def test_a_tensor_that_negates_when_it_is_read_is_refused(tmp_path: Path):
    """PyTorch notes the sign beside the bytes, which would be read as they are."""
    torch.save({"weight": torch._neg_view(torch.ones(3)), "other": torch.ones(3)}, tmp_path / "weights.pth")
    with pytest.raises(RequestError, match="weight has dtype F32 with the sign turned"):
        open_file(tmp_path / "weights.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_that_names_a_function_is_refused_and_runs_nothing(tmp_path: Path, form: str, zipped: bool):
    marker = tmp_path / "code-ran"
    shell, python = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    if form == "reduce":
        pickle.loads(FORMS[form]("os", "system", text(shell)))
        assert marker.exists(), "the pickle is harmless: this test would prove nothing"
        marker.unlink()
    for module, name in CALLED:
        given = text(shell if module in ("os", "posix", "subprocess") else python)
        path = pth(tmp_path / "weights.pth", FORMS[form](module, name, given), zipped)
        with pytest.raises(RequestError, match=re.escape(f"would run code: it asks to run {module}.{name}. ")):
            open_file(path)
        assert not marker.exists(), (module, name)
    time.sleep(0.02)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
@pytest.mark.parametrize("oddity", ODDITIES)
def test_an_odd_pickle_is_refused_and_changes_nothing(tmp_path: Path, oddity: str, zipped: bool):
    with pytest.raises(RequestError):
        open_file(pth(tmp_path / "weights.pth", ODDITIES[oddity], zipped))
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "good.pth", _use_new_zipfile_serialization=zipped)
    assert open_file(tmp_path / "good.pth")["weight"].digest() == digest_of(torch.arange(3.0))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
@pytest.mark.parametrize(
    ("key", "count", "offset", "shape", "strides"),
    [
        ("0", 4, 0, [5], [1]), ("0", 4, 4, [1], [1]), ("0", 4, -1, [1], [1]), ("0", 4, 0, [2, 2], [9, 1]),
        ("0", 4, 0, [-2], [1]), ("0", 4, 3, [2], [-1]), ("0", 1 << 40, 0, [1 << 40], [1]), ("0", 5, 0, [5], [1]),
        ("1", 4, 0, [4], [1]), ("0", -4, 0, [4], [1]), ("0", 4, 0, [4], [1, 1]),
    ],
)  # fmt: skip
def test_a_tensor_outside_its_bytes_is_refused(tmp_path: Path, key, count, offset, shape, strides, zipped: bool):
    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            module, name = obj.said
            self.write(b"c%s\n%s\n" % (module.encode(), name.encode()))

        def persistent_id(self, obj):
            return ("storage", FloatStorage, key, "cpu", count, *([] if zipped else [None])) if obj is held else None

    class FloatStorage:
        said = ("torch", "FloatStorage")

    class _rebuild_tensor_v2:
        said = ("torch._utils", "_rebuild_tensor_v2")

        def __reduce__(self):
            return _rebuild_tensor_v2, (held, offset, tuple(shape), tuple(strides), False, None)

    held, out = object(), io.BytesIO()
    Pickler(out, 2).dump({"weight": _rebuild_tensor_v2()})
    with pytest.raises(RequestError, match="is not a whole PyTorch file"):
        open_file(pth(tmp_path / "weights.pth", out.getvalue(), zipped))
