"""What is in a `.pth` or `.bin` file and where, without reading a tensor, without torch, and without running a pickle.

Both of PyTorch's formats: the zip archive, and the one from before 1.6. Their structure is a pickle, which is a list of
steps for a small machine. It is read by a machine of this module's own, that knows a handful of names, each standing
for a function that only notes what is described; any other name ends the reading. So nothing in a file can run, the
optimizer of a training run costs nothing, and every tensor comes out as the place of its bytes. Steps, bytes and
nesting have bounds, so that no file can fill the memory or take for ever.

Travels to where LAVIS is with the recorder, so that nothing is read by `torch.load` there: Python 3.8, and beside the
standard library NumPy alone.

The formats: torch/serialization.py (`_save`, `_legacy_save`) and torch/_utils.py (`_rebuild_tensor_v2`).
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

if __package__:
    from blip2nb.errors import RequestError
    from blip2nb.weights.stored import SIZES, Stored
else:  # copied to where LAVIS is
    from errors import RequestError  # type: ignore[no-redef]
    from stored import SIZES, Stored  # type: ignore[no-redef]

# What the largest real file needs, times ten and more. A checkpoint of the largest variant in which all of its 1,300
# parameters were trained, with AdamW's three tensors for each, has 155,000 steps in 0.5 MB, and a directory of 0.7 MB;
# nested is no deeper than {"optimizer": {"param_groups": [{"betas": (0.9, 0.999)}]}} and a configuration's ten levels.
_MOST_STEPS = 2_000_000
_MOST_BYTES = 16 << 20
_DEEPEST = 100
_MOST_DIMENSIONS = 64  # what torch's sums over named dimensions take at most
_MOST_ARGUMENTS = 16  # torch's functions that rebuild a tensor have eight or fewer
_MOST_NAMES, _LONGEST_NAME = 5, 80  # that a refusal tells, chosen: a sentence

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
        RequestError: it is not whole, not a PyTorch file, holds something other than tensors and plain values, or more
            than any checkpoint does.
    """
    again = 'Save it again as a plain dict of tensors, torch.save({"model": state_dict}, path), where you trust it.'
    try:
        with _Bounded(io.FileIO(path)) as file:
            if zipfile.is_zipfile(file):
                return _read_zip(path, file)
            file.seek(0)
            return _read_legacy(path, file)
    except _Refused as error:
        raise RequestError(
            f"{path} holds something other than tensors and was not opened, since reading it would run code: "
            f"{error}. {again}"
        ) from error
    except _TooMuch as error:
        raise RequestError(f"{path} was not opened, since {error}. {again}") from error
    except RequestError:
        raise
    except Exception as error:  # a cut or garbled file makes the pickle and zip readers raise whatever its bytes spell
        first = _printable(str(error).strip().split("\n")[0], 200) or type(error).__name__
        raise RequestError(f"{path} is not a whole PyTorch file ({first}). Download or copy it again.") from error


class _Refused(Exception):
    """A pickle that names something it has no business to name."""


class _TooMuch(Exception):
    """A file whose structure is larger than that of any checkpoint."""


_TOO_DEEP = f"it is nested more than {_DEEPEST} deep"


class _Bounded(io.BufferedReader):
    """A file. Tensors are not read through it, and no more of it is read at once than a structure needs."""

    def read(self, size: int | None = -1) -> bytes:
        _check_size(size or 0)
        return super().read(size)


class _Stream:
    """The bytes of one pickle, for `pickletools.genops`; those of a tensor may follow it."""

    def __init__(self, file: IO[bytes]):
        self._file, self._taken = file, 0

    def read(self, size: int) -> bytes:
        self._taken += size
        _check_size(self._taken)
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(_MOST_BYTES + 1)
        self._taken += len(line)
        _check_size(self._taken)
        return line


def _check_size(size: int) -> None:
    if size > _MOST_BYTES:
        raise _TooMuch(f"its structure takes more than {_MOST_BYTES >> 20} MiB")


def _printable(text: str, most: int) -> str:
    """A text that a file chose, for a sentence: cut, and with nothing in it that a terminal would obey."""
    shown = repr(text[: most + 1])[1:-1]
    return shown if len(shown) <= most else shown[: most - 1] + "…"


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
    return _placed(path, content, {}, _DEEPEST)[0]


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
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
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
    except ValueError as error:
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
    return _placed(path, content, {}, _DEEPEST)[0]


# -- the structure


class RestrictedUnpickler:
    """Takes the steps of a pickle: plain values are kept, and no more than the names in `_KNOWN` are known.

    `pickletools` says what the steps are and runs none. No object is made but dicts, lists, tuples and plain values,
    nothing is set on any, and nothing is called but this module's own functions.
    """

    def __init__(self, file: IO[bytes], storage: Callable[[str, str, int, Any], _Storage]):
        self._file, self._storage = file, storage
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._left = _MOST_STEPS
        self._asked: dict[str, None] = {}  # names that it has no business to name, in their order

    def load(self) -> Any:
        """What the next pickle in the file holds.

        Raises:
            _Refused, with all that it asks to run: to know them, the rest of it is looked at as well.
        """
        try:
            value = self._take_steps()
        except Exception:
            if not self._asked:
                raise
        if self._asked:
            names = [_printable(name, _LONGEST_NAME) for name in self._asked]
            rest = [f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
            raise _Refused(f"it asks to run {', '.join(names[:_MOST_NAMES] + rest)}")
        return value

    def _take_steps(self) -> Any:
        for step, given, _ in pickletools.genops(_Stream(self._file)):  # type: ignore[arg-type]
            self._spend(1)
            if step.name in _VALUES:
                self._stack.append(given)
            elif step.name in _STEPS:
                _STEPS[step.name](self, given)
            else:
                raise ValueError(f"PyTorch never writes {step.name}")
        return self._stack.pop()

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise _TooMuch(f"its structure takes more than {_MOST_STEPS:,} steps")

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _last(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count:
            raise ValueError("a step takes what is not there")
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def _mark(self, given: Any) -> None:
        if len(self._marks) == _DEEPEST:
            raise _TooMuch(_TOO_DEEP)
        self._marks.append(len(self._stack))

    def _pop(self, given: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _append(self, values: Iterable[Any]) -> None:
        self._top(list).extend(values)

    def _set(self, values: Sequence[Any]) -> None:
        if len(values) % 2:
            raise ValueError("a dict in it has a key without a value")
        self._top(dict).update(zip(map(_key, values[::2]), values[1::2]))

    def _fill_new(self, given: Any) -> None:
        values = self._since_mark()
        self._stack.append({})
        self._set(values)

    def _top(self, kind: type) -> Any:
        """What is filled now. Of what a stranger would have made nothing is kept."""
        if self._stack[-1] is _STRANGER:
            return kind()
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"a {type(self._stack[-1]).__name__} is filled as if it were a {kind.__name__}")
        return self._stack[-1]

    def _find(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it names something by what is no text")
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Named(_STORAGES[name])
        if module == "torch" and _DTYPE.fullmatch(name):
            return _Named(_DTYPES.get(name, name))
        if (module, name) in _KNOWN:
            return _Call(_KNOWN[module, name], f"{module}.{name}")
        self._asked[f"{module}.{name}"] = None
        return _STRANGER

    def _call(self, function: Any, given: Any) -> Any:
        if function is _STRANGER:
            return _STRANGER
        if not isinstance(function, _Call) or not isinstance(given, tuple) or len(given) > _MOST_ARGUMENTS:
            raise ValueError("it calls something in a way that PyTorch does not")
        self._spend(sum(len(one) for one in given if isinstance(one, (list, tuple, dict))))  # since it may copy them
        return function.does(*given)

    def _make(self, kind: Any) -> Any:
        """An object of a class: none that PyTorch writes is made in this way."""
        if isinstance(kind, _Call):
            self._asked[kind.name] = None
        elif kind is not _STRANGER:
            raise ValueError("it makes an object of something that is no class")
        return _STRANGER

    def _make_named(self, given: str) -> None:
        self._since_mark()
        self._stack.append(self._make(self._find(*given.split(" ", 1))))

    def _build(self, given: Any) -> None:
        """What is set on a value beside its items, such as a state dict's `_metadata`, is of no interest."""
        self._stack.pop()
        if isinstance(self._stack[-1], _Call):
            self._asked[self._stack[-1].name] = None
        self._top(dict)

    def _reference(self, saved: Any) -> _Storage:
        if not isinstance(saved, tuple) or not 5 <= len(saved) <= 6 or saved[0] != "storage":
            raise _Refused("it holds a reference to something that is no tensor")
        _, kind, key, _location, count, *view = saved
        if not isinstance(kind, _Named) or not isinstance(key, (str, int)) or not isinstance(count, int):
            raise _Refused("it holds a reference to something that is no tensor")
        return self._storage(kind.dtype, str(key), count, view[0] if view else None)


_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
"""Steps that are a value."""

_STEPS: dict[str, Callable[[RestrictedUnpickler, Any], object]] = {
    "PROTO": lambda self, given: None,
    "FRAME": lambda self, given: None,
    "STOP": lambda self, given: None,
    "NONE": lambda self, given: self._stack.append(None),
    "NEWTRUE": lambda self, given: self._stack.append(True),
    "NEWFALSE": lambda self, given: self._stack.append(False),
    # Python 2's texts: PyTorch too takes them for UTF-8
    "BINSTRING": lambda self, given: self._stack.append(given.encode("latin-1").decode()),
    "SHORT_BINSTRING": lambda self, given: self._stack.append(given.encode("latin-1").decode()),
    "MARK": RestrictedUnpickler._mark,
    "POP": RestrictedUnpickler._pop,
    "POP_MARK": lambda self, given: self._since_mark(),
    "DUP": lambda self, given: self._stack.append(self._stack[-1]),
    "PUT": lambda self, given: self._memo.update({given: self._stack[-1]}),
    "BINPUT": lambda self, given: self._memo.update({given: self._stack[-1]}),
    "LONG_BINPUT": lambda self, given: self._memo.update({given: self._stack[-1]}),
    "MEMOIZE": lambda self, given: self._memo.update({len(self._memo): self._stack[-1]}),
    "GET": lambda self, given: self._stack.append(self._memo[given]),
    "BINGET": lambda self, given: self._stack.append(self._memo[given]),
    "LONG_BINGET": lambda self, given: self._stack.append(self._memo[given]),
    "EMPTY_TUPLE": lambda self, given: self._stack.append(()),
    "TUPLE": lambda self, given: self._stack.append(tuple(self._since_mark())),
    "TUPLE1": lambda self, given: self._stack.append(self._last(1)),
    "TUPLE2": lambda self, given: self._stack.append(self._last(2)),
    "TUPLE3": lambda self, given: self._stack.append(self._last(3)),
    "EMPTY_LIST": lambda self, given: self._stack.append([]),
    "LIST": lambda self, given: self._stack.append(self._since_mark()),
    "APPEND": lambda self, given: self._append(self._last(1)),
    "APPENDS": lambda self, given: self._append(self._since_mark()),
    # a set is read as a list: it is of no interest, and its items need not be hashed
    "EMPTY_SET": lambda self, given: self._stack.append([]),
    "FROZENSET": lambda self, given: self._stack.append(self._since_mark()),
    "ADDITEMS": lambda self, given: self._append(self._since_mark()),
    "EMPTY_DICT": lambda self, given: self._stack.append({}),
    "DICT": RestrictedUnpickler._fill_new,
    "SETITEM": lambda self, given: self._set(self._last(2)),
    "SETITEMS": lambda self, given: self._set(self._since_mark()),
    "GLOBAL": lambda self, given: self._stack.append(self._find(*given.split(" ", 1))),
    "STACK_GLOBAL": lambda self, given: self._stack.append(self._find(*self._last(2))),
    "REDUCE": lambda self, given: self._stack.append(self._call(*self._last(2))),
    "BUILD": RestrictedUnpickler._build,
    "BINPERSID": lambda self, given: self._stack.append(self._reference(*self._last(1))),
    "INST": RestrictedUnpickler._make_named,
    "OBJ": lambda self, given: self._stack.append(self._make(self._since_mark()[0])),
    "NEWOBJ": lambda self, given: self._stack.append(self._make(self._last(2)[0])),
    "NEWOBJ_EX": lambda self, given: self._stack.append(self._make(self._last(3)[0])),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Named:
    """What a dtype or a class of storages is read as."""

    dtype: str


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a pickle may call, and by which name it does. That is all it may do with it."""

    does: Callable[..., Any]
    name: str


class _Stranger:
    """Stands for whatever a name that is not known would have made: nothing is done with it."""


_STRANGER = _Stranger()


def _rebuild(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any = False, hooks: Any = None, marks: Any = None
) -> _Tensor:
    return _tensor(storage, storage.dtype, offset, shape, strides, marks)


def _rebuild_with_dtype(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, kind: _Named, marks: Any = None
) -> _Tensor:
    return _tensor(storage, kind.dtype, offset, shape, strides, marks)


def _tensor(storage: Any, dtype: str, offset: Any, shape: Any, strides: Any, marks: Any) -> _Tensor:
    if not isinstance(storage, _Storage) or not all(isinstance(one, tuple) for one in (shape, strides)):
        raise ValueError("a tensor is described in a way that PyTorch does not")
    if len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    if not all(isinstance(one, int) and abs(one) < 1 << 63 for one in (offset, *shape, *strides)):
        raise ValueError("a tensor's shape is not of numbers")
    if marks and marks.get("neg"):
        dtype = f"{dtype} with the sign turned"  # a view that negates when it is read: no dtype of ours
    return _Tensor(storage, dtype, offset, shape, strides)


def _parameter(data: _Tensor, *rest: Any) -> _Tensor:
    return data


def _with_attributes(function: Any, kind: Any, given: Any, state: Any) -> Any:
    if not isinstance(function, _Call) or not isinstance(given, tuple):
        raise ValueError("it makes a tensor in a way that PyTorch does not")
    return function.does(*given)  # one of `_KNOWN`; what was set on the tensor is of no interest


def _nothing(*arguments: Any) -> None:
    """What is of no interest."""


def _dict(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {_key(key): value for key, value in pairs}


def _key(key: Any) -> Any:
    """A dict's key: a text or a number. Others could be made to take for ever to hash, or to collide."""
    if isinstance(key, (str, bytes, float, type(None))) or (isinstance(key, int) and abs(key) < 1 << 64):
        return key
    raise ValueError("a dict in it has keys that are neither texts nor numbers")


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
    ("torch", "Tensor"): _nothing,
    ("torch.nn.parameter", "Parameter"): _nothing,
    ("torch.nn.parameter", "Buffer"): _nothing,
    ("torch", "Size"): _nothing,
    ("torch", "device"): _nothing,
    ("collections", "OrderedDict"): _dict,
    ("collections", "defaultdict"): lambda *arguments: {},
    ("collections", "Counter"): _dict,
    ("builtins", "dict"): _dict,
    ("builtins", "set"): _nothing,
    ("builtins", "complex"): _nothing,
    ("builtins", "bytearray"): _nothing,
    # what the pickles of Python 2's time, as torch.save writes them, call these and bytes
    ("__builtin__", "dict"): _dict,
    ("__builtin__", "set"): _nothing,
    ("__builtin__", "complex"): _nothing,
    ("__builtin__", "bytearray"): _nothing,
    ("__builtin__", "bytes"): _nothing,
    ("_codecs", "encode"): _nothing,
}


def _placed(path: Path, value: Any, seen: dict[int, tuple[Any, int]], room: int) -> tuple[Any, int]:
    """The same structure with the tensors in its dicts as `Stored`, and how deep it is nested. Everything else is left
    as it is.

    Args:
        seen: what was walked through already. It is in there before its items are, so that one that holds itself ends.
        room: how deep it may be.
    """
    if isinstance(value, _Tensor):
        return _stored(path, value), 0
    if not isinstance(value, (dict, list, tuple)):
        return value, 0
    if id(value) not in seen:
        if not room:
            raise _TooMuch(_TOO_DEEP)
        out: Any = {} if isinstance(value, dict) else value
        seen[id(value)] = out, 0
        deepest = 0
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            placed, depth = _placed(path, item, seen, room - 1)
            deepest = max(deepest, depth)
            if out is not value:
                out[key] = placed
        seen[id(value)] = out, deepest + 1
    if seen[id(value)][1] > room:
        raise _TooMuch(_TOO_DEEP)
    return seen[id(value)]


def _stored(path: Path, tensor: _Tensor) -> Stored | Odd:
    size = SIZES.get(tensor.dtype)
    if size is None:
        return Odd(tensor.dtype, tensor.shape)
    storage = tensor.storage
    held = storage.count * (SIZES.get(storage.dtype) or _OTHER_SIZES[storage.dtype])
    count = math.prod(tensor.shape)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides)) if count else -1
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
