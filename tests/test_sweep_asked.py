"""What a sweep is asked for becomes runs: each once, each with a name of its own, and nothing wrong gets through."""

import csv

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from blip2nb.errors import RequestError
from blip2nb.sweeps.asked import Asked, expand, open_notebook
from blip2nb.variants import RELEASED, TWINS, VARIANTS


def names(*patterns, **how):
    return [run.name for run in expand(patterns, **how)]


def test_a_pattern_stands_for_the_models_it_fits():
    assert names("tiny-*") == list(TWINS)
    assert names("blip2-*-coco") == [name for name in RELEASED if name.endswith("-coco")]
    assert names("tiny-*opt*", "tiny-*") == [*(name for name in TWINS if "opt" in name), *names("tiny-*t5*")]
    assert names("Salesforce/blip2-opt-2.7b") == ["blip2-opt-2.7b"]


@given(st.lists(st.sampled_from(list(VARIANTS)), min_size=1))
def test_each_model_runs_once_however_often_it_is_named(models):
    assert names(*models) == list(dict.fromkeys(models))


def test_a_grid_makes_every_combination_and_names_what_varies():
    runs = expand(["tiny-blip2-opt-2.7b"], grid={"dtype": ["auto", "bfloat16"], "proof": ["weights"]})
    assert [run.name for run in runs] == [f"tiny-blip2-opt-2.7b--dtype-{dtype}" for dtype in ("auto", "bfloat16")]
    assert {run.parameters["proof"] for run in runs} == {"weights"}
    seeds = expand(["tiny-*"], "08_break_it", grid={"seed": ["0", "1", "2"]})
    assert len({run.name for run in seeds}) == len(seeds) == 3 * len(TWINS)
    assert {run.parameters["seed"] for run in seeds} == {0, 1, 2}
    assert all(run.name.startswith("08_break_it--tiny-") for run in seeds)


def test_checkpoints_are_runs_and_those_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "checkpoint_best.pth")
        paths[-1].touch()
    runs = expand(paths)
    assert [run.name for run in runs] == ["checkpoint_best", "second--checkpoint_best"]
    assert [run.parameters["source"] for run in runs] == [str(path) for path in paths]
    assert all(run.model == "" for run in runs)


@pytest.fixture
def listed(tmp_path):
    """The same three runs as a YAML file and as a CSV file, beside a checkpoint that one of them names."""
    (tmp_path / "mine.pth").touch()
    rows = [
        {"model_name": "tiny-*-coco", "dtype": "bfloat16"},
        {"model_name": "tiny-blip2-opt-2.7b", "source": "mine.pth", "run_name": "mine"},
    ]
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(rows))
    with open(tmp_path / "runs.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["model_name", "dtype", "source", "run_name"], restval="")
        table.writeheader()
        table.writerows(rows)
    return tmp_path


@pytest.mark.parametrize("kind", ["yaml", "csv"])
def test_a_list_gives_each_run_its_parameters_and_paths_are_beside_it(kind, listed):
    runs = {run.name: dict(run.parameters) for run in expand([listed / f"runs.{kind}"])}
    coco = [name for name in TWINS if name.endswith("-coco")]
    assert runs == {
        **{name: {"model_name": name, "dtype": "bfloat16"} for name in coco},
        "mine": {"model_name": "tiny-blip2-opt-2.7b", "source": str(listed / "mine.pth")},
    }


def test_a_list_of_names_is_a_list_too_and_may_mix_notebooks(tmp_path):
    path = tmp_path / "runs.yml"
    path.write_text("- tiny-blip2-opt-2.7b\n- {notebook: 10_your_own_port, seed: 3}\n")
    first, second = expand([path])
    assert (first.notebook.name, second.notebook.name) == ("convert", "10_your_own_port")
    assert second == Asked("10_your_own_port", open_notebook("10_your_own_port"), {"seed": 3})


@pytest.mark.parametrize(
    ("patterns", "how", "said"),
    [
        (["tiny-blip2-opt-2.7"], {}, "Did you mean 'tiny-blip2-opt-2.7b'?"),
        (["nothing-*"], {}, "No model is called 'nothing-*'"),
        ([], {}, "Nothing was named to run"),
        (["gone.pth"], {}, "gone.pth does not exist"),
        (["gone.yaml"], {}, "gone.yaml could not be read as a list of runs"),
        (["tiny-*"], {"notebook": "convertt"}, "Did you mean 'convert'?"),
        (["tiny-*"], {"parameters": {"dtpe": "auto"}}, "Did you mean 'dtype'?"),
        (["tiny-*"], {"parameters": {"overwrite": "perhaps"}}, "overwrite should be true or false, found 'perhaps'"),
        (["tiny-*"], {"notebook": "08_break_it", "grid": {"seed": ["1.5"]}}, "seed should be a whole number"),
        (["tiny-*"], {"parameters": {"output_dir": "/tmp"}}, "no parameter 'output_dir'"),
        (["tiny-*"], {"notebook": "10_your_own_port"}, "takes no model"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(patterns, how, said):
    with pytest.raises(RequestError) as error:
        expand(patterns, **how)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "- [1, 2]", "should be a list of runs"),
        ("a.yaml", "{", "is no YAML"),
        ("a.yaml", "- {model_name: tiny-blip2-opt-2.7b, dtype: [auto]}", "should be a list of runs"),
        ("a.yaml", "- {model_name: tiny-blip2-opt-2.7b, run_name: ../up}", "should be a plain folder name"),
        ("a.csv", "model_name,dtype\ntiny-blip2-opt-2.7b,auto,more\n", "as many cells in each row"),
        ("a.csv", "", "one line of parameter names"),
        ("a.yaml", "- tiny-blip2-opt-2.7b\n- {model_name: tiny-blip2-opt-2.7b, dtype: float16}", "would be called"),
    ],
)
def test_a_list_that_is_wrong_is_said_in_one_sentence(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError) as error:
        expand([tmp_path / name])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    path = tmp_path / "mine.ipynb"
    path.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    with pytest.raises(RequestError, match='a cell tagged "parameters"'):
        open_notebook(path)
