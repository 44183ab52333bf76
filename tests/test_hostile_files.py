"""Weights files made to harm: what the reader says of them, what it spends on them, and the same where LAVIS is."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickles import CALLED, FORMS, ODDITIES, pth, short, text

from blip2nb.errors import RequestError
from blip2nb.families.captioners import lavis
from blip2nb.lavis_env import kernels
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.weights import torchfile
from blip2nb.weights.sources import open_file
from blip2nb.weights.torchfile import RestrictedUnpickler, read_torch_file


def named(module: str, name: str) -> bytes:
    return b"c%s\n%s\n" % (module.encode(), name.encode())


def tensor(shape: bytes) -> bytes:
    """A tensor with these steps for its shape and, again, for its strides."""
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage(text("0")) + b"K\x00" + shape + b"2\x89NtR."


def storage(key: bytes) -> bytes:
    return b"(" + text("storage") + named("torch", "FloatStorage") + key + text("cpu") + b"K\x04tQ"


PAIRS = b")" + b"2\x86" * 60
"""A pair of a pair of a pair …, both halves the same: whoever looks at every leaf looks at 2**60."""

HELD = storage(text("0")) + b"0"  # what the older format's list of storages names

WIDE: dict[str, tuple[bytes, str]] = {
    "steps": (b"N0" * 20_000 + b".", r"takes more than [\d,]+ steps"),
    "memo": (b"N" + b"\x94" * 30_000 + b".", r"takes more than [\d,]+ steps"),
    "copies": (
        b"](" + b"K\x01K\x01\x86" * 500 + b"eq\x01" + (named("collections", "Counter") + b"h\x01\x85R0") * 50 + b".",
        r"takes more than [\d,]+ steps",
    ),
    "a_long_text": (b"\x8d" + struct.pack("<Q", 1 << 40) + b".", "takes more than 16 MiB"),
    "a_long_line": (b"I" + b"1" * (17 << 20) + b"\n.", "takes more than 16 MiB"),
    "tuples": (HELD + b")" + b"\x85" * 15_000 + b".", "nested more than 100 deep"),
    "lists": (HELD + b"]" * 9_000 + b"a" * 8_999 + b".", "nested more than 100 deep"),
    "dicts": (b"}(K\x01" * 4_000 + b"N" + b"u" * 4_000 + b".", "nested more than 100 deep"),
    "shared": (HELD + b"](" + b")" + b"\x85" * 90 + b"q\x01h\x01" + b"\x85" * 90 + b"e.", "nested more than 100 deep"),
    "keys": (b"}" + PAIRS + b"Ns.", "keys that are neither texts nor numbers"),
    "keys_that_collide": (b"}\x8a\x09" + (1 << 64).to_bytes(9, "little") + b"Ns.", "keys that are neither texts nor"),
    "a_reference": (PAIRS + b"Q.", "holds a reference to something that is no tensor"),
    "a_record": (storage(PAIRS) + b".", "holds a reference to something that is no tensor"),
    "dimensions": (tensor(b"(" + b"K\x01" * 1000 + b"t"), "has 1000 dimensions"),
    "sizes": (tensor(b"\x8b" + struct.pack("<i", 1000) + b"\x7f" * 1000 + b"\x85"), "shape is not of numbers"),
    "arguments": (named("torch", "Size") + b"(" + b"N" * 100 + b"tR.", "in a way that PyTorch does not"),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
@pytest.mark.parametrize("what", WIDE)
def test_what_no_checkpoint_needs_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, zipped: bool
):
    monkeypatch.setattr(torchfile, "_MOST_STEPS", 20_000)  # of two million: it takes seconds to get there
    program, why = WIDE[what]
    with pytest.raises(RequestError, match=why) as error:
        read_torch_file(pth(tmp_path / "weights.pth", program, zipped))
    assert len(str(error.value)) < 600
    assert str(error.value).isprintable()


def test_the_bounds_are_far_above_what_the_largest_checkpoint_needs(tmp_path: Path):
    """Every parameter of the largest variant trained with AdamW: LAVIS's trainer leaves such a file."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(1300)]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.zeros(1)
    optimizer.step()
    names = [f"t5_model.decoder.block.{number}.layer.1.EncDecAttention.q.weight" for number in range(1300)]
    config = {"run": {"lr_sched": {"a": {"b": {"c": {"d": [0.9, (0.9, 0.999)]}}}}}}
    content = {"model": dict(zip(names, weights, strict=True)), "optimizer": optimizer.state_dict(), "config": config}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert list(open_file(tmp_path / "checkpoint.pth")) == names
    with zipfile.ZipFile(tmp_path / "checkpoint.pth") as archive:
        program = archive.read("checkpoint/data.pkl")
        directory = sum(46 + len(info.filename) for info in archive.infolist())
    assert 10 * sum(1 for _ in pickletools.genops(program)) < torchfile._MOST_STEPS
    assert 10 * len(program) < torchfile._MOST_BYTES
    assert 10 * directory < torchfile._MOST_BYTES


def test_a_directory_of_endless_records_is_not_read(tmp_path: Path):
    size = 17 << 20
    with open(tmp_path / "weights.pth", "wb") as file:
        file.seek(size)
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 60_000, 60_000, size, 0, 0))
    with pytest.raises(RequestError, match="takes more than 16 MiB"):
        read_torch_file(tmp_path / "weights.pth")


def test_a_compressed_structure_is_not_unpacked(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "weights.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N0" * 4_000_000 + b".")
    with pytest.raises(RequestError, match=r"data\.pkl is compressed"):
        read_torch_file(tmp_path / "weights.pth")


def test_a_place_in_the_memo_far_away_costs_nothing(tmp_path: Path):
    """Five bytes that make Python's own unpickler set 32 GB aside."""
    assert read_torch_file(pth(tmp_path / "weights.pth", b"]r\xff\xff\xff\x7f.", True)) == []


def test_what_holds_itself_ends(tmp_path: Path):
    content = read_torch_file(pth(tmp_path / "weights.pth", b"}q\x01K\x01h\x01s.", True))
    assert content[1] is content


# -- what a refusal says


ASKED = [("os", "system"), ("builtins", "eval"), ("a", "b"), ("c", "d"), ("numpy", "array"), ("e", "f"), ("g", "h")]


def test_a_refusal_names_what_the_pickle_asks_to_run(tmp_path: Path):
    """All of it, known and repeated names apart: the rest of the pickle is looked at as well."""
    calls = b"".join(named(*one) + b")R0" for one in [*ASKED[:3], ("collections", "OrderedDict"), ASKED[0]])
    with pytest.raises(RequestError, match=r"would run code: it asks to run os\.system, builtins\.eval, a\.b\. Save"):
        read_torch_file(pth(tmp_path / "weights.pth", calls + b".", True))


@pytest.mark.parametrize("behind", [b".", b"", b"\xff", b"0000.", b"N" + b"\x94" * 30_000 + b"."])
def test_many_names_are_counted_whatever_comes_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: bytes
):
    monkeypatch.setattr(torchfile, "_MOST_STEPS", 20_000)
    calls = b"".join(named(*one) + b"}(K\x01Nu\x81}b0" for one in ASKED)  # an object, and something set on it
    with pytest.raises(RequestError, match=r"os\.system, builtins\.eval, a\.b, c\.d, numpy\.array, 2 more\. Save"):
        read_torch_file(pth(tmp_path / "weights.pth", calls + behind, True))


def test_a_name_cannot_speak_to_the_terminal_nor_fill_it(tmp_path: Path):
    names = [("\x1b]0;title\x07", "two\nlines"), ("right to \u202e left", "x" * 1_000_000), ("o" * 300, "s")]
    program = b"\x80\x04" + b"".join(text(one) + text(other) + b"\x93)R0" for one, other in names) + b"."
    shown = r"run \\x1b\]0;title\\x07\.two\\nlines, right to \\u202e left\.x+…, o+…\. Save"
    with pytest.raises(RequestError, match=shown) as error:
        read_torch_file(pth(tmp_path / "weights.pth", program, True))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


# -- any pickle at all


def values(protocol: int) -> st.SearchStrategy:
    """Plain values; bytes where the protocol has a form of its own for them."""
    leaf = [st.none(), st.booleans(), st.integers(-(1 << 80), 1 << 80), st.floats(allow_nan=False), st.text(max_size=9)]
    keys = st.one_of(st.text(st.characters(codec="utf-8"), max_size=5), st.integers(-(1 << 63), 1 << 63))
    return st.recursive(
        st.one_of(*leaf, *([st.binary(max_size=9)] if protocol > 2 else [])),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=5).map(tuple),
            st.dictionaries(keys, inner, max_size=4),
        ),
        max_leaves=12,
    )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_what_python_itself_unpickles(protocol: int):
    @given(values(protocol))
    @settings(max_examples=25)
    def same(value: object) -> None:
        program = pickle.dumps(value, protocol)
        found = RestrictedUnpickler(io.BytesIO(program), lambda *_: pytest.fail("no storage is named")).load()
        assert pickle.dumps(found) == pickle.dumps(pickle.loads(program))

    same()


STEPS = [
    *(bytes([step]) for step in b"()]}N012tldaesuRboQ.\x81\x85\x86\x88\x8f\x90\x91\x92\x93\x94"),
    *(b"K\x01", b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"\x82\x01", b"I7\n", b"Pid\n", b"ios\nsystem\n"),
    *(short(one) for one in ("os", "system", "model")),
    *(named("torch", one) for one in ("float32", "FloatStorage", "Size")),
    *(named("collections", one) for one in ("OrderedDict", "Counter")),
    *(named("torch._utils", "_rebuild_tensor_v2"), named("torch._tensor", "_rebuild_from_type_v2")),
    *(named("os", "system"), storage(text("0")), tensor(b"K\x02\x85")),
]


def refusal(path: Path) -> str:
    try:
        open_file(path)
    except RequestError as error:
        return str(error)
    return "nothing"


def test_whatever_the_steps_it_is_read_or_refused_in_one_sentence(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("any") / "weights.pth"
    ends = set()

    @given(st.sampled_from([b"", named("os", "system")]), st.lists(st.sampled_from(STEPS), max_size=30), st.booleans())
    @settings(max_examples=200)
    def ended(first: bytes, steps: list[bytes], zipped: bool) -> None:
        said = refusal(pth(path, b"".join([first, *steps, b"."]), zipped))
        assert said.isprintable()
        assert len(said) < len(str(path)) + 600
        ends.add(re.search("run code|whole|dict of tensors|no tensors|deep|neither|nothing", said)[0])

    ended()
    assert {"run code", "whole", "dict of tensors"} <= ends


# -- where LAVIS is


READ_ALL = """
import json, resource, sys
for absent in ("blip2nb", "torch", "blake3", "isal"):
    sys.modules[absent] = None
from pathlib import Path
from errors import RequestError
from torchfile import read_torch_file
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))  # where the memory were filled, something else would be said

said = {}
for path in sorted(Path("files").iterdir()):
    try:
        said[path.name] = repr(sorted(read_torch_file(path)))
    except RequestError as error:
        said[path.name] = "refused: {}".format(error)
json.dump(said, sys.stdout)
"""


@pytest.mark.lavis
def test_hostile_files_are_refused_where_lavis_is(tmp_path: Path):
    """The reader as it travels, run by LAVIS's own Python, with nothing beside it but NumPy. All of them in one go."""
    found = find_lavis()
    assert found is not None, "run `make lavis` first: this test needs LAVIS itself"
    files, marker = tmp_path / "files", tmp_path / "code-ran"
    files.mkdir()
    for name, path in kernels._FILES.items():
        shutil.copyfile(path, tmp_path / name)
    expected = {}
    for zipped in (True, False):
        kind = "zip" if zipped else "old"
        for form, write in FORMS.items():
            for number, (module, name) in enumerate(CALLED):
                given = text(
                    f"touch {marker}" if "system" in name or name == "Popen" else f"open({str(marker)!r}, 'w')"
                )
                path = pth(files / f"{kind}-{form}-{number}", write(module, name, given), zipped)
                expected[path.name] = re.escape(f"would run code: it asks to run {module}.{name}. ")
        for name, (program, why) in WIDE.items():
            if "steps" not in why:
                expected[pth(files / f"{kind}-{name}", program, zipped).name] = why
        for name, program in ODDITIES.items():
            expected[pth(files / f"{kind}-{name}", program, zipped).name] = ""
        torch.save({"weight": torch.arange(3.0)}, files / f"{kind}-good", _use_new_zipfile_serialization=zipped)
    memo = pth(files / "memo", b"N" + b"\x94" * 10_000_000 + b".", False)
    expected[memo.name] = "takes more than 2,000,000 steps"
    done = subprocess.run(
        [str(found.python), "-c", READ_ALL], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert {said.pop("zip-good"), said.pop("old-good")} == {"['weight']"}
    assert set(said) == set(expected)
    for name, why in expected.items():
        assert re.match(rf"refused: .*{why}", said[name]), (name, said[name])
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_the_recorder_reads_weights_with_that_reader_and_with_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
):
    given = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {f"module.{name}": value for name, value in given.items()}}, path,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    odd = tmp_path / "odd.pth"
    torch.save({"c": torch.ones(2, dtype=torch.complex64)}, odd, _use_new_zipfile_serialization=zipped)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("torch.load runs code below torch 2.6")

    monkeypatch.setattr(torch, "load", forbidden)
    found = dict(lavis._read(str(path)))
    assert list(found) == list(given)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in given.items())
    with pytest.raises(ValueError, match="c has dtype C64"):
        list(lavis._read(str(odd)))
