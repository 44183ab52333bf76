"""Pickles made to harm, and files that hold one."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

NORM = "ln_vision.weight"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


CALLED = [
    ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("builtins", "exec"),
    ("__builtin__", "eval"), ("builtins", "__import__"), ("builtins", "getattr"), ("__builtin__", "getattr"),
    ("builtins", "open"), ("builtins", "compile"), ("builtins", "object"), ("builtins", "type"), ("pickle", "loads"),
    ("functools", "partial"), ("operator", "attrgetter"), ("types", "FunctionType"), ("importlib", "import_module"),
    ("pathlib", "Path.touch"), ("torch", "load"), ("torch.hub", "load"), ("torch.storage", "_load_from_bytes"),
    ("torch", "nn.Module"), ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("torch", "float32.__class__"),
    ("collections", "OrderedDict.__init__"), ("collections", "namedtuple"), ("copyreg", "_reconstructor"),
    ("blip2nb.weights.torchfile", "read_torch_file"), ("numpy.core.multiarray", "_reconstruct"), ("codecs", "open"),
    ("_codecs", "lookup"), ("runpy", "run_path"), ("code", "interact"), ("timeit", "timeit"), ("webbrowser", "open"),
]  # fmt: skip
FORMS: dict[str, Callable[[str, str, bytes], bytes]] = {
    "reduce": lambda module, name, given: b"c%s\n%s\n(%stR." % (module.encode(), name.encode(), given),
    "stack_global": lambda module, name, given: b"\x80\x04" + short(module) + short(name) + b"\x93(" + given + b"tR.",
    "inst": lambda module, name, given: b"(" + given + b"i%s\n%s\n." % (module.encode(), name.encode()),
    "obj": lambda module, name, given: b"(c%s\n%s\n" % (module.encode(), name.encode()) + given + b"o.",
    "newobj": lambda module, name, given: b"\x80\x02c%s\n%s\n(%st\x81." % (module.encode(), name.encode(), given),
    "newobj_ex": lambda module, name, given: b"\x80\x04c%s\n%s\n(%st}\x92." % (module.encode(), name.encode(), given),
    "build": lambda module, name, given: b"ccollections\nOrderedDict\n)R}(" + text("__reduce__")
    + b"c%s\n%s\nub." % (module.encode(), name.encode()),
    "in_a_dict": lambda module, name, given: b"}(" + text("model") + b"}(" + text(NORM)
    + b"c%s\n%s\n(%stRuu." % (module.encode(), name.encode(), given),
    "storage_class": lambda module, name, given: b"(" + text("storage")
    + b"c%s\n%s\n" % (module.encode(), name.encode()) + text("0") + text("cpu") + b"K\x01tQ.",
    "through_a_tensor": lambda module, name, given: b"ctorch._tensor\n_rebuild_from_type_v2\n(c%s\n%s\nN(%stNtR."
    % (module.encode(), name.encode(), given),
}  # fmt: skip


def pth(path: Path, pickled: bytes, zipped: bool) -> Path:
    """A file whose structure is this pickle, with one storage of four zeros."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (
                ("data.pkl", pickled),
                ("byteorder", b"little"),
                ("data/0", bytes(16)),
                ("version", b"3"),
            ):
                archive.writestr(f"archive/{name}", data)
        return path
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, system)]
    path.write_bytes(b"".join([*parts, pickled, pickle.dumps(["0"], 2), struct.pack("<q", 4), bytes(16)]))
    return path


ODDITIES: dict[str, bytes] = {
    "sets_the_code_of_a_function": b"ctorch._utils\n_rebuild_tensor_v2\nN}(" + text("__code__") + b"Nu\x86b.",
    "sets_the_defaults_of_a_function": b"ctorch._utils\n_rebuild_tensor_v2\nN}("
    + text("__defaults__")
    + b"(K\x01tu\x86b.",
    "notes_something_on_a_function": b"ctorch._utils\n_rebuild_tensor_v2\n}(" + text("x") + b"K\x01ub.",
    "sets_something_on_a_class": b"ccollections\nOrderedDict\nN}(" + text("__setstate__") + b"Nu\x86b.",
    "takes_a_dtype_for_a_function": b"ctorch\nfloat32\n)R.",
    "takes_a_dtype_for_a_class": b"\x80\x02ctorch\nfloat32\n)\x81.",
    "has_no_storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(K\x01t(K\x01t\x89NtR.",
    "has_a_text_for_a_storage": b"ctorch._utils\n_rebuild_tensor_v2\n(" + text("0") + b"K\x00(K\x01t(K\x01t\x89NtR.",
    "calls_for_an_unknown_object": text("os.system") + b"Q.",
    "calls_for_nothing": b")Q.",
    "uses_the_registry_of_extensions": b"\x82\x01.",
    "takes_what_is_not_there": b"(h\x05tR.",
    "is_empty": b".",
    "nests_without_end": b"}(" + b"K\x01}(" * 100_000 + b"u" * 100_000 + b"u.",
}
