"""What is in a `.pth` or `.bin` file and where, without reading a tensor, without torch, and without running a pickle.

Both of PyTorch's formats: the zip archive, and the one from before 1.6. Their structure is a pickle. It is read by an
unpickler that knows a handful of names, each standing for a function of this module that only notes what is described;
any other name ends the reading. So nothing in a file can run, the optimizer of a training run costs nothing, and
every tensor comes out as the place of its bytes.

The formats: torch/serialization.py (`_save`, `_legacy_save`) and torch/_utils.py (`_rebuild_tensor_v2`).
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

from blip2nb.errors import RequestError
from blip2nb.weights.stored import SIZES, Stored

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ByteStorage": "U8", "BoolStorage": "BOOL",
    # no checkpoint of LAVIS has these; an optimizer may, and where it matters they are refused by name
    "ShortStorage": "I16", "CharStorage": "I8", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128",
    "UntypedStorage": "",
}  # fmt: skip
_OTHER_SIZES = {"I16": 2, "I8": 1, "C64": 8, "C128": 16, "": 1}
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


@dataclasses.dataclass(frozen=True)
class Odd:
    """A tensor of a dtype that no checkpoint of LAVIS has."""

    dtype: str
    shape: tuple[int, ...]


def read_torch_file(path: Path) -> Any:
    """What the file holds, with a `Stored` (or an `Odd`) for every tensor.

    Raises:
        RequestError: it is not whole, not a PyTorch file, or holds something other than tensors and plain values.
    """
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                return _read_zip(path, file)
            file.seek(0)
            return _read_legacy(path, file)
    except _Refused as error:
        raise RequestError(
            f"{path} holds something other than tensors and was not opened, since reading it would run code: "
            f"{error}. Save it again as a plain dict of tensors, "
            'torch.save({"model": state_dict}, path), where you trust it.'
        ) from error
    except RequestError:
        raise
    except Exception as error:  # a cut or garbled file makes the pickle and zip readers raise whatever its bytes spell
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{path} is not a whole PyTorch file ({first}). Download or copy it again.") from error


class _Refused(Exception):
    """A pickle that names something it has no business to name."""


@dataclasses.dataclass(eq=False)
class _Storage:
    """A run of bytes in the file that tensors are cut from. `start` is known once the whole structure was read."""

    dtype: str
    count: int
    start: int = -1
    crc32: int | None = None


@dataclasses.dataclass(eq=False)
class _Tensor:
    """A tensor as the pickle describes it."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# -- the zip archive


def _read_zip(path: Path, file: IO[bytes]) -> Any:
    archive = zipfile.ZipFile(file)
    records = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
    if "data.pkl" not in records:
        raise ValueError("a zip archive without data.pkl")
    if records["data.pkl"].CRC == 0:  # saved with checksums switched off: none of them means anything
        for info in records.values():
            info.CRC = None  # type: ignore[assignment]
    if "byteorder" in records and _record(file, records["byteorder"]) != b"little":
        raise ValueError("it was saved on a big-endian machine")
    storages: dict[str, _Storage] = {}

    def storage(kind: str, key: str, count: int, view: object) -> _Storage:
        if key not in storages:
            info = records[f"data/{key}"]
            size = SIZES.get(kind) or _OTHER_SIZES[kind]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != count * size:
                raise ValueError(f"its record data/{key} is compressed or has another size than its tensors")
            storages[key] = _Storage(kind, count, _data_start(file, info), info.CRC)
        return storages[key]

    content = RestrictedUnpickler(io.BytesIO(_record(file, records["data.pkl"])), storage).load()
    return _placed(path, content, {})


def _data_start(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: behind its local header, whose two variable parts have lengths of their own."""
    file.seek(info.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"no record where {info.filename} should be")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + info.file_size > file.seek(0, 2):
        raise ValueError(f"{info.filename} ends beyond the end of the file")
    return start


def _record(file: IO[bytes], info: zipfile.ZipInfo) -> bytes:
    file.seek(_data_start(file, info))
    content = file.read(info.file_size)
    if info.CRC is not None and zlib.crc32(content) != info.CRC:
        raise ValueError(f"{info.filename} does not have the checksum that the file says")
    return content


# -- the format from before PyTorch 1.6


def _read_legacy(path: Path, file: IO[bytes]) -> Any:
    storages: dict[str, _Storage] = {}

    def storage(kind: str, key: str, count: int, view: object) -> _Storage:
        if view is not None:
            raise ValueError("its tensors are views in a form that only PyTorch before 0.4 wrote")
        return storages.setdefault(key, _Storage(kind, count))

    try:
        magic, protocol, system = (RestrictedUnpickler(file, storage).load() for _ in range(3))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{error}; neither a zip archive nor PyTorch's older format") from error
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL or not system["little_endian"]:
        raise ValueError("it does not begin as a PyTorch file does")
    content = RestrictedUnpickler(file, storage).load()
    end = path.stat().st_size
    for key in RestrictedUnpickler(file, storage).load():
        (count,) = struct.unpack("<q", file.read(8))
        one = storages[key]
        size = SIZES.get(one.dtype) or _OTHER_SIZES[one.dtype]
        if count != one.count:
            raise ValueError(f"a run of {count} values where {one.count} should be")
        one.start = file.tell()
        if one.start + count * size > end:
            raise ValueError("it ends in the middle of a tensor")
        file.seek(one.start + count * size)
    return _placed(path, content, {})


# -- the structure


class RestrictedUnpickler(pickle.Unpickler):
    """Reads plain values, and knows of no more than the names in `_KNOWN`."""

    def __init__(self, file: Any, storage: Any):
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Named(_STORAGES[name])
        if module == "torch" and _DTYPE.fullmatch(name):
            return _Named(_DTYPES.get(name, name))
        try:
            return _Call(_KNOWN[module, name])
        except KeyError:
            raise _Refused(f"it names {module}.{name}") from None

    def persistent_load(self, saved: Any) -> _Storage:
        if not isinstance(saved, tuple) or saved[0] != "storage" or not isinstance(saved[1], _Named):
            raise _Refused(f"it holds a {saved[0] if isinstance(saved, tuple) and saved else saved!r}")
        _, kind, key, _location, count, *view = saved
        return self._storage(kind.dtype, str(key), int(count), view[0] if view else None)


@dataclasses.dataclass(frozen=True)
class _Named:
    """What a dtype or a class of storages is read as."""

    dtype: str


class _Call:
    """What a pickle may call. That is all it may do with it: what it would set on it is refused."""

    __slots__ = ("_does",)

    def __init__(self, does: Any):
        self._does = does

    def __call__(self, *given: Any) -> Any:
        return self._does(*given)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("it changes a function")


def _rebuild(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any = False, hooks: Any = None, marks: Any = None
) -> _Tensor:
    return _tensor(storage, storage.dtype, offset, shape, strides, marks)


def _rebuild_with_dtype(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, kind: _Named, marks: Any = None
) -> _Tensor:
    return _tensor(storage, kind.dtype, offset, shape, strides, marks)


def _tensor(storage: _Storage, dtype: str, offset: int, shape: Any, strides: Any, marks: Any) -> _Tensor:
    if marks and marks.get("neg"):
        dtype = f"{dtype} with the sign turned"  # a view that negates when it is read: no dtype of ours
    return _Tensor(storage, dtype, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _parameter(data: _Tensor, *rest: Any) -> _Tensor:
    return data


def _with_attributes(function: Any, kind: Any, given: Any, state: Any) -> Any:
    return function(*given)  # one of `_KNOWN`; what was set on the tensor is of no interest


def _plain(*arguments: Any) -> tuple[Any, ...]:
    return arguments


class _Ordered(collections.OrderedDict):
    """A state dict; what is set on it beside its items (`_metadata`) is of no interest."""

    def __setstate__(self, state: Any) -> None:
        pass


_DTYPE = re.compile(r"bool|b?float\d\w*|u?int\d+|complex\d+")
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL",
    "int16": "I16", "int8": "I8", "complex64": "C64", "complex128": "C128", "uint16": "U16", "uint32": "U32",
    "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    ("torch", "Tensor"): _plain,
    ("torch.nn.parameter", "Parameter"): _plain,
    ("torch.nn.parameter", "Buffer"): _plain,
    ("torch", "Size"): _plain,
    ("torch", "device"): _plain,
    ("collections", "OrderedDict"): _Ordered,
    ("collections", "defaultdict"): lambda *arguments: {},
    ("collections", "Counter"): dict,
    ("builtins", "dict"): dict,
    ("builtins", "set"): set,
    ("builtins", "complex"): _plain,
    ("builtins", "bytearray"): _plain,
    # what the pickles of Python 2's time, as torch.save writes them, call these and bytes
    ("__builtin__", "dict"): dict,
    ("__builtin__", "set"): set,
    ("__builtin__", "complex"): _plain,
    ("__builtin__", "bytearray"): _plain,
    ("__builtin__", "bytes"): _plain,
    ("_codecs", "encode"): _plain,
}


def _placed(path: Path, value: Any, seen: dict[int, Any]) -> Any:
    """The same structure with tensors as `Stored`. Everything else is left as it is."""
    if isinstance(value, _Tensor):
        return _stored(path, value)
    if isinstance(value, dict):
        if id(value) not in seen:
            out: dict[Any, Any] = {}
            seen[id(value)] = out  # before its items, so that one that holds itself ends
            out.update((key, _placed(path, item, seen)) for key, item in value.items())
        return seen[id(value)]
    return value


def _stored(path: Path, tensor: _Tensor) -> Stored | Odd:
    size = SIZES.get(tensor.dtype)
    if size is None:
        return Odd(tensor.dtype, tensor.shape)
    storage = tensor.storage
    held = storage.count * (SIZES.get(storage.dtype) or _OTHER_SIZES[storage.dtype])
    count = math.prod(tensor.shape)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True)) if count else -1
    lowest = min(storage.start, tensor.offset, *tensor.shape, *tensor.strides)
    if lowest < 0 or (count and (tensor.offset + last + 1) * size > held):
        raise ValueError("a tensor lies outside the bytes it is cut from")
    plain = count == 0 or all(
        step == math.prod(tensor.shape[n + 1 :]) for n, step in enumerate(tensor.strides) if tensor.shape[n] != 1
    )
    record = Stored(path, storage.start, "U8", (held,), crc32=storage.crc32)
    whole = plain and count * size == held
    return Stored(
        path,
        storage.start + tensor.offset * size,
        tensor.dtype,
        tensor.shape,
        None if plain else tensor.strides,
        storage.crc32 if whole else None,
        None if whole or storage.crc32 is None or not count else record,
    )
