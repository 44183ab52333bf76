"""A run: a folder under outputs/ that holds one conversion with its proof, and where everything in it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Self

from blip2nb.errors import RequestError
from blip2nb.forms import dumps, reads, record
from blip2nb.report.manifest import Manifest
from blip2nb.report.store import ReportData
from blip2nb.variants import Variant, variant
from blip2nb.whole import write_whole

_PROOF = "-proof"  # what the folder beside a model with a name of its own has behind that


@record
class Origin:
    """Where a model comes from, as it was named: absolute paths, "" for what was not.

    Attributes:
        source: a folder in the released layout, or one checkpoint.
        base: what a checkpoint is laid over.
    """

    source: str = ""
    base: str = ""

    @classmethod
    def of(cls, source: str | Path = "", base: str | Path = "") -> Origin:
        """What somebody named."""
        return cls(*(str(Path(where).expanduser().resolve()) if where else "" for where in (source, base)))

    def or_else(self, source: str | Path = "", base: str | Path = "") -> Origin:
        """What somebody names now, and for what they do not name, what was named then."""
        named = Origin.of(source, base)
        return Origin(named.source or self.source, named.base or self.base)

    def __bool__(self) -> bool:
        return bool(self.source or self.base)


@dataclasses.dataclass(frozen=True)
class RunPaths:
    """The places of one run. None of them need exist yet.

    Attributes:
        folder: holds tape.safetensors, report.json, arrays.safetensors, report.html and figures/.
        model: the converted directory, which `from_pretrained` loads.
    """

    folder: Path
    model: Path

    @classmethod
    def new(cls, model: str, source: str | Path = "", run_name: str = "", output_dir: str | Path = "") -> Self:
        """The run of a model: named after it, with the checkpoint's stem behind it where one was laid over its files.

        Raises:
            RequestError: the name is a path.
        """
        if not run_name:
            own = not source or Path(source).is_dir()
            run_name = model if own else f"{model}--{Path(source).stem}"
        if Path(run_name).name != run_name or run_name.startswith("."):
            raise RequestError(
                f"A run's name should be a plain folder name, found {run_name!r}. Use output_dir for its place."
            )
        folder = outputs_folder(output_dir) / run_name
        return cls(folder, folder / "model")

    @classmethod
    def of_model(cls, model: Path, folder: Path | None = None) -> Self:
        """The run a converted directory belongs to: the folder it stands in as `model`, or one beside it."""
        model = model.resolve()
        if folder is None:
            folder = model.parent if model.name == "model" else model.with_name(f"{model.name}{_PROOF}")
        return cls(folder, model)

    @classmethod
    def find(cls, path: str | Path, output_dir: str | Path = "") -> Self:
        """The run meant by a path or a run's name: a run's folder, a converted directory, or a name under outputs/.

        The directory may have been removed, if its report was kept.

        Raises:
            RequestError: there is no such thing.
        """
        named = outputs_folder(output_dir) / str(path)
        for folder in (Path(path).expanduser(), named):
            if (folder / "config.json").is_file():
                return cls.of_model(folder)
            if (folder / "model").is_dir() or (folder / "report.json").is_file():
                return cls(folder.resolve(), _model_of(folder.resolve()))
            removed = cls.of_model(folder)
            if not folder.exists() and (removed.folder / "report.json").is_file():
                return removed
        raise RequestError(
            f"{path} is neither a converted directory nor a run. Expected a folder that `blip2nb convert` wrote, "
            f"or a run's name under {outputs_folder(output_dir)}."
        )

    @property
    def tape_path(self) -> Path:
        return self.folder / "tape.safetensors"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    @property
    def page(self) -> Path:
        return self.folder / "report.html"

    @property
    def variant(self) -> Variant:
        """The variant it was converted as, by name. Raises RequestError when there is no converted model."""
        return variant(Manifest.read(self.model).model)

    @property
    def origin(self) -> Origin:
        """What was named for the conversion; nothing for a model's own files."""
        try:
            return reads(Origin, (self.folder / "run.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return Origin()

    @property
    def source(self) -> str:
        """The source that was named for the conversion, as an absolute path; "" for a model's own files."""
        return self.origin.source

    @property
    def base(self) -> str:
        """The base that was named for it, as an absolute path; "" for none."""
        return self.origin.base

    def remember(self, origin: Origin) -> None:
        """Keep the origin for the proofs to come. Beside the model, not in it: it is paths of this machine."""
        path = self.folder / "run.json"
        if origin:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, dumps(origin))
        else:
            path.unlink(missing_ok=True)

    def forget_proof(self) -> None:
        """Remove report, arrays, activations and page: they are of a model that no longer stands here."""
        for name in ("report.json", "arrays.safetensors", "activations.safetensors", "report.html"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def report(self) -> ReportData:
        """Raises RequestError when the run was not verified yet."""
        return ReportData.load(self.folder)

    def left(self) -> dict[str, Path]:
        """What the run has left on disk, by a word for it."""
        whole = {
            "model": self.model,
            "report": self.folder / "report.json",
            "page": self.page,
            "figures": self.figures,
            "tape": self.tape_path,
        }
        return {word: path for word, path in whole.items() if path.exists()}


def outputs_folder(output_dir: str | Path = "") -> Path:
    """The given folder; else the checkout's outputs/, wherever the caller stands; else, installed, outputs/ here."""
    if output_dir:
        return Path(output_dir).expanduser().resolve()
    checkout = Path(__file__).resolve().parents[2]
    return checkout / "outputs" if (checkout / "pyproject.toml").is_file() else Path.cwd() / "outputs"


def _model_of(folder: Path) -> Path:
    """The model of a run's folder: in it, or the one that it stands beside."""
    beside = folder.with_name(folder.name.removesuffix(_PROOF))
    return beside if beside != folder and not (folder / "model").is_dir() else folder / "model"
