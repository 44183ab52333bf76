"""The verbs: convert, capture, verify, show. The command line and the notebooks call these and nothing else."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.bars import progress_bar
from blip2nb.errors import RequestError, memory_watched
from blip2nb.handles import Report, Run
from blip2nb.report.manifest import Manifest
from blip2nb.variants import Variant, variant
from blip2nb.weights.convert import CASTS
from blip2nb.weights.download import locate
from blip2nb.weights.writer import parse_size

if TYPE_CHECKING:
    from blip2nb.catalogue.answers import Answer, Listing
    from blip2nb.conversion.files import Opened
    from blip2nb.conversion.preview import Preview
    from blip2nb.conversion.revert import Reverted
    from blip2nb.display.difference import Difference
    from blip2nb.display.explorer import Explorer
    from blip2nb.display.figures.style import Picture
    from blip2nb.families.captioners.inputs import Chosen, Paths
    from blip2nb.sweeps.sweep import Sweep
    from blip2nb.trace.tape import Tape

log = logging.getLogger("blip2nb")

PROOFS = ("auto", "weights", "both")


@dataclasses.dataclass(frozen=True)
class Check:
    """What `check` found: `wrong` holds a sentence for each thing that is not as it was; none for a whole directory."""

    folder: Path
    tensors: int
    source_checked: bool
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        if self.wrong:
            return "\n".join([f"{self.folder} is not as it was written:", *(f"  {one}" for one in self.wrong)])
        source = "and its source is the one it was made from" if self.source_checked else "its source is not at hand"
        return f"{self.folder} is whole: all {self.tensors} tensors are as they were written, {source}."


def convert(
    model: str = "",
    source: str | Path = "",
    output: str | Path = "",
    *,
    base: str | Path = "",
    run_name: str = "",
    output_dir: str | Path = "",
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    push_to_hub: str = "",
    private: bool = False,
) -> Run:
    """Convert a LAVIS BLIP-2 model into a directory that transformers loads. Needs neither LAVIS nor much memory.

    Args:
        model: the variant's name (`blip2nb variants`); may be left out where a checkpoint of LAVIS's trainer says it.
        source: a folder in the released layout, or one checkpoint to lay over the variant's own files.
        output: the directory to write; outputs/<run_name>/model unless given.
        base: what a checkpoint is laid over instead of the variant's own files: a folder in the released layout, or a
            directory that was converted to transformers already, such as Salesforce/blip2-opt-2.7b's.
        dtype: "auto" keeps every tensor's stored dtype and loses nothing; or float32, float16, bfloat16.
        max_shard_size: as in transformers, such as "5GB".
        overwrite: replace a directory that holds another conversion.
        push_to_hub: a repository (user/name) to upload to when done, as `push` does it. The token comes from the
            environment or the hub's login.
        private: of that repository, where it is made.

    Returns:
        The run; `run.model` is the directory, with a model card. One that holds the same conversion already is kept as
        it is. What was interrupted is gone on with by the same call.

    Raises:
        RequestError: the request or its input is wrong. Nothing is left behind.
    """
    from blip2nb.conversion import directory
    from blip2nb.conversion.files import open_source, which
    from blip2nb.display import card

    wanted = which(model, source)
    _check_dtype(dtype)
    parse_size(max_shard_size)
    run = Run.of_model(Path(output).expanduser()) if output else Run.new(wanted.name, source, run_name, output_dir)
    token = _hub_token(push_to_hub)
    directory.check_place(run.model)
    opened = open_source(wanted, source, base)
    directory.check_apart(run.model, opened.files)
    recipe = directory.recipe_of(opened.files, dtype, max_shard_size)
    if not directory.holds_already(run.model, opened, recipe, overwrite):
        directory.write_model(run.model, opened, recipe, card.render)
        run.forget_proof()
    if not (run.model / "README.md").exists():
        _write_card(run)
    run.remember(source, base)
    if push_to_hub:
        push(run, push_to_hub, private=private, token=token)
    return run


def _write_card(run: Run, figure: Picture | None = None) -> None:
    from blip2nb.display import card

    card.write(run, figure)


def push(target: str | Path | Run, repository: str, *, private: bool = False, token: str = "") -> str:
    """Upload a converted model with its card to the hub: what the hub does not have of it yet, as one commit.

    After a proof, that is the card and its figure. A card that was edited, here or there, is not written over.

    Args:
        target: a converted directory, a run's folder or name, or a run.
        repository: user/name; made where it is not there.
        private: make it a private one.
        token: the environment's or the login's unless given.

    Returns:
        The repository's address.

    Raises:
        RequestError: the proof found that it is not the model, or there is no converted model, name or token; or the
            hub could not be reached or refused. What is converted stays.
    """
    from blip2nb.conversion import hub

    return hub.push(_run_of(target), repository, token, private)


def plan(
    model: str = "",
    source: str | Path = "",
    output: str | Path = "",
    *,
    base: str | Path = "",
    run_name: str = "",
    output_dir: str | Path = "",
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
) -> Preview:
    """What `convert` would do with the same arguments: what it reads and from where, what it writes, what it needs.

    Reads headers, asks the servers for the sizes of what is not here, and starts nothing.

    Raises:
        RequestError: as `convert` would, as far as that can be told now.
    """
    from blip2nb.conversion.files import which
    from blip2nb.conversion.preview import preview

    wanted = which(model, source)
    _check_dtype(dtype)
    run = Run.of_model(Path(output).expanduser()) if output else Run.new(wanted.name, source, run_name, output_dir)
    return preview(wanted, run.model, source, base, dtype, max_shard_size)


def check(target: str | Path | Run, source: str | Path = "", base: str | Path = "") -> Check:
    """Read a converted directory again, and its source where it is at hand, and compare both with the manifest.

    Args:
        target: a converted directory, or a run's folder or name.
        source, base: as for `convert`; what was named then unless given.

    Raises:
        RequestError: the directory is not one of ours, or a source that was named is not there.
    """
    from blip2nb.conversion import directory
    from blip2nb.conversion.files import open_source

    run = _run_of(target)
    manifest = Manifest.read(run.model)
    source, base = source or run.source, base or run.base
    named = variant(manifest.model)
    at_hand = bool(source or base) or named.twin or all(part.here for part in locate(named))
    opened = open_source(named, source, base) if at_hand else None
    return Check(run.model, len(manifest.written), at_hand, tuple(directory.check_model(run.model, opened)))


def _source_of(run: Run, source: str | Path = "", base: str | Path = "") -> Opened | None:
    """What a run was converted from, opened, if it is here; nothing is downloaded for it."""
    from blip2nb.conversion.files import open_source

    source, base = source or run.source, base or run.base
    named = variant(Manifest.read(run.model).model)
    at_hand = bool(source or base) or named.twin or all(part.here for part in locate(named))
    return open_source(named, source, base) if at_hand else None


def _run_of(target: str | Path | Run) -> Run:
    return target if isinstance(target, Run) else Run.find(target)


def revert(target: str | Path | Run, output: str | Path, *, part: str = "trained", overwrite: bool = False) -> Reverted:
    """Write a LAVIS checkpoint from a BLIP-2 directory of transformers: the way back.

    Args:
        target: a converted directory, a run's folder or name, or what `save_pretrained` wrote after tuning.
        output: the .pth to write.
        part: "trained" for what LAVIS's trainer would have saved, "all" for vision tower and language model too.
        overwrite: replace a file that is there.

    Raises:
        RequestError: the directory is no BLIP-2 captioner, or the file is there already.
    """
    from blip2nb.conversion.revert import PARTS, revert_model

    if part not in PARTS:
        raise RequestError(f"part should be one of {', '.join(PARTS)}, found {part!r}.")
    folder = target.model if isinstance(target, Run) else _model_folder(Path(target).expanduser())
    return revert_model(folder, Path(output).expanduser(), part, overwrite)


def _model_folder(path: Path) -> Path:
    return path if (path / "config.json").is_file() else Run.find(path).model


def _check_dtype(dtype: str, possible: Sequence[str] = tuple(CASTS)) -> None:
    if dtype not in possible:
        raise RequestError(f"dtype should be one of {', '.join(possible)}, found {dtype!r}.")


def _hub_token(repository: str) -> str:
    if not repository:
        return ""
    from blip2nb.conversion import hub

    return hub.find_token(repository)


def capture(
    model: str | Run,
    source: str | Path = "",
    *,
    base: str | Path = "",
    output: str | Path = "",
    run_name: str = "",
    output_dir: str | Path = "",
    lavis_python: str | Path = "",
    device: str = "cpu",
    notebook: bool = False,
    images: Paths = (),
    texts: str | Sequence[str] = (),
) -> Tape:
    """Have LAVIS itself run a model's weights on the demo inputs, or on others, and record what happens: the reference.

    Args:
        model: the variant's name, or a run.
        source, base: as for `convert`.
        output: the tape's path; the run's tape.safetensors, or tape-images.safetensors, unless given.
        lavis_python: the python of an environment with LAVIS; found by itself where `make lavis` made one.
        device: "cpu" or a GPU's name, for LAVIS. Float32 on both.
        notebook: run notebooks/lavis.ipynb on the `lavis` kernel, through papermill, instead of the bare script, and
            keep the executed notebook beside the tape.
        images: image files and folders of them, instead of the demo's. Each is shown with each text.
        texts: each stands beside the image in `forward`, and before the caption as its prompt.

    Raises:
        RequestError: there is no LAVIS, or it could not do it; or there is no image to show.
    """
    from blip2nb.conversion.files import which
    from blip2nb.families.captioners.inputs import choose

    if isinstance(model, str):
        wanted = which(model, source)
        run = Run.new(wanted.name, source, run_name, output_dir)
    else:
        run, wanted = model, variant(Manifest.read(model.model).model)
        source, base = source or run.source, base or run.base
    chosen = choose(wanted, images, texts)
    return _record(run, wanted, chosen, source, base, output, lavis_python, device, notebook)


def _record(
    run: Run,
    wanted: Variant,
    chosen: Chosen | None,
    source: str | Path,
    base: str | Path,
    output: str | Path,
    lavis_python: str | Path,
    device: str,
    notebook: bool,
) -> Tape:
    from blip2nb.conversion.files import open_source
    from blip2nb.lavis_env import kernels, reference

    lavis = reference.require_lavis(lavis_python, wanted)
    opened = open_source(wanted, source, base)
    own = run.tape_path if chosen is None else reference.images_tape(run)
    path = Path(output).expanduser().resolve() if output else own
    with _steps("LAVIS") as say:
        kind = Path(source).name if source else "twin" if wanted.twin else "released files"
        return kernels.capture(opened, path, lavis, kind, device, notebook, say, chosen)


@memory_watched("while verifying")
def verify(
    target: str | Path | Run,
    *,
    proof: str = "auto",
    tape: str | Path = "",
    source: str | Path = "",
    base: str | Path = "",
    lavis_python: str | Path = "",
    device: str = "cpu",
    output: str | Path = "",
    notebook: bool = False,
    figures: bool = True,
    images: Paths = (),
    texts: str | Sequence[str] = (),
    dtype: str = "",
    push_to_hub: str = "",
    private: bool = False,
) -> Report:
    """Prove that a converted directory is the model LAVIS runs, and say where it first goes wrong if it is not.

    Args:
        target: a converted directory, a run's folder or name, or what `convert` returned.
        proof: "weights" compares the weights alone; "both" also behaviour, for which it needs a tape or LAVIS; "auto"
            does what is possible.
        tape: a recording to compare with; one that fits is found (the run's own, or one that ships with the kit), or
            made where LAVIS is at hand.
        source, base, lavis_python, device, notebook: for making one, as for `capture`.
        output: the folder for report and figures; the run's own unless given.
        figures: also draw them, and make report.html.
        images: image files and folders of them, to compare on instead of the demo's: behaviour is then compared, or
            the request refused. Each is shown with each text. The recording of them is kept in the run's folder.
        texts: each stands beside the image in `forward`, and before the caption as its prompt.
        dtype: what transformers runs the model in: float32, bfloat16 or float16; float32 unless the weights were cast.
            LAVIS's recording is in float32 always.
        push_to_hub, private: as for `convert`. A model that diverges is not uploaded.

    Returns:
        The report, which is also written to the run's folder, and into the model's card.

    Raises:
        RequestError: the request is wrong, among others: `both` without a way to a tape.
        OutOfMemory: memory ran out, so that there is no verdict.
    """
    from blip2nb.conversion.files import refuse_wrong_base
    from blip2nb.families.captioners.inputs import choose
    from blip2nb.lavis_env import reference
    from blip2nb.lavis_env.environment import find_lavis
    from blip2nb.proof.verify import verify as prove

    if proof not in PROOFS:
        raise RequestError(f"proof should be one of {', '.join(PROOFS)}, found {proof!r}.")
    if dtype:
        _check_dtype(dtype, ("float32", "bfloat16", "float16"))
    run = _run_of(target)
    own = run.folder
    if output:
        run = dataclasses.replace(run, folder=Path(output).expanduser().resolve())
    manifest = Manifest.read(run.model)
    refuse_wrong_base(variant(manifest.model), source or run.source, base or run.base)
    if (images or texts) and proof == "weights":
        raise RequestError(
            "images and texts are shown to both models, and proof weights runs neither: leave out one of them."
        )
    token = _hub_token(push_to_hub)
    chosen = choose(manifest.model_variant, images, texts)
    proof = proof if chosen is None else "both"
    found = None
    if tape and proof != "weights":
        found = reference.given_tape(Path(tape).expanduser(), manifest, chosen)
    elif reference.can_compare(proof, manifest):
        found = reference.find_tape(run, manifest, chosen)
        if found is None and (proof == "both" or find_lavis(lavis_python) is not None):
            made_of = source or run.source, base or run.base
            found = _record(run, variant(manifest.model), chosen, *made_of, "", lavis_python, device, notebook)
    origin = source or run.source, base or run.base
    command = reference.completion(run, manifest, *origin)
    if found is not None:
        command = reference.again(run, manifest, origin[0])
    _forget_another_models(run)
    with _steps("verify") as say:
        proven = prove(
            run.model,
            found,
            command,
            say,
            source=lambda: _source_of(run, source, base),
            dtype=dtype,
            missing=reference.why_not_compared(proof, manifest),
        )
    proven.save(run.folder)
    report = Report(proven.content, proven.arrays)
    run.page.unlink(missing_ok=True)  # it would be an earlier report's, if drawing does not come to its end
    if figures:
        report.drawn.update(draw(run))
    if run.folder == own or push_to_hub:  # a proof that is kept elsewhere leaves the directory as it is
        _write_card(run, report.drawn.get("depth_trace"))
    if push_to_hub and report.verdict == "diverges":
        log.warning("%s was not uploaded: it is not the model that LAVIS runs", run.folder.name)
    elif push_to_hub:
        push(run, push_to_hub, private=private, token=token)
    return report


def _forget_another_models(run: Run) -> None:
    """Remove an earlier report, unless it is of the model as it stands. That one stays true if this verification is
    killed; any other would then pass for its result."""
    from blip2nb.proof.verify import state
    from blip2nb.report.store import content_of

    path = run.folder / "report.json"
    try:
        content = content_of(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}
        kept = content["provenance"]["state"] == state(run.model)
    except (RequestError, ValueError, KeyError):
        kept = False
    if not kept:
        run.forget_proof()


def proven(
    model: str = "",
    source: str | Path = "",
    *,
    base: str | Path = "",
    run_name: str = "",
    output_dir: str | Path = "",
    lavis_python: str | Path = "",
) -> Run:
    """A run that is converted and verified: made now, or the one that is there where it still holds.

    What the notebooks start from. The model is kept where it is the same conversion, and so is the report, where it
    was made of this model as it stands, by these versions, and with LAVIS's recording if there is one.

    Args:
        model, source, base, run_name, output_dir: as for `convert`. With neither model nor source, the run of that name
            is taken as it is, whatever it was made from.
        lavis_python: as for `verify`.

    Returns:
        The run; `run.report` is what was found.

    Raises:
        RequestError: as `convert` and `verify` do.
    """
    from blip2nb.lavis_env import reference

    if run_name and not model and not source:
        run = Run.find(run_name, output_dir)
    else:
        run = convert(model, source, base=base, run_name=run_name, output_dir=output_dir)
    if reference.report_holds(run, lavis_python):
        log.info("the report of %s still holds; kept", run.folder.name)
    else:
        verify(run, source=source, base=base, lavis_python=lavis_python)
    return run


def check_proof(
    proof: str, model: str, source: str = "", run_name: str = "", output_dir: str = "", lavis_python: str = ""
) -> None:
    """Whether the proof asked for can be made, before anything is converted; and the imports that it needs.

    Raises:
        RequestError: there is no such proof, or "both" was asked for without LAVIS and without a recording.
    """
    from blip2nb.lavis_env import reference

    if proof not in PROOFS:
        raise RequestError(f"proof should be one of {', '.join(PROOFS)}, found {proof!r}.")
    from blip2nb.conversion.files import which
    from blip2nb.families.captioners import huggingface

    wanted = which(model, source)
    recorded = Run.new(wanted.name, source, run_name, output_dir).tape_path.is_file()
    shipped = not source and reference.shipped_tape(wanted).is_file()
    if proof == "both" and not recorded and not shipped:
        reference.require_lavis(lavis_python, wanted)
    huggingface.import_all()


def sweep(
    *patterns: str | Path,
    notebook: str | Path = "convert",
    parameters: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    output: str | Path = "",
    workers: int = 0,
    scheduler: str = "",
    timeout: str | float = "",
    keep_models: bool = False,
    overwrite: bool = False,
) -> Sweep:
    """Run a notebook for many models, several at a time, and make a report over all: index.html in the output folder.

    What is finished already, by a hash of all that it depends on, is not done again. One run that fails does not stop
    the others. Needs a guarded main module where it is called from a script (`if __name__ == "__main__"`).

    Args:
        patterns: names of variants or patterns of them ("tiny-*", "blip2-*-coco"), checkpoints, and lists of runs as
            .yaml or .csv files, whose rows give parameters by name.
        notebook: one of the kit's by name, or a path.
        parameters: for every run that does not say otherwise.
        grid: parameter -> values; each run is made with every combination.
        output: a folder, outputs/ unless given, or an address that fsspec knows, such as s3://bucket/sweep. Each run is
            a folder in it, there whole or not at all.
        workers: how many runs at a time on this machine; as many as it has cores unless given. Runs whose models do
            not fit in memory beside each other never run beside each other.
        scheduler: the address or file of a Dask scheduler that is running, instead of this machine.
        timeout: after which a run is ended, in seconds or as "90s", "15min", "2h"; never unless given.
        keep_models: keep the converted models too, not the reports alone.
        overwrite: make everything anew, whatever stands there.

    Returns:
        What was found: `.runs`, `.status`, and `.figure()`.

    Raises:
        RequestError: the request is wrong, before anything runs.
    """
    from blip2nb.sweeps import asked, sweep

    runs = asked.expand(patterns, notebook, parameters, grid)
    if workers < 0:
        raise RequestError(f"workers should be 1 or more, found {workers}.")
    return sweep.sweep(
        runs,
        output,
        workers=workers,
        scheduler=scheduler,
        timeout=sweep.seconds(timeout),
        keep_models=keep_models,
        overwrite=overwrite,
    )


def draw(run: Run) -> dict[str, Picture]:
    """Draw every figure that the run's report has data for into its figures/ folder, and make report.html of them.

    Returns:
        The figures by name, each drawn once: shown in a notebook, it is what was written.
    """
    from blip2nb.display.narrow import narrow_pictures

    report = run.report
    run.figures.mkdir(parents=True, exist_ok=True)
    with narrow_pictures(run.folder) as narrow:
        from blip2nb.display import page, plots  # takes half a second, as long as that process takes to begin

        for stem in plots.FIGURES:  # of an earlier report, which may have had data for more
            for path in run.figures.glob(f"{stem}*"):
                path.unlink()
        pictures, wide = plots.save_all(report.content, report.arrays, run.figures)
        page.save(report.content, report.arrays, run.page, wide, narrow())
    return pictures


def export_figures(target: str | Path | Run, folder: str | Path = "") -> list[Path]:
    """Write each of a run's figures as a paper or a talk needs it: SVG, PDF and PNG at 3.4 and 7.0 inches, the data it
    draws as CSV, and its alt text.

    Args:
        target: a run's folder or name, or a run.
        folder: where to; the run's figures/export/ unless given.

    Returns:
        The files' paths.

    Raises:
        RequestError: there is no such run, or it was not verified.
    """
    from blip2nb.display import plots

    run = _run_of(target)
    report = run.report
    return plots.export(report.content, report.arrays, Path(folder).expanduser() if folder else run.figures / "export")


def explore(target: str | Path | Run) -> Explorer:
    """A widget to look around in a run: choose stage, token and image, see the figure and the numbers change.

    Args:
        target: a run's folder or name, or a run.

    Raises:
        RequestError: there is no such run, it was not verified, or its converted model was removed.
    """
    from blip2nb.display.explorer import Explorer

    return Explorer(_run_of(target))


def break_it(target: str | Path | Run, fault: str, where: str = "", seed: int = 0) -> Answer:
    """Make a known mistake in a converted model, and see whether the kit finds it. The run stays as it is: the mistake
    is made in a copy, in a temporary folder or in memory.

    Args:
        target: a run's folder or name, a converted directory, or a run.
        fault: the mistake's name; `faults` lists them.
        where: the stage or module to make it at; midway among the places where it fits unless given.
        seed: of the values it takes, where it has random ones.

    Returns:
        What was said and what should have been: `answer.findings`, `answer.shows`, `answer.marks`.

    Raises:
        RequestError: there is no such run, mistake or place, or no recording of LAVIS that fits the run.
    """
    from blip2nb.catalogue.bench import Bench
    from blip2nb.lavis_env import reference

    run = _run_of(target)
    manifest = Manifest.read(run.model)
    tape = reference.find_tape(run, manifest)
    if tape is None:
        again = reference.completion(run, manifest, run.source, run.base)
        raise RequestError(f"There is no recording of LAVIS that fits {run.folder.name}. Make one: {again}")
    bench = Bench(run.model, tape, lambda: _source_of(run))
    return bench.ask(bench.case(fault, where), seed)


def faults() -> Listing:
    """The mistakes that `break_it` makes, as a table: name, kind, what is done wrong, and its likely cause."""
    from blip2nb.catalogue.answers import Listing
    from blip2nb.catalogue.captioners import CATALOGUE

    return Listing(CATALOGUE)


def show(target: str | Path | Run) -> str:
    """A run in words: the verdict, the numbers behind it, and where everything lies."""
    from blip2nb.display.text import describe

    run = _run_of(target)
    return describe(run)


def diff(run_a: str | Path | Run, run_b: str | Path | Run) -> Difference:
    """What is different between two runs that were verified: verdicts, stages, output, parameters and versions.

    Args:
        run_a, run_b: runs, their folders or names, or converted directories. Of the same model or of two; where the
            behaviour of one was not compared with LAVIS's, the rest is compared.

    Raises:
        RequestError: one is no run, or was not verified yet.
    """
    from blip2nb.display.difference import compare_reports

    one, other = map(_run_of, (run_a, run_b))
    return compare_reports(one.report, other.report, (one.folder.name, other.folder.name))


def finish(run: Run, keep_model: bool = True) -> None:
    """The end of a run: remove its converted model where it is not to be kept. Everything else stays.

    The same `convert` makes the same model again.

    Raises:
        RequestError: what stands in the model's place is not a conversion of this kit.
    """
    if keep_model or not run.model.exists():
        return
    from blip2nb import clean

    clean.remove_model(run)
    log.info("removed the converted model %s; report and figures stay", run.model)


class _steps:
    """A progress line for work whose steps have names: a bar without a length, with the step behind it."""

    def __init__(self, title: str):
        self._title = title

    def __enter__(self) -> Callable[[str], None]:
        self._bar = progress_bar(desc=self._title, bar_format="{desc} [{elapsed}]", mininterval=1.0)
        return self._say

    def _say(self, word: str) -> None:
        self._bar.set_description_str(f"{self._title}: {word}", refresh=False)
        self._bar.update()  # drawn at most once a second

    def __exit__(self, *error: object) -> None:
        self._bar.close()
