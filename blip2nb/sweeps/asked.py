"""What a sweep is asked for: patterns, checkpoints, lists and grids become runs, each with name and parameters."""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import functools
import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2nb.errors import RequestError, did_you_mean
from blip2nb.notebook import Parameter, is_given, parameters, refuse_undeclared, typed
from blip2nb.variants import VARIANTS

Value = str | int | float | bool

LISTS = (".yaml", ".yml", ".csv")
CHECKPOINTS = (".pth", ".pt", ".bin", ".safetensors")
OWN = ("run_name", "output_dir", "keep_model")
"""What the sweep itself gives to a notebook that declares it."""

_RUN_NAME = Parameter("run_name", str, '""')

_NOTEBOOKS = Path(__file__).resolve().parent.parent.parent / "notebooks"


@dataclasses.dataclass(frozen=True)
class Notebook:
    """A notebook to run: where it is, its text, and the parameters that its tagged cell declares."""

    path: Path
    text: str = dataclasses.field(repr=False)
    parameters: Mapping[str, Parameter] = dataclasses.field(repr=False)

    @functools.cached_property
    def declared(self) -> dict[str, Value]:
        """Each parameter's own value."""
        return {name: parameter.default for name, parameter in self.parameters.items()}

    @property
    def name(self) -> str:
        return self.path.stem


@dataclasses.dataclass(frozen=True)
class Asked:
    """One run: the folder it will be, the notebook it executes, and the parameters that were given for it."""

    name: str
    notebook: Notebook
    parameters: Mapping[str, Value]

    @property
    def model(self) -> str:
        """The variant's name; "" where the notebook takes none, or a checkpoint says it."""
        return str(self.parameters.get("model_name", ""))


def open_notebook(name: str | Path) -> Notebook:
    """A notebook by its name among the kit's (`convert`, `05_activations`), or by its path.

    Raises:
        RequestError: there is none, or it is no notebook with a cell tagged "parameters".
    """
    given = Path(name).expanduser()
    path = given if given.suffix == ".ipynb" else _NOTEBOOKS / f"{name}.ipynb"
    if not path.is_file():
        if not (_NOTEBOOKS / "convert.ipynb").is_file():
            raise RequestError(
                f"There is no notebook {str(name)!r}: the kit's own are in its repository and not in the installed "
                "package. Give a notebook's path, or work in a clone of the repository (pip install -e .)."
            )
        there = sorted(one.stem for one in _NOTEBOOKS.glob("*.ipynb"))
        hint = did_you_mean(given.stem, there)
        raise RequestError(f"There is no notebook {str(name)!r}.{hint} Give a path, or one of: {', '.join(there)}.")
    text = path.read_text(encoding="utf-8")
    try:
        cells = json.loads(text)["cells"]
        tagged = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
        declared = {name: one for name, one in parameters("".join(tagged["source"])).items() if one.expression}
        for one in declared.values():
            _ = one.default  # which raises ValueError where it is no plain value
    except (ValueError, KeyError, TypeError, StopIteration, SyntaxError) as error:
        raise RequestError(
            f'{path} should be a notebook with a cell tagged "parameters" that assigns plain values; there is none.'
        ) from error
    return Notebook(path.resolve(), text, declared)


def expand(
    patterns: Iterable[str | Path],
    notebook: str | Path = "convert",
    parameters: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
) -> list[Asked]:
    """The runs that are meant, in the order in which they were named, each once.

    Args:
        patterns: a variant's name or a pattern of names such as "blip2-*-coco"; a checkpoint; or a list of runs, as a
            .yaml, .yml or .csv file. A row of a list gives parameters by name; `notebook` and `run_name` too. Paths in
            it are relative to its folder.
        notebook: a name among the kit's, or a path; of the rows that name none.
        parameters: for every run that does not say otherwise.
        grid: parameter -> values; every run is made with each combination of them.

    Raises:
        RequestError: a pattern fits nothing, a list cannot be read, a parameter is not declared or not of its type, or
            two runs would have one name.
    """
    opened: dict[str, Notebook] = {}
    runs: dict[str, Asked] = {}
    for row in itertools.chain.from_iterable(_rows(str(one)) for one in patterns):
        row = dict(row)
        named = str(row.pop("notebook", notebook))
        if named not in opened:
            opened[named] = open_notebook(named)
        for run in _combinations(opened[named], {**(parameters or {}), **row}, grid or {}):
            if runs.setdefault(run.name, run) != run:
                run = _apart(run, runs[run.name])
                if runs.setdefault(run.name, run) != run:
                    raise _two_called(run.name)
    if not runs:
        raise RequestError(
            "Nothing was named to run: expected a pattern of model names, a checkpoint or a list of runs."
        )
    return list(runs.values())


def named(words: Iterable[str], option: str = "-p") -> dict[str, str]:
    """Parameters as the command line gives them, NAME=VALUE. Raises RequestError for what is not of this form."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise RequestError(f"{option} should be NAME=VALUE, found {word!r}.")
        found[name] = value
    return found


def axes(words: Iterable[str]) -> dict[str, list[str]]:
    """A grid as the command line gives it, NAME=VALUE,VALUE,…. Raises RequestError for what is not of this form."""
    return {name: values.split(",") for name, values in named(words, "--grid").items()}


def _rows(pattern: str) -> list[dict[str, Any]]:
    """What one argument stands for, as rows of parameters."""
    path = Path(pattern).expanduser()
    if path.suffix.lower() in LISTS:
        return _read_list(path)
    if path.suffix.lower() in CHECKPOINTS:
        if not path.is_file():
            raise RequestError(f"{pattern} does not exist. Expected a checkpoint.")
        return [{"model_name": "", "source": str(path.resolve())}]
    short = pattern.rsplit("/", 1)[-1]  # "Salesforce/blip2-opt-2.7b" is the same model
    names = [name for name in VARIANTS if fnmatch.fnmatchcase(name, short)]
    if not names:
        hint = did_you_mean(short, VARIANTS)
        raise RequestError(
            f"No model is called {pattern!r}.{hint} `blip2nb variants` lists them; a pattern such as 'tiny-*', a "
            "checkpoint, and a .yaml or .csv list of runs will do as well."
        )
    return [{"model_name": name} for name in names]


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} could not be read as a list of runs: {error}.") from error
    found = _read_csv(path, text) if path.suffix.lower() == ".csv" else _read_yaml(path, text)
    rows: list[dict[str, Any]] = []
    for row in found:
        row = {name: _beside(path.parent, name, value) for name, value in row.items()}
        several = _rows(str(row["model_name"])) if row.get("model_name") else [{}]
        rows += [row | one for one in several]
    return rows


def _read_csv(path: Path, text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    rows = list(reader)
    if not reader.fieldnames or any(None in row or None in row.values() for row in rows):
        raise RequestError(f"{path} should be a table with one line of parameter names, and as many cells in each row.")
    return [{name: cell for name, cell in row.items() if cell != ""} for row in rows]  # an empty cell says nothing


def _read_yaml(path: Path, text: str) -> list[dict[str, Any]]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    rows = (
        [{"model_name": row} if isinstance(row, str) else row for row in content]
        if isinstance(content, list) and content
        else None
    )
    if rows is None or not all(isinstance(row, dict) and all(map(_is_plain, row.values())) for row in rows):
        raise RequestError(
            f"{path} should be a list of runs: of names of models, or of mappings from a parameter to a plain value."
        )
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _beside(folder: Path, name: str, value: Any) -> Any:
    """A value of a list: what names something in the list's folder becomes its path, whatever the parameter."""
    if not isinstance(value, str) or not value or name in ("model_name", "run_name"):
        return value
    path = folder / Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


def _combinations(notebook: Notebook, given: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> list[Asked]:
    if "model_name" in given and "model_name" not in notebook.declared:
        raise RequestError(f"{notebook.name} takes no model; name it in a list of runs, by its parameters.")
    given = dict(given)
    name = typed(_RUN_NAME, given.pop("run_name", ""))
    refuse_undeclared([one for one in notebook.declared if one not in OWN], [*given, *grid])
    of = notebook.parameters
    fixed = {one: typed(of[one], value) for one, value in given.items() if is_given(of[one], value)}
    axes = [[(one, typed(of[one], value)) for value in values] for one, values in grid.items()]
    several = {one for one, values in grid.items() if len(values) > 1}
    name = name or _name_of(notebook, fixed)
    runs = []
    for point in itertools.product(*axes):
        tail = "".join(f"--{one}-{_word(value)}" for one, value in point if one in several)
        run = Asked(_checked(name + tail), notebook, fixed | dict(point))
        runs.append(run)
    return runs


def _name_of(notebook: Notebook, parameters: Mapping[str, Value]) -> str:
    """A run's name: its model, or the checkpoint that stands for it, or both; first the notebook, if not convert."""
    source = str(parameters.get("source", ""))
    model = str(parameters.get("model_name", "" if source else notebook.declared.get("model_name", "")))
    parts = [] if notebook.name == "convert" else [notebook.name]
    parts += [model] if model else []
    parts += [_word(source)] if source and not (model and Path(source).is_dir()) else []
    return "--".join(parts) or notebook.name


def _word(value: Value) -> str:
    """A value as a part of a folder's name; a path by its stem."""
    text = Path(value).stem if isinstance(value, str) and "/" in value else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "empty"


def _checked(name: str) -> str:
    if Path(name).name != name or name.startswith(".") or "\\" in name:
        raise RequestError(f"A run's name should be a plain folder name, found {name!r}.")
    return name


def _apart(run: Asked, before: Asked) -> Asked:
    """The run under a name that tells it from another: checkpoints of one name, by their folders'."""
    source, other = (str(one.parameters.get("source", "")) for one in (run, before))
    folder = Path(source).parent.name
    if not source or source == other or not folder:
        raise _two_called(run.name)
    return dataclasses.replace(run, name=_checked(f"{_word(folder)}--{run.name}"))


def _two_called(name: str) -> RequestError:
    return RequestError(
        f"Two different runs would be called {name}. Give them names of their own: run_name in a list of runs."
    )
