"""The verbs about proofs: capture, verify, and what makes sure that there is one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.api.common import check_dtype, hub_token, run_of, source_of, write_card
from blip2nb.api.converting import convert, push
from blip2nb.api.looking import draw
from blip2nb.bars import progress_bar
from blip2nb.errors import RequestError, memory_watched
from blip2nb.handles import Report, Run
from blip2nb.lavis_env.environment import LavisOptions, find_lavis
from blip2nb.report.manifest import Manifest
from blip2nb.report.runs import Origin
from blip2nb.variants import Variant, variant

if TYPE_CHECKING:
    from blip2nb.families.captioners.inputs import Chosen, Paths
    from blip2nb.trace.tape import Tape

log = logging.getLogger("blip2nb")

PROOFS = ("auto", "weights", "both")


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
        wanted, origin = which(model, source), Origin.of(source, base)
        run = Run.new(wanted.name, source, run_name, output_dir)
    else:
        run, wanted, origin = model, variant(Manifest.read(model.model).model), model.origin.or_else(source, base)
    chosen = choose(wanted, images, texts)
    return _record(run, wanted, chosen, origin, LavisOptions(lavis_python, device, notebook), output)


def _record(
    run: Run, wanted: Variant, chosen: Chosen | None, origin: Origin, options: LavisOptions, output: str | Path = ""
) -> Tape:
    from blip2nb.conversion.directory import as_converted
    from blip2nb.conversion.files import open_source
    from blip2nb.lavis_env import kernels, reference

    lavis = reference.require_lavis(options.python, wanted)
    opened = as_converted(open_source(wanted, origin.source, origin.base), run.model)
    own = run.tape_path if chosen is None else reference.images_tape(run)
    path = Path(output).expanduser().resolve() if output else own
    with _steps("LAVIS") as say:
        kind = Path(origin.source).name if origin.source else "twin" if wanted.twin else "released files"
        return kernels.capture(opened, path, lavis, kind, options.device, options.notebook, say, chosen)


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
    from blip2nb.proof.subject import Subject
    from blip2nb.proof.verify import verify as prove

    _check_name(proof)
    if dtype:
        check_dtype(dtype, ("float32", "bfloat16", "float16"))
    run = run_of(target)
    own = run.folder
    if output:
        run = dataclasses.replace(run, folder=Path(output).expanduser().resolve())
    manifest, origin = Manifest.read(run.model), run.origin.or_else(source, base)
    refuse_wrong_base(variant(manifest.model), origin.source, origin.base)
    if (images or texts) and proof == "weights":
        raise RequestError(
            "images and texts are shown to both models, and proof weights runs neither: leave out one of them."
        )
    token = hub_token(push_to_hub)
    chosen = choose(manifest.variant, images, texts)
    proof = proof if chosen is None else "both"
    found = None
    if tape and proof != "weights":
        found = reference.given_tape(Path(tape).expanduser(), manifest, chosen)
    elif reference.can_compare(proof, manifest):
        found = reference.find_tape(run, manifest, chosen)
        if found is None and (proof == "both" or find_lavis(lavis_python) is not None):
            options = LavisOptions(lavis_python, device, notebook)
            found = _record(run, variant(manifest.model), chosen, origin, options)
    command = reference.completion(run, manifest, origin)
    if found is not None:
        command = reference.again(run, manifest, origin)
    _forget_another_models(run)
    subject = Subject(run.model, found, lambda: source_of(run, origin))
    with _steps("verify") as say:
        proven = prove(subject, command, say, dtype, reference.why_not_compared(proof, manifest))
    proven.save(run.folder)
    report = Report(proven.content, proven.arrays)
    run.page.unlink(missing_ok=True)  # it would be an earlier report's, if drawing does not come to its end
    if figures:
        report.drawn.update(draw(run, report))
    if run.folder == own or push_to_hub:  # a proof that is kept elsewhere leaves the directory as it is
        write_card(run, report.drawn.get("depth_trace"), report)
    if push_to_hub and report.verdict == "diverges":
        log.warning("%s was not uploaded: it is not the model that LAVIS runs", run.folder.name)
    elif push_to_hub:
        push(run, push_to_hub, private=private, token=token)
    return report


def _check_name(proof: str) -> None:
    if proof not in PROOFS:
        raise RequestError(f"proof should be one of {', '.join(PROOFS)}, found {proof!r}.")


def _forget_another_models(run: Run) -> None:
    """Remove an earlier report, unless it is of the model as it stands. That one stays true if this verification is
    killed; any other would then pass for its result."""
    from blip2nb.proof.provenance import state
    from blip2nb.report.store import content_of

    path = run.folder / "report.json"
    kept = False
    if path.is_file():
        try:
            made = content_of(path.read_text(encoding="utf-8"), str(path)).provenance
            kept = made is not None and made.state == state(run.model)
        except (RequestError, ValueError):
            pass
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

    _check_name(proof)
    from blip2nb.conversion.files import which
    from blip2nb.families.captioners import huggingface

    wanted = which(model, source)
    recorded = Run.new(wanted.name, source, run_name, output_dir).tape_path.is_file()
    shipped = not source and reference.shipped_tape(wanted).is_file()
    if proof == "both" and not recorded and not shipped:
        reference.require_lavis(lavis_python, wanted)
    huggingface.import_all()


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
