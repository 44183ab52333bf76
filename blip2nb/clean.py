"""What takes space: runs, unfinished work, twins and downloads. Listing it, and removing what was named.

Nothing is removed but what this kit wrote, by its names; no link is followed; and nothing that another process is
writing at the moment is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from blip2nb.errors import RequestError
from blip2nb.report.manifest import MANIFEST
from blip2nb.report.outputs import ItemRow
from blip2nb.report.runs import RunPaths, outputs_folder
from blip2nb.sweeps.place import HIDDEN, RECORD
from blip2nb.variants import RELEASED, variant
from blip2nb.weights.download import cache_folder, locate
from blip2nb.weights.transfer import leftovers
from blip2nb.weights.writer import JOURNAL

MODELS, UNFINISHED, TWINS, DOWNLOADS = "models", "unfinished", "twins", "downloads"
_LAVIS, _HUGGING_FACE = "lavis", "huggingface"
_TAKEN = (MODELS, UNFINISHED, TWINS, DOWNLOADS, _LAVIS, _HUGGING_FACE)  # a run may be called so too

_TAPES = ("tape.safetensors", "tape-images.safetensors")
_REST = (
    "report.json",
    "arrays.safetensors",
    "activations.safetensors",
    "report.html",
    "figures",
    "run.json",
    "lavis.ipynb",
    "request",
)
_HIDDEN = re.compile(r"\.(.+)\.(partial|old|removed|lock)")  # beside a directory that is written or removed whole
_TWIN = re.compile(r"tiny-.+-r\d+")


@dataclasses.dataclass(frozen=True)
class Item:
    """Something that takes space.

    Attributes:
        name: what to call it by, such as tiny-blip2-opt-2.7b/model.
        group: what else it is found by; "" for nothing.
        what: the same in words.
        size: bytes.
        paths: the files and folders it consists of.
        root: the folder that all of them must really be in.
        locks: the lock files that whoever writes it holds.
        kept: why it is never removed; "" for what may be.
    """

    name: str
    group: str
    what: str
    size: int
    paths: tuple[Path, ...]
    root: Path
    locks: tuple[Path, ...] = ()
    kept: str = ""

    @property
    def row(self) -> ItemRow:
        """The same as --json prints it."""
        return ItemRow(self.name, self.what, self.size, tuple(map(str, self.paths)), self.kept)


def survey(output_dir: str | Path = "") -> list[Item]:
    """Everything that takes space, in the outputs folder and in the caches. Changes nothing."""
    return [*_outputs(outputs_folder(output_dir)), *_cache(cache_folder()), *_other_caches()]


def choose(
    items: Sequence[Item], names: Iterable[str], models: bool = False, output_dir: str | Path = ""
) -> tuple[list[Item], list[Item]]:
    """The items that are meant: those that may be removed, and those that are kept though a name covers them.

    Args:
        names: an item's name; or what its name begins with, up to a slash; or its group; or a path in the outputs
            folder.
        models: also the converted models of all runs.

    Raises:
        RequestError: a name is nobody's, or all that it names is kept.
    """
    chosen = [item for item in items if models and item.group == MODELS]
    for name in names:
        short = _short(name, outputs_folder(output_dir))
        found = [item for item in items if _is_meant(item, short)]
        if not found:
            near = difflib.get_close_matches(short, [item.name for item in items], n=1, cutoff=0.6)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RequestError(
                f"There is nothing called {name!r} to remove.{hint} `blip2nb clean` lists what there is."
            )
        if all(item.kept for item in found):
            raise RequestError(f"{found[0].name} was not removed: {found[0].kept}.")
        chosen += found
    once = list(dict.fromkeys(chosen))
    return [item for item in once if not item.kept], [item for item in once if item.kept]


def _short(name: str, outputs: Path) -> str:
    """A name as the items have it, of what may have been completed to a path."""
    path, outputs = Path(name).expanduser().absolute(), outputs.resolve()
    path = path.parent.resolve() / path.name
    if "/" in name and path.exists() and path.is_relative_to(outputs) and path != outputs:
        parts = path.relative_to(outputs).parts
        name = "/".join([_run_name(parts[0]), *parts[1:]])
    return name.rstrip("/")


def _run_name(folder: str) -> str:
    return f"./{folder}" if folder in _TAKEN else folder


def _is_meant(item: Item, name: str) -> bool:
    return bool(name) and (name in (item.name, item.group) or item.name.startswith(f"{name}/"))


def remove(items: Iterable[Item]) -> int:
    """Remove items, and the folders they leave empty. Returns the number of bytes freed.

    A directory loses its name before its first file goes, so that what looks whole is whole.

    Raises:
        RequestError: an item is kept, another process is writing it by now, or it cannot be removed.
    """
    freed = 0
    for item in items:
        if item.kept:
            raise RequestError(f"{item.name} was not removed: {item.kept}.")
        try:
            with _alone(item):
                for path in item.paths:
                    _require_inside(path, item.root)
                    size = _size(path)
                    _remove(path)
                    freed += size
        except OSError as error:
            raise RequestError(
                f"{error.filename or item.name} cannot be removed ({error.strerror or error}). "
                "Remove it by hand, or as the user who wrote it."
            ) from error
        for folder in {path.parent for path in item.paths} - {item.root}:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
    return freed


def remove_model(run: RunPaths) -> None:
    """Remove a run's converted model and nothing else.

    Raises:
        RequestError: what stands there is not a conversion of this kit.
    """
    remove([_model(run.model, str(run.model), run.model.parent)])


def human(size: int) -> str:
    """Bytes as people read them, in the decimal units of disks."""
    amount, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.5 else f"{amount:.1f} {unit}"


def table(items: Sequence[Item]) -> str:
    """The items with their sizes, and the sum of them."""
    rows = [(item.name, human(item.size), item.what + (f" (kept: {item.kept})" if item.kept else "")) for item in items]
    rows.append(("total", human(sum(item.size for item in items)), ""))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {size:>7}  {what}".rstrip() for name, size, what in rows)


# -- the outputs folder


def _outputs(outputs: Path) -> Iterator[Item]:
    if not outputs.is_dir():
        return
    for path in sorted(outputs.iterdir()):
        name = _run_name(path.name)
        if path.is_symlink():
            if path.is_dir():
                yield _item(name, "", "a link", [path], outputs)
        elif path.name == HIDDEN:
            yield _item(HIDDEN, UNFINISHED, "unfinished runs of a sweep", [path], outputs, [path / "lock"])
        elif path.is_dir() and not _HIDDEN.fullmatch(path.name):
            yield from _run(path, name, outputs)
    yield from _unfinished(outputs, "", outputs)


def _run(folder: Path, name: str, outputs: Path) -> Iterator[Item]:
    """What a folder in the outputs folder holds."""
    unfinished = list(_unfinished(folder, f"{name}/", outputs))
    if (folder / MANIFEST).is_file():  # `convert --output` has put a model itself here
        yield _model(folder, name, outputs)
    elif _is_run(folder):
        yield from _parts(folder, name, outputs)
    elif not unfinished or _left_over(folder, [path for item in unfinished for path in item.paths]):
        yield _item(name, "", "not ours", [folder], outputs, kept="it is not a run of this kit")
    yield from unfinished


def _is_run(folder: Path) -> bool:
    marks = (f"model/{MANIFEST}", "report.json", "run.json", RECORD)
    return any((folder / mark).is_file() for mark in marks) or any(_is_tape(folder / tape) for tape in _TAPES)


def _is_tape(path: Path) -> bool:
    """Whether a file's header is a recording's."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return length < 100_000_000 and "blip2nb" in json.loads(file.read(length)).get("__metadata__", {})
    except (OSError, ValueError, AttributeError):
        return False


def _parts(folder: Path, name: str, outputs: Path) -> Iterator[Item]:
    model = folder / "model"
    tapes = [folder / tape for tape in _TAPES if (folder / tape).exists()]
    rest = [folder / one for one in (*_REST, *_of_a_sweep(folder)) if (folder / one).exists()]
    known = [model, *tapes, *rest]
    if model.exists() or model.is_symlink():
        yield _model(model, f"{name}/model", outputs)
    if tapes:
        yield _item(f"{name}/tape", "", "reference recording", tapes, outputs)
    if rest:
        yield _item(f"{name}/rest", "", "report and figures", rest, outputs)
    other = _left_over(folder, [*known, *(path for path in folder.iterdir() if _HIDDEN.fullmatch(path.name))])
    if other:
        why = f"it is not of this kit: {', '.join(sorted(path.name for path in other)[:3])}"
        yield _item(f"{name}/other", "", "something else", other, outputs, kept=why)


def _of_a_sweep(folder: Path) -> tuple[str, ...]:
    """What a sweep adds to a run: its record, and the executed notebook that it names."""
    try:
        return RECORD, Path(json.loads((folder / RECORD).read_text(encoding="utf-8"))["executed"]).name or RECORD
    except (OSError, ValueError, KeyError, TypeError):
        return (RECORD,)


def _left_over(folder: Path, known: Iterable[Path]) -> list[Path]:
    names = {path.name for path in known}
    return [path for path in folder.iterdir() if path.name not in names and not _is_partial(path)]


def _model(folder: Path, name: str, root: Path) -> Item:
    ours = (folder / MANIFEST).is_file()
    kept = "" if ours or folder.is_symlink() else "it is not a conversion of this kit"
    return _item(name, MODELS, "converted model", [folder], root, [_lock_beside(folder)], kept)


def _is_partial(path: Path) -> bool:
    """Whether a file in a run's folder is one of the kit's on its way, left by something that was killed."""
    whole = path.name.removesuffix(".partial")
    return whole != path.name and (whole in (*_TAPES, *_REST) or (whole.startswith(".") and whole.endswith(".pth")))


def _unfinished(folder: Path, prefix: str, root: Path) -> Iterator[Item]:
    """Unfinished directories in a folder, with what else their runs have left, and unfinished files."""
    if folder.is_symlink():
        return
    found = sorted(folder.iterdir())
    targets = dict.fromkeys(match[1] for path in found if (match := _HIDDEN.fullmatch(path.name)))
    for target in targets:
        if target.endswith(".pth"):
            continue
        place = folder / target
        partial, old, removed, lock = (
            place.with_name(f".{target}.{what}") for what in ("partial", "old", "removed", "lock")
        )
        paths = [partial] if partial.is_dir() and _is_ours(partial) else []
        if old.is_dir() and not place.exists():  # the only copy: the next conversion puts it back
            what = "converted model, set aside by a run that was killed"
            yield _item(f"{prefix}{old.name}", MODELS, what, [old], root, [lock])
        elif old.is_dir():
            paths.append(old)
        paths += [removed] if removed.is_dir() else []
        paths += [lock] if lock.is_file() else []
        if paths:
            yield _item(f"{prefix}{paths[0].name}", UNFINISHED, "unfinished directory", paths, root, [lock])
    for path in found:
        if path.is_file() and _is_partial(path):
            yield _item(f"{prefix}{path.name}", UNFINISHED, "unfinished file", [path], root)


def _is_ours(partial: Path) -> bool:
    return any((partial / name).is_file() for name in (JOURNAL, MANIFEST)) or not any(partial.iterdir())


# -- the caches


def _cache(cache: Path) -> Iterator[Item]:
    """The kit's own cache."""
    folder = cache / "twins"
    if folder.is_dir():
        twins = sorted(path for path in folder.iterdir() if path.is_dir() and _TWIN.fullmatch(path.name))
        if twins:
            what = f"{len(twins)} {'twin' if len(twins) == 1 else 'twins'}, made again where needed"
            yield _item("twins", TWINS, what, twins, cache, [_lock_beside(twin) for twin in twins])
        yield from _unfinished(folder, "twins/", cache)
    models = [variant(name) for name in RELEASED]
    for name in dict.fromkeys(["eva_vit_g.pth", *(model.checkpoint for model in models)]):
        yield from _download(cache / "lavis" / name, cache)
    for name in dict.fromkeys(model.language_folder for model in models):
        if (cache / "hub" / name).is_dir():
            yield _item(f"{DOWNLOADS}/{name}", DOWNLOADS, "downloaded language model", [cache / "hub" / name], cache)


def _download(path: Path, cache: Path) -> Iterator[Item]:
    lock = path.with_name(f"{path.name}.lock")
    if path.is_file():
        yield _item(f"{DOWNLOADS}/{path.name}", DOWNLOADS, "downloaded file", [path], cache, [lock])
    left = [one for one in (*leftovers(path), lock) if one.is_file()]
    if left:
        yield _item(f"{DOWNLOADS}/{left[0].name}", UNFINISHED, "unfinished download", left, cache, [lock])


def _other_caches() -> Iterator[Item]:
    """What the kit would read in the caches of LAVIS and Hugging Face. They are not the kit's to remove from."""
    found = {part.path: (part, variant(name)) for name in RELEASED for part in locate(variant(name)) if part.here}
    for path, (part, model) in found.items():
        if path.is_relative_to(cache_folder()):
            continue
        name, why = f"{_LAVIS}/{part.name}", "delete it by hand if LAVIS does not need it"
        if part.name.endswith("/"):
            name, why = f"{_HUGGING_FACE}/{part.name[:-1]}", f"`hf cache rm model/{model.language_model}` removes it"
        yield Item(name, "", f"in {part.where}", part.size or 0, (path,), path.parent, kept=why)


# -- one item


def _item(
    name: str,
    group: str,
    what: str,
    paths: Sequence[Path],
    root: Path,
    locks: Sequence[Path] = (),
    kept: str = "",
) -> Item:
    if not kept and any(_is_held(lock) for lock in locks):
        kept = "another process is writing it now"
    if not kept and any(not _is_inside(path, root) for path in paths):
        kept = "it is, or is behind, a link to another place, which is not followed"
    return Item(name, group, what, sum(map(_size, paths)), tuple(paths), root, tuple(locks), kept)


def _is_inside(path: Path, root: Path) -> bool:
    """Whether a path is where it says, with no link between the root and it."""
    return path.resolve() == root.resolve() / path.relative_to(root)


def _require_inside(path: Path, root: Path) -> None:
    if not _is_inside(path, root):
        raise RequestError(f"{path} was not removed: it is, or is behind, a link to another place.")


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a folder. Links count for themselves."""
    try:
        return sum(map(_size, path.iterdir())) if path.is_dir() and not path.is_symlink() else path.lstat().st_size
    except OSError:  # gone by now, or not to be looked into
        return 0


def _lock_beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _is_held(lock: Path) -> bool:
    """Whether another process holds a lock. One that does not exist is not made."""
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to lock, so not ours to remove
        return True


@contextlib.contextmanager
def _alone(item: Item) -> Iterator[None]:
    """Hold an item's locks; they disappear with it."""
    with contextlib.ExitStack() as stack:
        for lock in item.locks:
            try:
                stack.enter_context(FileLock(lock, blocking=False))
            except Timeout as error:
                raise RequestError(f"{item.name} was not removed: another process is writing it now.") from error
            stack.callback(lock.unlink, missing_ok=True)
        yield


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    hidden = path if _HIDDEN.fullmatch(path.name) else path.with_name(f".{path.name}.removed")
    if hidden != path:
        if hidden.exists():
            shutil.rmtree(hidden)
        path.rename(hidden)
    shutil.rmtree(hidden)
