"""What the tests share: the kit's cache in a folder of its own, twins converted once, and the command line."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import browser
import interrupts
import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file

from blip2nb import api, cli
from blip2nb.conversion.files import own_files
from blip2nb.handles import Run
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.variants import variant

if TYPE_CHECKING:
    from forks import Forks, Large

settings.register_profile(
    "kit", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kit")
interrupts.heard()
torch.set_num_threads(1)  # twins are small, and threads that wait for each other are slow on a busy machine


LONGEST = ("test_notebooks_by_hand", "test_notebooks_headless", "test_sweep", "test_finetuned", "test_interrupted")
"""Files that take a minute and more. Where two run at a time, a file is one piece of work: long ones begin first."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the extended tests unless they are asked for, also where `-m` asks for something else."""
    if "extended" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("extended")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: item.path.stem not in LONGEST)


_BAR = re.compile(r"\d+%\||\[\d\d:\d\d\]\s*$")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command ended with and said."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """The lines on stderr that are not a progress bar."""
        return [line for line in re.split(r"[\r\n]+", self.err) if line.strip() and not _BAR.search(line)]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything under a folder, hidden or not; of files their time of change and their content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"")
        for path in sorted(folder.rglob("*"))
    }


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of a .pth, .bin or .safetensors file in place."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        content = torch.load(path, weights_only=True)
        change(content.get("model", content))
        torch.save(content, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def flip(path: Path, at: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2NB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("BLIP2NB_CORES", "1")  # two tests run at a time: each keeps to its own,
        patch.setenv("OMP_NUM_THREADS", "1")  # and so does what it starts
        yield


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, _cache: None) -> Callable[[str], Run]:
    """The run of a twin, converted once. Not to be changed: see `model_copy`."""
    folder = tmp_path_factory.mktemp("converted")
    return functools.cache(lambda name: api.convert(name, output=folder / name / "model"))


@pytest.fixture(scope="session")
def warm_kernels(_cache: None) -> Iterator[str]:
    """What has to be in JUPYTER_PATH for kernels that need not import PyTorch and transformers first."""
    import warm

    with tempfile.TemporaryDirectory() as folder, warm.python(sys.executable, warm.KERNELS, Path(folder)) as command:
        yield str(warm.kernel(command, "python3"))


@pytest.fixture(scope="session")
def warm_lavis(_cache: None) -> Iterator[Path]:
    """A Python that stands for that of LAVIS's environment, also as a kernel, and need not import LAVIS first."""
    import warm

    found = find_lavis()
    assert found is not None, "run `make lavis` first: these tests need LAVIS itself"
    with tempfile.TemporaryDirectory() as folder, warm.python(found.python, warm.LAVIS, Path(folder)) as command:
        warm.kernel(command, "lavis")
        yield command


@pytest.fixture(scope="module")
def kernels_begin_warm(request: pytest.FixtureRequest, warm_kernels: str) -> Iterator[None]:
    """For a module that starts kernels often."""
    own = [str(request.getfixturevalue("warm_lavis").parent)] if find_lavis() is not None else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", os.pathsep.join([warm_kernels, *own]))
        yield


@pytest.fixture(scope="module")
def lavis_begins_warm(warm_lavis: Path) -> Iterator[None]:
    """For a module that starts LAVIS often, and not as a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2NB_LAVIS_PYTHON", str(warm_lavis))
        yield


@pytest.fixture
def source_copy(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a twin's own files, in the released layout, to be changed."""
    return lambda name: Path(shutil.copytree(own_files(variant(name)).vision.parent, tmp_path / "source" / name))


@pytest.fixture
def model_copy(tmp_path: Path, converted: Callable[[str], Run]) -> Callable[[str], Run]:
    """A copy of a converted twin, to be changed."""

    def copy(name: str) -> Run:
        folder = tmp_path / "run"
        shutil.copytree(converted(name).model, folder / "model")
        return Run(folder, folder / "model")

    return copy


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory, _cache: None) -> Iterator[Forks]:
    """Starts processes that are to die."""
    from forks import Forks

    found = Forks(tmp_path_factory.mktemp("said"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Large]:
    """A source of many megabytes, so that there is something to interrupt."""
    from forks import Large, grow

    folder = tmp_path_factory.mktemp("large")
    # chosen: large enough that a signal finds a conversion at work
    made = Large(grow(folder / "source", width=256, layers=14), {}, 0)
    times = []
    for number in range(4):  # chosen: the shortest of a few is near what it takes undisturbed
        begun = time.monotonic()
        ended = forks.run(*made.request(folder / str(number)))
        times.append(time.monotonic() - begun)
        assert ended.status == 0, ended.err
    assert contents(folder / "0" / "model") == contents(folder / "1" / "model")
    yield dataclasses.replace(made, whole=contents(folder / "0" / "model"), seconds=min(times))
    shutil.rmtree(folder)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line, in this process: `command("convert", name, "--output", folder)`."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["blip2nb", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capfd.readouterr()
        return Outcome(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser for one module: while it is open no other event loop runs in this thread, such as a kernel client's."""
    lacking = browser.missing()
    if lacking:
        pytest.skip(f"no {' and no '.join(lacking)} here; `python tests/browser.py` gets them where it can")
    with browser.opened() as one:
        yield one
