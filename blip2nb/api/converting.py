"""The verbs about files: plan, convert, check, revert, push."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.api.common import check_dtype, hub_token, run_of, source_of, write_card
from blip2nb.errors import RequestError
from blip2nb.handles import Run
from blip2nb.report.manifest import Manifest
from blip2nb.report.runs import Origin
from blip2nb.weights.writer import parse_size

if TYPE_CHECKING:
    from blip2nb.conversion.preview import Preview
    from blip2nb.conversion.revert import Reverted


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
    check_dtype(dtype)
    parse_size(max_shard_size)
    run = Run.of_model(Path(output).expanduser()) if output else Run.new(wanted.name, source, run_name, output_dir)
    token = hub_token(push_to_hub)
    directory.check_place(run.model)
    opened = open_source(wanted, source, base)
    directory.check_apart(run.model, opened.files)
    recipe = directory.recipe_of(opened.files, dtype, max_shard_size)
    if not directory.holds_already(run.model, opened, recipe, overwrite):
        directory.write_model(run.model, opened, recipe, card.render)
        run.forget_proof()
    if not (run.model / "README.md").exists():
        write_card(run)
    run.remember(Origin.of(source, base))
    if push_to_hub:
        push(run, push_to_hub, private=private, token=token)
    return run


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

    return hub.push(run_of(target), repository, token, private)


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
    check_dtype(dtype)
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

    run = run_of(target)
    manifest = Manifest.read(run.model)
    opened = source_of(run, run.origin.or_else(source, base))
    wrong = tuple(directory.check_model(run.model, opened))
    return Check(run.model, len(manifest.written), opened is not None, wrong)


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
