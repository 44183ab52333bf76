"""The verbs: convert, capture, verify, show. The command line and the notebooks call these and nothing else."""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.errors import RequestError
from blip2nb.report import Report
from blip2nb.runs import Run, find_run, new_run, run_of_model
from blip2nb.trace.tape import Tape
from blip2nb.variants import Variant, variant
from blip2nb.weights.convert import CASTS, LOSSY, MANIFEST, Manifest
from blip2nb.weights.mapping import parameter_count, plan
from blip2nb.weights.sources import Files, Union, open_model, shapes
from blip2nb.weights.writer import parse_size, whole_directory

if TYPE_CHECKING:
    from blip2nb.run.kernels import Lavis

log = logging.getLogger("blip2nb")

SHIPPED_TAPES = Path(__file__).parent / "tapes"
PROOFS = ("auto", "weights", "both")


def convert(
    model: str,
    source: str | Path = "",
    output: str | Path = "",
    *,
    run_name: str = "",
    output_dir: str | Path = "",
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    push_to_hub: str = "",
) -> Run:
    """Convert a LAVIS BLIP-2 model into a directory that transformers loads. Needs neither LAVIS nor much memory.

    Args:
        model: the variant's name (`blip2nb variants`).
        source: a folder in the released layout, or one checkpoint to lay over the variant's own files.
        output: the directory to write; outputs/<run_name>/model unless given.
        dtype: "auto" keeps every tensor's stored dtype and loses nothing; or float32, float16, bfloat16.
        max_shard_size: as in transformers, such as "5GB".
        overwrite: replace a directory that holds another conversion.
        push_to_hub: a repository (user/name) to upload to when done. The token comes from the environment or the
            hub's login.

    Returns:
        The run; `run.model` is the directory. One that holds the same conversion already is kept as it is.

    Raises:
        RequestError: the request or its input is wrong. Nothing is left behind.
    """
    from blip2nb.models.files import find_files

    wanted = variant(model)
    if dtype not in CASTS:
        raise RequestError(f"--dtype should be one of {', '.join(CASTS)}, found {dtype!r}.")
    parse_size(max_shard_size)
    run = run_of_model(Path(output).expanduser()) if output else new_run(wanted.name, source, run_name, output_dir)
    token = _hub_token(push_to_hub)
    _check_place(run)
    files = find_files(wanted, source)
    _check_apart(run, files)
    opened = open_model(files, wanted)
    recipe = _recipe(files, dtype, max_shard_size)
    if not _reusable(run, wanted, opened, files, recipe, overwrite):
        _write(run, wanted, opened, files, recipe)
    run.remember(source)
    if push_to_hub:
        _push(run.model, push_to_hub, token)
    return run


def capture(
    model: str | Run,
    source: str | Path = "",
    *,
    output: str | Path = "",
    run_name: str = "",
    output_dir: str | Path = "",
    lavis_python: str | Path = "",
    device: str = "cpu",
    notebook: bool = False,
) -> Tape:
    """Have LAVIS itself run a model's weights on the demo inputs and record what happens: the reference.

    Args:
        model: the variant's name, or a run.
        source: as for `convert`.
        output: the tape's path; the run's tape.safetensors unless given.
        lavis_python: the python of an environment with LAVIS; found by itself where `make lavis` made one.
        device: "cpu" or a GPU's name, for LAVIS. Float32 on both.
        notebook: run notebooks/lavis.ipynb on the `lavis` kernel, through papermill, instead of the bare script, and
            keep the executed notebook beside the tape.

    Raises:
        RequestError: there is no LAVIS, or it could not do it.
    """
    from blip2nb.models.files import find_files
    from blip2nb.run import kernels

    wanted = variant(model if isinstance(model, str) else Manifest.read(model.model).model)
    run = new_run(wanted.name, source, run_name, output_dir) if isinstance(model, str) else model
    lavis = _require_lavis(lavis_python, wanted)
    if not isinstance(model, str):
        source = source or run.source
    files = find_files(wanted, source)
    path = Path(output).expanduser().resolve() if output else run.tape_path
    with _steps("LAVIS") as say:
        kind = Path(source).name if source else "twin" if wanted.twin else "released files"
        return kernels.capture(wanted, files, path, lavis, kind, device, notebook, progress=say)


def verify(
    target: str | Path | Run,
    *,
    proof: str = "auto",
    tape: str | Path = "",
    source: str | Path = "",
    lavis_python: str | Path = "",
    device: str = "cpu",
    output: str | Path = "",
    notebook: bool = False,
    figures: bool = True,
) -> Report:
    """Prove that a converted directory is the model LAVIS runs, and say where it first goes wrong if it is not.

    Args:
        target: a converted directory, a run's folder or name, or what `convert` returned.
        proof: "weights" compares the weights alone; "both" also behaviour, for which it needs a tape or LAVIS; "auto"
            does what is possible, which for weights that were cast to half precision is the first alone.
        tape: a recording to compare with; one that fits is found (the run's own, or one that ships with the kit), or
            made where LAVIS is at hand.
        source, lavis_python, device, notebook: for making one, as for `capture`.
        output: the folder for report and figures; the run's own unless given.
        figures: also draw them.

    Returns:
        The report, which is also written to the run's folder.

    Raises:
        RequestError: the request is wrong, among others: `both` without a way to a tape.
    """
    from blip2nb.models.verify import verify as prove

    if proof not in PROOFS:
        raise RequestError(f"--proof should be one of {', '.join(PROOFS)}, found {proof!r}.")
    run = target if isinstance(target, Run) else find_run(target)
    if output:
        run = dataclasses.replace(run, folder=Path(output).expanduser().resolve())
    manifest = Manifest.read(run.model)
    found = _tape(run, manifest, proof, tape, source, lavis_python, device, notebook)
    with _steps("verify") as say:
        report = prove(run.model, found, _completion(run, manifest, source or run.source), progress=say)
    report.save(run.folder)
    if figures:
        draw(run)
    log.info("%s", report.content["summary"])
    return report


def check_proof(
    proof: str, model: str, source: str = "", run_name: str = "", output_dir: str = "", lavis_python: str = ""
) -> None:
    """Whether the proof asked for can be made, before anything is converted.

    Raises:
        RequestError: there is no such proof, or "both" was asked for without LAVIS and without a recording.
    """
    from blip2nb.run import kernels

    if proof not in PROOFS:
        raise RequestError(f"The proof should be one of {', '.join(PROOFS)}, found {proof!r}.")
    wanted = variant(model)
    recorded = new_run(wanted.name, source, run_name, output_dir).tape_path.is_file()
    shipped = not source and (SHIPPED_TAPES / f"{wanted.name}.safetensors").is_file()
    if proof == "both" and not recorded and not shipped and kernels.find_lavis(lavis_python) is None:
        _require_lavis(lavis_python, wanted)


def draw(run: Run) -> list[Path]:
    """Draw every figure that the run's report has data for into its figures/ folder."""
    from blip2nb.display import plots

    report = run.report
    run.figures.mkdir(parents=True, exist_ok=True)
    for stem in plots.FIGURES:  # of an earlier report, which may have had data for more
        for path in run.figures.glob(f"{stem}*"):
            path.unlink()
    return plots.save(report.content, report.arrays, run.figures)


def show(target: str | Path | Run) -> str:
    """A run in words: the verdict, the numbers behind it, and where everything lies."""
    from blip2nb.display.text import describe

    run = target if isinstance(target, Run) else find_run(target)
    return describe(run)


# -- convert


def _check_place(run: Run) -> None:
    """Refuse early what stands where the model should go and is not ours to replace, whatever was asked."""
    if not run.model.exists() or (run.model / MANIFEST).is_file():
        return
    if not run.model.is_dir() or any(run.model.iterdir()):
        raise RequestError(f"{run.model} holds something that is not a conversion of this kit. Name another --output.")


def _check_apart(run: Run, files: Files) -> None:
    """Refuse an output that would replace, or end up in, the files it is made from."""
    target = run.model.resolve()
    for path in (files.vision, files.language, *files.checkpoints):
        source = path.resolve()
        if source.is_relative_to(target) or target.is_relative_to(source):
            raise RequestError(f"{run.model} cannot be the output: {path} is read from there. Name another --output.")


def _reusable(run: Run, wanted: Variant, opened: Union, files: Files, recipe: dict[str, str], overwrite: bool) -> bool:
    """Whether the directory already holds just this conversion.

    Raises:
        RequestError: it holds another one.
    """
    if overwrite or not (run.model / MANIFEST).is_file():
        return False
    held = Manifest.read(run.model)
    if (held.model, held.dtype) != (wanted.name, recipe["dtype"]) or not _same_weights(held, wanted, opened, files):
        raise RequestError(
            f"{run.model} holds another run's model ({held.model}, dtype {held.dtype}, weights "
            f"{held.weights_hash[:12]}), not the {wanted.name} asked for. "
            "Give this one its own run_name or --output, or replace it with overwrite."
        )
    if dict(held.recipe) == recipe and _whole(run.model):
        log.info("%s already holds this conversion of the same files; kept", run.model)
        return True
    log.info("%s was made of the same weights otherwise, or lost a file; converting again", run.model)
    return False


def _same_weights(held: Manifest, wanted: Variant, opened: Union, files: Files) -> bool:
    return _stamps(files) == [dict(one) for one in held.files] or held.weights_hash == _weights_hash(wanted, opened)


def _recipe(files: Files, dtype: str, max_shard_size: str | int) -> dict[str, str]:
    """All but the weights that decides what is written: asked for, configured beside the weights, and by what."""
    import hashlib
    import importlib.metadata

    from blip2nb import __version__

    small = [path for path in files.language.iterdir() if path.suffix in (".json", ".txt", ".model")]
    configuration = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sorted(small)))
    return {
        "dtype": dtype,
        "max_shard_size": str(max_shard_size),
        "configuration": configuration.hexdigest(),
        "blip2nb": __version__,
        "transformers": importlib.metadata.version("transformers"),
    }


_ALWAYS = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


def _whole(folder: Path) -> bool:
    """Whether every file that `convert` writes is there, and every shard."""
    from blip2nb.weights.sources import open_folder

    try:
        open_folder(folder)
    except RequestError:
        return False
    return all((folder / name).is_file() for name in _ALWAYS)


def _weights_hash(wanted: Variant, opened: Union) -> str:
    from blip2nb.weights.hashing import combine, digest

    names = [name for entry in plan(wanted, shapes(opened)).written for name in entry.sources]
    return combine({name: digest(opened.tensor(name)) for name in names})


def _stamps(files: Files) -> list[dict[str, Any]]:
    """What tells at a glance that the files are those of last time: name, size and time of change."""
    paths = [files.vision, *sorted(path for path in files.language.iterdir() if path.is_file()), *files.checkpoints]
    stats = [(path.name, path.stat()) for path in paths]
    return [{"name": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats]


def _write(run: Run, wanted: Variant, opened: Union, files: Files, recipe: dict[str, str]) -> None:
    from tqdm import tqdm

    from blip2nb.models.huggingface import load_tokenizer, read_language_config, write_configuration
    from blip2nb.weights.convert import target_size, write_weights

    work = plan(wanted, shapes(opened))
    read_language_config(wanted, files.language)
    load_tokenizer(wanted, files.language)
    dtype = recipe["dtype"]
    size = target_size(work, opened, dtype)
    _check_disk(run.model, size)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"convert {wanted.name}")
    with bar, whole_directory(run.model) as folder:
        manifest = write_weights(work, opened, folder, dtype, recipe["max_shard_size"], progress=bar.update)
        manifest = dataclasses.replace(manifest, files=tuple(_stamps(files)), recipe=recipe)
        write_configuration(wanted, files.language, folder, dtype if dtype in LOSSY else "float32")
        manifest.write(folder)
    run.forget_proof()
    log.info("wrote %s", run.model)


def _check_disk(target: Path, size: int) -> None:
    """Raises RequestError when the files will not fit; configuration and headers are counted with 64 MB."""
    place = next(path for path in target.parents if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < size + 64_000_000:
        raise RequestError(
            f"{target} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there. "
            "Make room, or name an --output on another disk."
        )


def _hub_token(repository: str) -> str | None:
    if not repository:
        return None
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1 and all(repository.split("/"))
    except HFValidationError:
        valid = False
    if not valid:
        raise RequestError(f"--push-to-hub should name a repository such as user/blip2-opt-2.7b, found {repository!r}.")
    token = get_token()
    if token is None:
        raise RequestError(
            "--push-to-hub needs a token, and none was found. "
            "Log in with `hf auth login` or set HF_TOKEN in the environment."
        )
    return token


def _push(folder: Path, repository: str, token: str | None) -> None:
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    hub.create_repo(repository, exist_ok=True)
    hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Converted from LAVIS with blip2nb")
    log.info("uploaded to %s", repository)


# -- verify


def _tape(
    run: Run,
    manifest: Manifest,
    proof: str,
    given: str | Path,
    source: str | Path,
    lavis_python: str | Path,
    device: str,
    notebook: bool,
) -> Tape | None:
    """The recording to compare with: the one given, one that fits, or one made now. None where that cannot be."""
    if proof == "weights" or (proof == "auto" and manifest.dtype in LOSSY and not given):
        return None
    if given:
        tape = _open_tape(Path(given).expanduser())
        unrecorded = _unrecorded(tape, manifest)
        if unrecorded and tape.metadata["weights_hash"] == manifest.weights_hash:
            raise RequestError(
                f"{given} holds nothing for {unrecorded[0]} ({len(unrecorded)} places in all): "
                f"it is of another model or of an older version. Record again with `blip2nb capture {manifest.model}`."
            )
        return tape
    for path in (run.tape_path, SHIPPED_TAPES / f"{manifest.model}.safetensors"):
        if path.is_file():
            found = _open_tape(path)
            if found.metadata["weights_hash"] == manifest.weights_hash and not _unrecorded(found, manifest):
                log.info("comparing with the recording %s", path.name)
                return found
    from blip2nb.run import kernels

    wanted = variant(manifest.model)
    if kernels.find_lavis(lavis_python) is None:
        if proof == "both":
            _require_lavis(lavis_python, wanted)
        return None
    short = memory_short(wanted)
    if short:
        if proof == "both":
            raise RequestError(f"{short} Use a larger machine, or --proof weights.")
        log.info("%s Proving the weights alone.", short)
        return None
    return capture(run, source, lavis_python=lavis_python, device=device, notebook=notebook)


def _unrecorded(tape: Tape, manifest: Manifest) -> list[str]:
    """The places that a comparison needs and the tape does not hold."""
    from blip2nb.models.stages import stages
    from blip2nb.trace.stage import places

    return [place for place in places(stages(variant(manifest.model))) if place not in tape]


def memory_short(wanted: Variant) -> str:
    """A sentence when this machine cannot hold the model in float32, as both sides are compared; else ""."""
    needed = parameter_count(wanted) * 4 * 1.25  # the weights, and a quarter for activations and the widest layer twice
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not a Unix: try and see
        return ""
    if needed <= max(available, 0.9 * total):  # what the disk cache holds is free too
        return ""
    return (
        f"Running {wanted.name} in float32 takes {needed / 1e9:.0f} GB of memory; this machine has {total / 1e9:.0f}."
    )


def _completion(run: Run, manifest: Manifest, source: str | Path) -> str:
    """The commands that add the second proof to a run that has only the first; none where it was cast."""
    if manifest.dtype in LOSSY:
        return ""  # it differs from LAVIS's on purpose: the conversion to prove is the one with dtype auto
    words = ["blip2nb", "capture", manifest.model, *(["--source", str(source)] if source else [])]
    words += ["--output", str(run.tape_path)]
    again = ["blip2nb", "verify", str(run.model), "--tape", str(run.tape_path), "--output", str(run.folder)]
    return f"{shlex.join(words)} && {shlex.join(again)}"


def _open_tape(path: Path) -> Tape:
    try:
        return Tape(path)
    except (ValueError, FileNotFoundError) as error:
        raise RequestError(str(error)) from error


def _require_lavis(lavis_python: str | Path, wanted: Variant) -> Lavis:
    from blip2nb.run import kernels

    lavis = kernels.find_lavis(lavis_python)
    if lavis is None:
        raise RequestError(
            f"Recording {wanted.name} needs an environment with LAVIS, and none was found: no kernel `lavis`, no "
            ".venv-lavis. Make one with `make lavis`, or name yours with --lavis-python."
        )
    return lavis


class _steps:
    """A progress line for work whose steps have names: a bar without a length, with the step behind it."""

    def __init__(self, title: str):
        self._title = title

    def __enter__(self) -> Callable[[str], None]:
        from tqdm import tqdm

        self._bar = tqdm(desc=self._title, bar_format="{desc} [{elapsed}]", mininterval=1.0)
        return self._say

    def _say(self, word: str) -> None:
        self._bar.set_description_str(f"{self._title}: {word}", refresh=False)
        self._bar.update()  # drawn at most once a second

    def __exit__(self, *error: object) -> None:
        self._bar.close()
