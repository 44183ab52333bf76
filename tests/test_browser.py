"""In a real browser: JupyterLab as `make lab` opens it, the explorer moved by mouse and keyboard, and the pages that a
run and a sweep leave, read without a network, without a mouse, in the dark and on a phone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import overviews as overview
import psutil
import pytest
from browser import ROOT, Watched
from conftest import edit_weights
from records import raw

from blip2nb import api
from blip2nb.handles import Run

NUMBER = re.compile(r"\[\d+\]:")
TWIN = "tiny-blip2-opt-2.7b"
VERDICT = f"{TWIN}: explained (the same model, but for a known difference)"


@pytest.fixture(scope="module")
def sound(converted: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A twin, verified."""
    run = dataclasses.replace(converted(TWIN), folder=tmp_path_factory.mktemp("proofs") / TWIN)
    api.verify(run.model, output=run.folder, lavis_python="none")
    return run


@pytest.fixture(scope="module")
def broken(converted: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The twin that the README breaks in two places, verified."""
    folder = tmp_path_factory.mktemp("proofs") / "two-faults"
    run = Run(folder, folder / "model")
    shutil.copytree(converted(TWIN).model, run.model)
    name = "vision_model.encoder.layers.3.self_attn.projection.weight"
    edit_weights(run.model / "model.safetensors", lambda it: it.update({name: it[name].T.contiguous()}))
    config = json.loads((run.model / "config.json").read_text())
    config["qformer_config"]["hidden_act"] = "gelu_new"
    (run.model / "config.json").write_text(json.dumps(config))
    assert api.verify(run, lavis_python="none").verdict == "diverges"
    return run


# ------------------------------------------------------------------------------------------------------- JupyterLab


@dataclasses.dataclass(frozen=True)
class Lab:
    """A JupyterLab that runs: where it is, and the checkout that it shows."""

    address: str
    token: str
    folder: Path


@pytest.fixture(scope="module")
def lab(chromium: Any, broken: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """What `make lab` starts, in a checkout with copies of the notebooks, and with Jupyter's own settings elsewhere."""
    folder, own = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("jupyter")
    (folder / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "convert.ipynb", folder / "notebooks")
    notebook = nbformat.read(ROOT / "notebooks" / "convert.ipynb", 4)
    notebook.cells = [nbformat.v4.new_code_cell(f"import blip2nb\n\nblip2nb.explore({str(broken.folder)!r})")]
    nbformat.write(notebook, folder / "notebooks" / "explore.ipynb")
    (folder / ".venv").symlink_to(sys.prefix)
    server = {"port": 0, "open_browser": False, "allow_root": True, "token": "", "password": ""}
    settle(own / "config" / "jupyter_server_config.json", {"ServerApp": server, "IdentityProvider": {"token": "once"}})
    settings = own / "settings" / "@jupyterlab"
    settle(
        settings / "apputils-extension" / "notification.jupyterlab-settings",
        {"fetchNews": "false", "checkForUpdates": False},
    )
    settle(settings / "notebook-extension" / "tracker.jupyterlab-settings", {"windowingMode": "none"})
    places = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython",
    }  # fmt: skip
    environment = {**os.environ, **{name: str(own / place) for name, place in places.items()}}
    command = ["make", "--silent", "--file", ROOT / "Makefile", "--assume-old", ".venv/main.done", "lab"]
    with open(own / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        while not (found := list(own.glob("runtime/jpserver-*.json"))):
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"`make lab` ended with {process.wait(0.1)}: {(own / 'log').read_text()}")
        while True:
            with suppress(ValueError):  # while it is written
                about = json.loads(found[0].read_text())
                break
        yield Lab(about["url"], about["token"], folder)
    finally:
        end(process)


def settle(path: Path, settings: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(settings))


def end(process: subprocess.Popen) -> None:
    """End a process with all that it started, kindly first: Jupyter ends its kernels itself when it is asked."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    for one in psutil.wait_procs(family, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    assert psutil.wait_procs(family)[1] == []


def open_notebook(page: Any, lab: Lab, path: str = "") -> Any:
    """Open JupyterLab, at `path` or where it opens by itself, and return the notebook when its kernel can be used."""
    page.goto(f"{lab.address}{path}?token={lab.token}")
    name = Path(path or "convert.ipynb").name  # what an earlier test left open comes back first
    page.locator("#jp-main-dock-panel .lm-TabBar-tab.lm-mod-current", has_text=name).wait_for()
    page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    return page.locator(".jp-NotebookPanel:visible")


def run_all(page: Any, notebook: Any) -> None:
    """Run > Run All Cells, and wait for the last cell's number, or for an error: there should be none."""
    page.get_by_role("menubar").get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    last = notebook.locator(".jp-CodeCell").last.locator(".jp-InputPrompt").filter(has_text=NUMBER)
    errors = notebook.locator("[data-mime-type$='jupyter.error']")
    last.or_(errors).first.wait_for()
    assert errors.all_inner_texts() == []


def test_convert_runs_where_make_lab_opens(chromium: Any, lab: Lab) -> None:
    with Watched(chromium, offline=False) as tab:
        page, outputs = tab.page, lab.folder / "results"
        notebook = open_notebook(page, lab)
        assert page.url == f"{lab.address}lab/tree/notebooks/convert.ipynb"
        parameter = notebook.locator(".jp-CodeCell").first.locator(".cm-line", has_text="output_dir: str")
        parameter.click()
        for key in ["Home", *["ArrowRight"] * len('output_dir: str = "')]:
            page.keyboard.press(key)
        page.keyboard.type(str(outputs))
        assert f'output_dir: str = "{outputs}"' in parameter.inner_text()
        run_all(page, notebook)
        verdict = notebook.get_by_text(VERDICT).last
        verdict.scroll_into_view_if_needed()
        assert verdict.is_visible()
        tab.keep("lab-convert-verdict", whole=False)
        assert (outputs / TWIN / "report.html").is_file()
        pictures = notebook.locator(".jp-OutputArea-output img")
        assert pictures.count() == 9
        for picture in pictures.all():
            picture.scroll_into_view_if_needed()
            assert picture.is_visible()
            assert picture.evaluate("it => Math.min(it.naturalWidth, it.naturalHeight)") > 300
            inside = (
                "it => it.getBoundingClientRect().right <= it.closest('.jp-OutputArea').getBoundingClientRect().right"
            )
            assert picture.evaluate(inside), "nothing is cut off"
        keep_notebook(tab, "lab-convert")
        assert tab.complaints == []
        assert [one for one in tab.requests if not one.startswith(lab.address)] == []


def keep_notebook(tab: Watched, name: str) -> None:
    """A picture of all of a notebook, which scrolls inside the window."""
    heights = tab.page.locator(".jp-NotebookPanel:visible .jp-Cell").evaluate_all(
        "all => all.map(it => it.offsetHeight)"
    )
    size = dict(tab.page.viewport_size)
    tab.page.set_viewport_size({**size, "height": min(int(sum(heights)) + 400, 16_000)})
    tab.page.locator(".jp-NotebookPanel:visible .jp-Cell").first.scroll_into_view_if_needed()
    tab.keep(name, whole=False)
    tab.page.set_viewport_size(size)


def test_the_explorer_is_moved_by_mouse_and_by_keyboard(chromium: Any, lab: Lab) -> None:
    with Watched(chromium, offline=False) as tab:
        page = tab.page
        notebook = open_notebook(page, lab, "lab/tree/notebooks/explore.ipynb")
        run_all(page, notebook)
        show, stage, token = (page.get_by_label(name, exact=True) for name in ("show", "stage", "token"))
        said = notebook.locator(".jp-OutputArea-output")
        picture, inside = notebook.locator("img.widget-image").nth(0), notebook.locator("img.widget-image").nth(1)

        def settled(at: str, causes: str) -> bytes:
            """Wait until the numbers, the pictures and the causes are those of a stage; what the figure looks like."""
            said.get_by_text(f"run.tensor('{at}', fed='lavis')").wait_for()
            if causes:
                said.get_by_text(causes).wait_for()
            inside.wait_for(state="visible" if causes else "hidden")
            page.wait_for_function("it => it.complete && it.naturalWidth > 1000", arg=picture.element_handle())
            assert stage.input_value() == at
            return picture.screenshot()

        shown = [settled("vision.block.03", "it is the right matrix transposed")]
        keep_notebook(tab, "lab-explorer")
        before = picture.get_attribute("src")
        show.select_option("this stage: token × channel")
        page.wait_for_function("([it, before]) => it.src !== before", arg=[picture.element_handle(), before])
        shown.append(settled("vision.block.03", "it is the right matrix transposed"))
        stage.select_option("vision.block.01")
        shown.append(settled("vision.block.01", ""))
        keep_notebook(tab, "lab-explorer-sound-stage")
        page.get_by_role("button", name="next fault").click()
        shown.append(settled("vision.block.03", "it is the right matrix transposed"))
        assert shown[3] == shown[1], "the same place looks the same"
        assert len(set(shown)) == 3

        stage.focus()
        tab.tab_to("button:has-text('next fault')")
        page.keyboard.press("Enter")
        shown.append(settled("qformer.layer.00", "the activation is gelu_new"))
        keep_notebook(tab, "lab-explorer-next-fault")
        page.keyboard.press("Space")
        shown.append(settled("qformer.layer.01", "the activation is gelu_new"))
        assert len(set(shown)) == 5
        stage.focus()
        for key in ("Alt+ArrowDown", "ArrowUp", "Enter"):
            page.keyboard.press(key)
        settled("qformer.layer.00", "the activation is gelu_new")
        position = int(token.input_value())
        said.get_by_text(f"Token {position} ").or_(said.get_by_text(f"Token {position},")).first.wait_for()
        token.focus()
        page.keyboard.press("ArrowUp" if position < int(token.get_attribute("max")) else "ArrowDown")
        said.get_by_text(f"Token {token.input_value()},").wait_for()
        assert int(token.input_value()) != position
        assert notebook.locator(".jp-Cell").count() == 1, "no key was taken for one of JupyterLab's own"
        page.set_viewport_size({"width": 820, "height": 900})
        keep_notebook(tab, "lab-explorer-narrow")


# --------------------------------------------------------------------------------------------------------- the pages


@pytest.fixture(scope="module")
def pages(sound: Run, broken: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages by name: of a sound run, of a broken one, and of a sweep with both and with one that failed."""
    folder = tmp_path_factory.mktemp("sweep")
    entries = []
    for number, run in enumerate((sound, broken)):
        name = run.folder.name
        shutil.copytree(run.folder, folder / name, ignore=shutil.ignore_patterns("model"))
        report = run.report.content
        entries.append(
            overview.summarise(outcome(name, name, 20 + number) | {"verdict": raw(report)["verdict"]}, report)
        )
    said = {"error": "RequestError: no such dtype.", "traceback": "Traceback\n  convert\nRequestError: no such dtype."}
    entries.append(overview.summarise(outcome("float8", "float8--failed", 3) | {"state": "failed", **said}))
    for name, text in overview.texts(overview.index(entries)).items():
        (folder / name).write_text(text, encoding="utf-8")
    return {"sound": sound.page, "broken": broken.page, "sweep": folder / "index.html"}


def outcome(name: str, folder: str, seconds: float) -> dict[str, Any]:
    """What a sweep says of a run that finished."""
    return {
        "run_name": name, "model_name": TWIN, "notebook": "convert", "verdict": "", "error": "", "traceback": "",
        "parameters": {"model_name": TWIN}, "state": "finished", "seconds": seconds, "earlier": False,
        "finished": "2026-11-24T16:03:11+00:00", "folder": folder, "executed": "convert.ipynb",
    }  # fmt: skip


@pytest.mark.parametrize(("look", "width"), [("desktop", 1280), ("phone", 375)])
@pytest.mark.parametrize("name", ["sound", "broken", "sweep"])
def test_a_page_can_be_read_by_everybody_and_asks_nothing_of_the_network(
    name: str, look: str, width: int, chromium: Any, pages: dict[str, Path]
) -> None:
    with Watched(chromium, offline=True, width=width) as tab:
        page = tab.page
        page.goto(pages[name].as_uri())
        assert page.locator("img, svg[role=img]").count() > 0
        assert page.locator("img").evaluate_all("all => all.filter(it => !it.naturalWidth).length") == 0
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        tab.keep(f"{name}-{look}-light")
        assert not tab.scrolls_sideways()
        assert tab.violations() == []
        page.emulate_media(color_scheme="dark")
        assert tab.violations("color-contrast") == []
        tab.keep(f"{name}-{look}-dark")
        assert tab.requests == [pages[name].as_uri()]
        assert tab.complaints == []


def test_a_report_is_read_without_a_mouse(chromium: Any, pages: dict[str, Path]) -> None:
    with Watched(chromium, offline=True) as tab:
        page = tab.page
        page.goto(pages["broken"].as_uri())
        tab.tab_to(".skip")
        tab.keep("broken-skip-link", whole=False)
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.reload()
        tab.tab_to("nav a[href='#names']")
        page.keyboard.press("Enter")
        assert page.url.endswith("#names")
        assert 0 <= page.locator("#names").bounding_box()["y"] < 100, "it is in sight, at the top"

        tab.tab_to("#filter-text")
        total = page.locator("#names-table tbody tr:visible").count()
        page.keyboard.type("query bias")
        shown = page.locator("#names-table tbody tr:visible")
        assert 0 < shown.count() < total
        assert all("query" in row and "bias" in row for row in shown.all_inner_texts())
        assert page.locator("#filter-count").inner_text() == f"{shown.count()} of {total} names"
        tab.keep("broken-filter", whole=False)
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")
        operation = page.locator("#filter-operation")
        assert operation.input_value()
        assert set(page.locator("#names-table tbody tr:visible td:nth-child(3)").all_inner_texts()) <= {
            operation.input_value()
        }

        page.reload()
        fault = tab.tab_to(".fault summary >> nth=0")
        assert not page.locator(".fault").first.evaluate("it => it.open")
        page.keyboard.press("Enter")
        assert page.locator(".fault").first.evaluate("it => it.open")
        assert page.get_by_text("What speaks for it").first.is_visible()
        tab.keep("broken-fault-opened", whole=False)
        page.keyboard.press("Enter")
        assert not page.locator(".fault").first.evaluate("it => it.open")
        assert "transposed" in fault.inner_text()
        assert tab.complaints == []


def test_a_sweeps_page_leads_to_each_proof_by_mouse_and_by_keyboard(chromium: Any, pages: dict[str, Path]) -> None:
    with Watched(chromium, offline=True) as tab:
        page, report = tab.page, pages["sweep"].parent / "two-faults" / "report.html"
        page.goto(pages["sweep"].as_uri())
        row = page.locator("#runs-table tbody tr", has_text="two-faults")
        cell = row.locator("td a", has_text="failed").first
        wanted = cell.evaluate("it => it.href")
        assert wanted.startswith(report.as_uri())
        cell.click()
        page.wait_for_url(wanted)
        assert page.locator("h1").inner_text().endswith("Not the same model")
        page.go_back()
        page.wait_for_url(pages["sweep"].as_uri())

        tab.tab_to("#filter-text")
        page.keyboard.type("two-faults")
        assert page.locator("#runs-table tbody tr:visible").count() == 1
        assert page.locator(".miniatures li:visible").count() == 1
        assert page.locator("#filter-count").inner_text() == "1 of 3 runs"
        tab.keep("sweep-filter", whole=False)
        tab.tab_to("#runs-table tbody tr:has-text('two-faults') td:nth-of-type(4) a")
        wanted = page.evaluate("document.activeElement.href")
        page.keyboard.press("Enter")
        page.wait_for_url(wanted)
        assert wanted.startswith(report.as_uri())
        anchor = wanted.partition("#")[2]
        assert anchor
        assert 0 <= page.locator(f"[id='{anchor}']").bounding_box()["y"] < 200, "the proof is in sight"
        tab.keep("sweep-to-report", whole=False)
        assert tab.complaints == []
