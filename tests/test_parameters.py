"""Whatever papermill, a list of runs or a command line makes of a parameter's value, a notebook has its own type."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill.cli
import pytest
import yaml
from click.testing import CliRunner
from conftest import edit_weights, snapshot
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from blip2nb import api
from blip2nb.errors import RequestError
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.notebook import parameters, typed
from blip2nb.sweeps.asked import expand, open_notebook

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OPT = "tiny-blip2-opt-2.7b"
CHECK = "import blip2nb\nblip2nb.check_notebook()"

FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NOTHING = [None, "None", "null", ""]
CASES: list[tuple[str, Any, Any]] = [
    *[("x: bool = True", spelled, value)
      for word, value in FLAGS.items() for spelled in (word, word.upper(), word.title())],
    *[("x: bool = False", given, value) for given, value in ((True, True), (False, False), (1, True), (0, False))],
    *[(f"x: {kind} = {default!r}", nothing, default)
      for kind, default in (("bool", True), ("bool", False), ("int", 7), ("float", 0.5), ("str", "auto"), ("str", ""))
      for nothing in NOTHING],
    ("x: str = ''", 2024, "2024"), ("x: str = ''", "007", "007"), ("x: str = ''", "false", "false"),
    ("x: str = ''", -1, "-1"), ("x: str = ''", "none", "none"), ("x: str = ''", "1e5", "1e5"),
    ("x: int = 0", "3", 3), ("x: int = 0", 3, 3), ("x: int = 0", "-3", -3),
    ("x: float = 0.0", "1e5", 1e5), ("x: float = 0.0", 2, 2.0), ("x: float = 0.0", 0.1, 0.1),
    ("x: str | None = None", 3, "3"), ("x: str | None = None", "null", None), ("x: 'Optional[int]' = 4", "5", 5),
    ("x: list[str] = []", ["a", 1], ["a", 1]), ("x: list = ['a']", None, ["a"]), ("x: dict = {}", {"a": 1}, {"a": 1}),
    ("x = 3", "4", 4), ("x = True", "no", False), ("x = -1", "2", 2), ("x = None", 1.5, 1.5),
    ("model_name: str = 'a'", "", ""), ("model_name: str = 'a'", None, "a"), ("model_name: str = 'a'", "null", "a"),
]  # fmt: skip
REFUSED: list[tuple[str, Any, str]] = [
    ("x: bool = True", "perhaps", "x should be true or false, found 'perhaps'."),
    ("x: bool = True", 2, "x should be true or false, found 2."),
    ("x: bool = True", 1.0, "x should be true or false, found 1.0."),
    ("x: bool = True", [], "x should be true or false, found []."),
    ("x: int = 0", "1.5", "x should be a whole number, found '1.5'."),
    ("x: int = 0", 2.0, "x should be a whole number, found 2.0."),
    ("x: int = 0", True, "x should be a whole number, found True."),
    ("x: int = 0", [1], "x should be a whole number, found [1]."),
    ("x: float = 0.0", "much", "x should be a number, found 'much'."),
    ("x: float = 0.0", False, "x should be a number, found False."),
    ("x: str = ''", 100000.0, "x should be text, found 100000.0. Its spelling is lost: give it with papermill's -r"),
    ("x: str = ''", float("nan"), "x should be text, found nan. Its spelling is lost"),
    ("x: str = ''", True, "x should be text, found True. Its spelling is lost"),
    ("x: str = ''", ["a"], "x should be text, found ['a']."),
    ("x: list[str] = []", "a b", "x should be a list, found 'a b'."),
]


@pytest.mark.parametrize(("declaration", "given", "value"), CASES)
def test_a_value_is_brought_to_its_declared_type(declaration: str, given: Any, value: Any):
    (parameter,) = parameters(declaration).values()
    found = typed(parameter, given)
    assert (type(found), found) == (type(value), value)
    assert typed(parameter, found) == found, "as when the cell is run again"


@pytest.mark.parametrize(("declaration", "given", "words"), REFUSED)
def test_what_is_no_value_of_the_type_is_refused_in_one_sentence(declaration: str, given: Any, words: str):
    (parameter,) = parameters(declaration).values()
    with pytest.raises(RequestError) as error:
        typed(parameter, given)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


# -- through papermill's own command line, and the notebooks' own cells


def cells_of(path: Path, folder: Path, *arguments: str) -> list[str]:
    """The first cells of code of a notebook as papermill would run it: the tagged one and the injected one."""
    out = folder / "prepared.ipynb"
    done = CliRunner().invoke(papermill.cli.papermill, [str(path), str(out), "--prepare-only", *arguments])
    assert done.exit_code == 0, done.output
    return [cell.source for cell in nbformat.read(out, 4).cells if cell.cell_type == "code"][:2]


def given_as(way: str, values: dict[str, str], folder: Path) -> list[str]:
    if way in ("-p", "-r"):
        return [word for name, value in values.items() for word in (way, name, value)]
    text = "".join(f"{name}: {value}\n" for name, value in values.items())
    if way == "-y":
        return ["-y", text]
    (folder / "given.yaml").write_text(text)
    return ["-f", str(folder / "given.yaml")]


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """IPython as a kernel has it, in this process."""
    config = Config()
    config.HistoryManager.hist_file = ":memory:"
    yield InteractiveShell.instance(config=config)
    InteractiveShell.clear_instance()


def run(shell: InteractiveShell, *cells: str) -> dict[str, Any]:
    for cell in cells:
        shell.run_cell(cell, store_history=True, silent=False).raise_error()
    return shell.user_ns


@pytest.mark.parametrize("way", ["-p", "-r", "-y", "-f"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_of_every_notebook_has_its_type_however_it_is_given(
    shell: InteractiveShell, tmp_path: Path, path: Path, way: str
):
    """`lavis.ipynb` too: only its kernel's name is left out here."""
    declared = open_notebook(path).parameters
    spelled = {bool: "off", int: "3", str: "2024"}
    assert {one.kind for one in declared.values()} <= set(spelled)
    values = {name: spelled[one.kind] for name, one in declared.items()}
    found = run(
        shell, *cells_of(path, tmp_path, *given_as(way, values, tmp_path)), "import blip2nb\nblip2nb.check_notebook()"
    )
    expected = {bool: False, int: 3, str: "2024"}
    for name, one in declared.items():
        assert (type(found[name]), found[name]) == (one.kind, expected[one.kind]), name


@pytest.mark.parametrize("word", ["None", "null", ""])
@pytest.mark.parametrize("way", ["-p", "-r", "-y", "-f"])
def test_what_says_nothing_is_as_if_not_given(shell: InteractiveShell, tmp_path: Path, way: str, word: str):
    path = ROOT / "notebooks" / "convert.ipynb"
    declared = {name: value for name, value in open_notebook(path).declared.items() if name != "model_name"}
    given = given_as(way, dict.fromkeys(declared, word), tmp_path)
    found = run(shell, *cells_of(path, tmp_path, *given), CHECK)
    assert {name: found[name] for name in declared} == declared


@pytest.mark.parametrize("given", [("-p", "overwrite", "perhaps"), ("-p", "run_name", "1e5"), ("-y", "dtype: [auto]")])
def test_a_notebook_refuses_before_anything_runs(shell: InteractiveShell, tmp_path: Path, given: tuple[str, ...]):
    cells = cells_of(ROOT / "notebooks" / "convert.ipynb", tmp_path, *given)
    with pytest.raises(RequestError, match=r"^(overwrite|run_name|dtype) should be \S+.*found"):
        run(shell, *cells, CHECK)


@pytest.mark.lavis
def test_it_holds_in_laviss_environment(tmp_path: Path):
    """Its IPython is an older one, and its Python may be."""
    lavis = find_lavis()
    assert lavis is not None
    given = ["-p", "run_name", "2024", "-p", "base", "None", "-p", "device", "null"]
    cells = cells_of(ROOT / "notebooks" / "lavis.ipynb", tmp_path, *given)
    cells.append("import blip2nb\nblip2nb.check_notebook(kernel='lavis')\nprint([run_name, base, device])")
    code = (
        "import json, sys\nfrom IPython.core.interactiveshell import InteractiveShell\n"
        "from traitlets.config import Config\nconfig = Config()\nconfig.HistoryManager.hist_file = ':memory:'\n"
        "shell = InteractiveShell.instance(config=config)\n"
        "for cell in json.load(sys.stdin):\n    shell.run_cell(cell, store_history=True).raise_error()\n"
    )
    command = [str(lavis.python), "-W", "ignore", "-c", code]
    done = subprocess.run(command, input=json.dumps(cells), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "['2024', '', 'cpu']"


def test_overwrite_false_overwrites_nothing(
    source_copy: Callable[[str], Path], kernels_begin_warm: None, tmp_path: Path
):
    """Another source's finished run stays as it is, byte for byte."""
    folder = source_copy(OPT)
    edit_weights(next(folder.glob("blip2_*.pth")), lambda tensors: tensors["query_tokens"].add_(0.5))
    outputs = tmp_path / "outputs"
    mine = api.convert(OPT, folder, output_dir=outputs, run_name="mine")
    before = snapshot(outputs)
    command = [str(Path(sys.executable).parent / "papermill"), str(ROOT / "notebooks" / "convert.ipynb")]
    command += [str(tmp_path / "out.ipynb"), "-p", "run_name", "mine", "-p", "output_dir", str(outputs)]
    done = subprocess.run([*command, "-p", "overwrite", "false"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode != 0
    assert f"RequestError: {mine.model}" in done.stderr
    assert snapshot(outputs) == before


# -- a sweep's lists, options and grid: the same types, before anything starts


def test_a_sweep_has_the_same_types(tmp_path: Path):
    rows = [{"model_name": OPT, "run_name": 2024, "overwrite": "off", "dtype": None, "proof": ""}]
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(rows))
    (one,) = expand([tmp_path / "runs.yaml"], parameters={"dtype": "float16", "device": None, "lavis_python": "none"})
    assert one.name == "2024"
    assert one.parameters == {"model_name": OPT, "overwrite": False, "dtype": "float16", "lavis_python": "none"}
    flags = expand([OPT], grid={"overwrite": ["on", "off"], "dtype": ["", "float16"]})
    assert [(run.parameters["overwrite"], run.parameters["dtype"]) for run in flags] == [
        (True, "auto"), (True, "float16"), (False, "auto"), (False, "float16"),
    ]  # fmt: skip
    (tmp_path / "wrong.yaml").write_text(f"- {{model_name: {OPT}, run_name: 1.0e+5}}\n")
    with pytest.raises(RequestError, match=r"run_name should be text, found 100000\.0"):
        expand([tmp_path / "wrong.yaml"])
