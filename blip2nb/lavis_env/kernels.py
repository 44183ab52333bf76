"""Handing LAVIS a request and running it in its environment, as a script or as a notebook."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from blip2nb.conversion.directory import as_converted, weights_hash
from blip2nb.conversion.files import Opened, open_source, which
from blip2nb.errors import OutOfMemory, RequestError, memory_ran_out, no_memory
from blip2nb.families.captioners import configuration, inputs, lavis
from blip2nb.families.captioners.mapping import entries
from blip2nb.families.captioners.stages import parameter_pairs, stages, token_ids
from blip2nb.lavis_env import sockets
from blip2nb.lavis_env.environment import Lavis
from blip2nb.report.runs import RunPaths
from blip2nb.trace.stage import places, places_inside
from blip2nb.trace.tape import Tape
from blip2nb.variants import Variant
from blip2nb.weights.rules import Tied
from blip2nb.whole import whole_file, write_whole

_PACKAGE = Path(__file__).resolve().parent.parent
_IMPORTED = 300  # seconds to import LAVIS. Chosen: it takes ten, and minutes from a disk on a network, the first time
NOTEBOOK = _PACKAGE.parent / "notebooks" / "lavis.ipynb"

# What travels to where LAVIS is: the recorder, under a name that does not hide the lavis package, and what it needs
_FILES = {
    "record_lavis.py": _PACKAGE / "families" / "captioners" / "lavis.py",
    "attended.py": _PACKAGE / "lavis_env" / "attended.py",
    "tape.py": _PACKAGE / "trace" / "tape.py",
    "vocabulary.py": _PACKAGE / "trace" / "vocabulary.py",
    "hashing.py": _PACKAGE / "weights" / "hashing.py",
    "torchfile.py": _PACKAGE / "weights" / "torchfile.py",
    "stored.py": _PACKAGE / "weights" / "stored.py",
    "errors.py": _PACKAGE / "errors.py",
}


def prepare(
    folder: Path, opened: Opened, source: str, device: str = "cpu", chosen: inputs.Chosen | None = None
) -> Path:
    """Write a request for LAVIS and all it needs into `folder`; returns the request's path. It holds the hash by which
    a recording and a conversion of the same weights know each other, for which the weights are read unless it is known.

    Of images that were chosen every one is recorded. Of the demo's all are captioned, and the first is recorded.

    The folder can be copied to the machine where LAVIS is (then mend the paths under "files" in request.json) and run
    there with `python record_lavis.py request.json`; what comes back is tape.safetensors.
    """
    model, files = opened.variant, opened.files
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in _FILES.items():
        shutil.copyfile(path, folder / name)
    shown = _demo(folder, model) if chosen is None else _chosen(folder, model, chosen)
    request = {
        "model": model.name,
        "class": model.lavis_class,
        "type": model.lavis_type,
        "source": source,
        "image_size": model.image_size,
        "vision": dataclasses.asdict(model.vision),
        "qformer": dataclasses.asdict(model.qformer),
        "language": dataclasses.asdict(model.language),
        "language_prefix": model.language_prefix,
        "files": {
            "vision": str(files.vision.absolute()) if files.vision is not None else None,
            "language": _language_folder(folder, opened),
            "checkpoints": [str(path.absolute()) for path in files.checkpoints],
            "base": str(files.base.absolute()) if files.base is not None else None,
        },
        "aliases": {entry.sources[0]: entry.of for entry in entries(model) if isinstance(entry.rule, Tied)},
        "pairs": _pairs(model) if files.base is not None else {},
        "source_hash": weights_hash(opened),
        **shown,
        "places": [*places(stages(model)), token_ids(model)],
        "inside": places_inside(stages(model)),
        "device": device,
        "output": "tape.safetensors",
    }
    path = folder / "request.json"
    write_whole(path, json.dumps(request, indent=1) + "\n")
    return path


def _demo(folder: Path, model: Variant) -> dict[str, Any]:
    images, words = inputs.demo_images(model), inputs.texts(model)
    return {
        "images": [_write(folder, number, inputs.png(image)) for number, image in enumerate(images)],
        "texts": words,
        "prompt": model.prompt,
        "inputs_hash": inputs.inputs_hash(images, words),
    }


def _chosen(folder: Path, model: Variant, chosen: inputs.Chosen) -> dict[str, Any]:
    """Where only the first take is looked at, a request and a tape of chosen inputs are as those of the demo's."""
    takes = chosen.takes(model)
    pictures = enumerate(chosen.pictures)
    return {
        "images": [_write(folder, number, inputs.png(picture.load(), small=False)) for number, picture in pictures],
        "texts": takes[0]["texts"],
        "prompt": takes[0]["prompt"],
        "inputs_hash": chosen.inputs_hash(model),
        "takes": takes,
        "skipped": [dataclasses.asdict(one) for one in chosen.skipped],
    }


def _write(folder: Path, number: int, png: bytes) -> str:
    write_whole(folder / f"image-{number}.png", png)
    return f"image-{number}.png"


def _pairs(model: Variant) -> dict[str, tuple[str, int | None, int | None]]:
    """LAVIS's parameter -> transformers' and the rows of it: how LAVIS takes a converted base apart. By the table of
    modules, not by the mapping's rules, so that a mistake in those shows."""
    return {
        name: (target, None if rows is None else rows.start, None if rows is None else rows.stop)
        for name, (target, rows) in parameter_pairs(model).items()
    }


def _language_folder(folder: Path, opened: Opened) -> str:
    """The language model's folder, for its configuration and tokenizer; of a converted base, one made from what it
    holds, in the forms that the old transformers which LAVIS needs can read."""
    files = opened.files
    if files.base is None:
        return str(files.language.absolute())
    made = folder / "language"
    made.mkdir(exist_ok=True)
    for path in files.base.iterdir():
        if path.suffix in (".txt", ".model") or path.name in ("vocab.json", "special_tokens_map.json"):
            shutil.copyfile(path, made / path.name)
    for name, content in configuration.old_language_files(opened.text, files.base).items():
        (made / name).write_text(json.dumps(content) if isinstance(content, dict) else content, encoding="utf-8")
    return str(made.absolute())


def open_request(
    request: str = "",
    model_name: str = "",
    source: str = "",
    run_name: str = "",
    output_dir: str = "",
    device: str = "cpu",
    base: str = "",
) -> dict[str, Any]:
    """The request that lavis.ipynb is to carry out, ready for `blip2nb.families.captioners.lavis`.

    Args:
        request: the path of one that was prepared; else one is made for the model, and the tape goes to its run.
    """
    if not request:
        model = which(model_name, source)
        run = RunPaths.new(model.name, source, run_name, output_dir)
        opened = as_converted(open_source(model, source, base), run.model)
        request = str(prepare(run.folder / "request", opened, source or model_name, device))
        return {**lavis.read_request(request), "output": str(run.tape_path)}
    return lavis.read_request(request)


def capture(
    opened: Opened,
    tape: Path,
    environment: Lavis,
    source: str = "",
    device: str = "cpu",
    notebook: bool = False,
    progress: Callable[[str], None] | None = None,
    chosen: inputs.Chosen | None = None,
) -> Tape:
    """Have LAVIS record a tape on a model's files.

    Args:
        tape: where to put it.
        chosen: images and texts to show it instead of the demo's.
        notebook: where LAVIS has a kernel, run notebooks/lavis.ipynb on it instead of the script, and keep the executed
            notebook beside the tape.
        progress: called with each sentence that the recorder says.

    Raises:
        RequestError: LAVIS would cut a text short, or could not do it; the sentence holds the last thing it said.
    """
    if chosen is not None:
        _check_lengths(opened, chosen)
    tape.parent.mkdir(parents=True, exist_ok=True)
    with _termination_tidies(), tempfile.TemporaryDirectory(prefix="blip2nb-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        request = prepare(folder, opened, source, device, chosen)
        if notebook and environment.kernel is not None and NOTEBOOK.is_file():
            _run_notebook(tape.with_name("lavis.ipynb"), environment.kernel, request)
        else:
            _run_script(environment, folder, progress or (lambda sentence: None))
        made = folder / "tape.safetensors"
        if not made.is_file():
            raise RequestError(f"{environment.python} ended without a tape. Try it by hand: blip2nb doctor.")
        with whole_file(tape) as arriving:
            shutil.copyfile(made, arriving)
    return Tape(tape)


class _Terminated(SystemExit):
    """SIGTERM came. An event loop lets only these through."""


@contextlib.contextmanager
def _termination_tidies() -> Iterator[None]:
    """SIGTERM ends this process as ever, but what is inside ends first: processes go, and files are removed. Where
    somebody else deals with that signal it is left to them."""

    def terminate(number: int, frame: Any) -> None:
        raise _Terminated

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check_lengths(opened: Opened, chosen: inputs.Chosen) -> None:
    """LAVIS's `forward` cuts what is longer off, which transformers' processor does not."""
    words = [text for text in chosen.texts if text is not None]
    if not words:
        return
    tokenizer = configuration.load_tokenizer(opened.variant, opened.files.base or opened.files.language)
    for text in words:
        count = len(tokenizer(f"{text}\n" if opened.variant.language.kind == "opt" else text).input_ids)
        if count > inputs.LONGEST_TEXT:
            raise RequestError(
                f"LAVIS reads {inputs.LONGEST_TEXT} tokens of a text; {text[:40]!r}… has {count}. Shorten it."
            )


def _run_script(where: Lavis, folder: Path, progress: Callable[[str], None]) -> None:
    """Run the recorder. It does not outlive this call, whatever ends it, nor this process: see attended.py."""
    command = [str(where.python), "attended.py", "record_lavis.py", "request.json"]
    variables = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    variables["TMPDIR"] = str(folder)  # so that all it leaves goes with the folder
    variables.pop("PYTHONPATH", None)
    last: collections.deque[str] = collections.deque(maxlen=1)
    with subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        errors="replace",
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.strip():
                    last.append(line.strip())
                    progress(line.strip())
            process.wait()  # its standard input stays open until then
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        said = last[0] if last else f"exit status {process.returncode}"
        _refuse_without_memory(said, killed=process.returncode == -signal.SIGKILL)
        raise RequestError(
            f"LAVIS could not record the reference: {said}. `blip2nb doctor` checks the environment at {where.python}."
        )


def _refuse_without_memory(said: str, killed: bool = False) -> None:
    """Raise OutOfMemory if that is what LAVIS's last words mean, or if the system killed it, as it does for that."""
    error = RuntimeError("LAVIS's process was killed" if killed else said)
    if killed or memory_ran_out(error):
        raise OutOfMemory(no_memory("while LAVIS recorded the reference", error))


def _run_notebook(output: Path, kernel: str, request: Path) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            str(NOTEBOOK),
            str(output),
            parameters={"request": str(request)},
            kernel_name=kernel,
            progress_bar=False,
            config=sockets.config(request.parent),
            shutdown_kernel="immediate",  # also where it is interrupted: a kernel that computes does not answer
        )
    except PapermillExecutionError as error:
        _refuse_without_memory(f"{error.ename}: {error.evalue}")
        raise RequestError(
            f"LAVIS could not record the reference: {error.ename}: {error.evalue}. "
            f"The notebook as far as it came is {output}."
        ) from error


def check(python: Path, modules: Sequence[str]) -> dict[str, str | None]:
    """Versions of packages in another environment; None for one that does not import."""
    code = (
        "import importlib, importlib.metadata as m, json, sys\n"
        "out = {'python': sys.version.split()[0]}\n"
        "for name, package in (p.split('=') for p in sys.argv[1:]):\n"
        "    try:\n"
        "        importlib.import_module(name); out[package] = m.version(package)\n"
        "    except Exception as error:\n"
        "        out[package] = None\n"
        "print(json.dumps(out))"
    )
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", code, *modules],
        capture_output=True,
        text=True,
        timeout=_IMPORTED,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"python": None}
