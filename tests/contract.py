"""What others build on, as plain values: commands, notebook parameters, JSON keys, tensors, verdicts, and how often
faults are found. `python tests/contract.py` writes them to tests/contract/; the test compares.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import papermill  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from safetensors import safe_open  # noqa: E402

import blip2nb  # noqa: E402
from benchmarks.faults import pairs  # noqa: E402
from blip2nb import cli  # noqa: E402
from blip2nb.catalogue.bench import Bench  # noqa: E402
from blip2nb.catalogue.captioners import CATALOGUE  # noqa: E402
from blip2nb.conversion.files import open_source  # noqa: E402
from blip2nb.lavis_env.reference import shipped_tape  # noqa: E402
from blip2nb.trace import Tape  # noqa: E402
from blip2nb.variants import TWINS  # noqa: E402

FOLDER = Path(__file__).with_name("contract")
OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
SAMPLE = 24  # faults for each of the two twins, beside which one pair

MAPS = {
    "bytes_by_kind", "captions_equal", "dropped", "huggingface", "lavis", "modes", "no_way_back", "origins",
    "parameters", "sequences", "tied", "unused", "versions",
}  # fmt: skip
"""Keys whose values are mappings by name: the names there are data, and no part of the form."""


def commands() -> dict[str, Any]:
    """Every command with its arguments and options: their spellings, types, defaults."""
    group = typer.main.get_command(cli.app)
    return {
        name: sorted(
            f"{'/'.join([*one.opts, *one.secondary_opts])}: {_type(one.type_descriptor.annotation)}"
            + (", required" if one.required else f" = {getattr(one.default, 'value', one.default)!r}")
            for one in command.params
        )
        for name, command in sorted(group.commands.items())
    }


def _type(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "|".join(one.value for one in annotation)
    return getattr(annotation, "__name__", str(annotation))


def notebooks() -> dict[str, Any]:
    """Every notebook's parameters, with their defaults."""
    return {
        path.stem: {name: one["default"] for name, one in papermill.inspect_notebook(str(path)).items()}
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    }


def form(value: Any, maps: Iterable[str] = MAPS) -> Any:
    """A JSON value's keys, whatever its numbers: of a list or a map what its items have together."""
    if isinstance(value, Mapping):
        return {key: _of_map(one, maps) if key in maps else form(one, maps) for key, one in sorted(value.items())}
    if isinstance(value, list):
        return [together(form(one, maps) for one in value)]
    return "null" if value is None else "bool" if isinstance(value, bool) else (
        "number" if isinstance(value, int | float) else "text"
    )  # fmt: skip


def _of_map(value: Any, maps: Iterable[str]) -> Any:
    if isinstance(value, Mapping):
        return {"*": together(form(one, maps) for one in value.values())}
    return form(value, maps)


def together(forms: Iterable[Any]) -> Any:
    """One form for several values."""
    return functools.reduce(_both, forms, "empty")


def _both(one: Any, other: Any) -> Any:
    if one == other or other in ("empty", "null"):
        return one
    if one in ("empty", "null"):
        return other
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _both(one.get(key, "empty"), other.get(key, "empty")) for key in sorted({*one, *other})}
    if isinstance(one, list) and isinstance(other, list):
        return [_both(one[0], other[0])]
    return " or ".join(sorted({*_kinds(one), *_kinds(other)}))


def _kinds(one: Any) -> list[str]:
    return one.split(" or ") if isinstance(one, str) else ["keys" if isinstance(one, dict) else "list"]


class Command:
    """The command line, in this process."""

    def __init__(self) -> None:
        self.argv = sys.argv

    def __call__(self, *arguments: object) -> tuple[int, str]:
        """Exit status and what was printed."""
        out = io.StringIO()
        sys.argv = ["blip2nb", *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue()
        finally:
            sys.argv = self.argv
        raise AssertionError("a command ends with its status")


def statuses_and_json(scratch: Path) -> Iterator[tuple[str, list]]:
    """Every command on a twin, and what goes wrong in it: exit status, and the form of what --json prints."""
    run = Command()
    outputs = scratch / "runs"
    whole, cast, broken = (outputs / name / "model" for name in (OPT, "cast", "broken"))
    pixels = scratch / "image.png"
    from PIL import Image

    Image.new("RGB", (40, 30), (90, 120, 30)).save(pixels)

    def prepared() -> None:
        shutil.copytree(whole, broken)
        (shard,) = broken.glob("*.safetensors")
        data = bytearray(shard.read_bytes())
        data[-3] ^= 16
        shard.write_bytes(data)

    table: list[tuple[str, Callable[[], None] | None, tuple[object, ...]]] = [
        ("variants", None, ("variants",)),
        ("keys", None, ("keys", OPT)),
        ("keys of no variant", None, ("keys", "blip3")),
        ("plan", None, ("plan", OPT, "--output", whole)),
        ("plan of no source", None, ("plan", OPT, "--source", scratch / "nowhere")),
        ("convert", None, ("convert", OPT, "--output", whole)),
        ("convert again", None, ("convert", OPT, "--output", whole)),
        ("convert into another's", None, ("convert", T5, "--output", whole)),
        ("convert, cast", None, ("convert", OPT, "--output", cast, "--dtype", "bfloat16")),
        ("convert of no variant", None, ("convert", "blip3")),
        ("convert --check", None, ("convert", "--check", whole)),
        ("convert --check of a damaged one", prepared, ("convert", "--check", broken)),
        ("verify", None, ("verify", whole, "--no-figures")),
        ("verify, images", None, ("verify", whole, "--no-figures", "--images", pixels, "--proof", "weights")),
        ("verify, weights", None, ("verify", cast, "--no-figures", "--proof", "weights")),
        ("verify, bfloat16", None, ("verify", cast, "--no-figures")),
        ("verify, damaged", None, ("verify", broken, "--no-figures", "--lavis-python", "none")),
        ("verify of nothing", None, ("verify", scratch / "nowhere")),
        ("show", None, ("show", outputs / OPT)),
        ("show of nothing", None, ("show", scratch / "nowhere")),
        ("diff", None, ("diff", outputs / OPT, outputs / "broken")),
        ("figures", None, ("figures", outputs / "broken")),
        ("revert", None, ("revert", whole, "--output", scratch / "back.pth")),
        ("revert over a file", None, ("revert", whole, "--output", scratch / "back.pth")),
        ("push without a token", None, ("push", outputs / OPT, "someone/something")),
        ("clean", None, ("clean", "--output-dir", outputs)),
        ("clean of nothing", None, ("clean", "nothing", "--yes", "--output-dir", outputs)),
        ("clean a model", None, ("clean", "cast/model", "--yes", "--output-dir", outputs)),
        ("doctor", None, ("doctor", "--lavis-python", "none")),
        ("sweep of nothing", None, ("sweep", "blip3")),
        ("sweep of what is there", None, ("sweep", OPT, "--gather", "--output", outputs)),
        ("sweep of what is not all there", None, ("sweep", OPT, T5, "--gather", "--output", outputs)),
    ]
    for name, prepare, arguments in table:
        if prepare is not None:
            prepare()
        status, said = run(*arguments, "--json")
        yield name, [status, form(json.loads(said)) if said.strip() else None]


def twins(converted: Callable[[str], blip2nb.Run], scratch: Path) -> Iterator[tuple[str, Any]]:
    """Of each twin what its report comes to, and a hash over all tensors that are in its directory."""
    for name in TWINS:
        run = converted(name)
        report = _verified(run, scratch / name)
        yield (
            name,
            {
                "verdict": report["verdict"],
                "causes": report["causes"],
                "faults": len(report["faults"]),
                "stages": len(report["stages"]),
                "tensors": tensors_hash(run.model),
                "weights": report["weights"]["weights_hash"],
                "config.json": hashlib.sha256((run.model / "config.json").read_bytes()).hexdigest(),
            },
        )


def _verified(run: blip2nb.Run, folder: Path) -> Any:
    blip2nb.verify(run, figures=False, output=folder, lavis_python="none")
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def tensors_hash(folder: Path) -> str:
    """One SHA-256 over name, dtype, shape and bits of every tensor, by a reader that is not the kit's."""
    found = hashlib.sha256()
    held = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in sorted(held.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def rate(name: str, bench: Bench) -> dict[str, int]:
    """Faults of the catalogue, one place each, drawn by chance: how many were found, and how they were called."""
    fitting = [(fault.name, cases) for fault in CATALOGUE.values() if (cases := bench.cases(fault))]
    chance = random.Random(name)
    chosen = [chance.choice(cases) for _, cases in sorted(chance.sample(fitting, SAMPLE))]
    chosen += pairs(chosen, 1, name)
    marks = [bench.ask(case, seed=7).marks for case in chosen]
    seen = [one for one in marks if one is not None]
    counted = ("detected", "stage", "module", "first", "three", "extra")
    return {"cases": len(marks), "visible": len(seen)} | {
        what: sum(getattr(one, what) for one in seen) for what in counted
    }


def bench_of(run: blip2nb.Run) -> Bench:
    """What faults are planted in."""
    return Bench(run.model, Tape(shipped_tape(run.variant)), lambda: open_source(run.variant))


def read(name: str) -> Any:
    """What was agreed."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    """Write all of it anew."""

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        converted = functools.cache(lambda name: blip2nb.convert(name, output=scratch / "converted" / name / "model"))
        found = {
            "commands": commands(),
            "notebooks": notebooks(),
            "json": dict(statuses_and_json(scratch)),
            "twins": dict(twins(converted, scratch / "proofs")),
            "rates": {name: rate(name, bench_of(converted(name))) for name in (OPT, T5)},
        }
    FOLDER.mkdir(exist_ok=True)
    for name, content in found.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
