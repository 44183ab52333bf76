"""What takes space: runs, unfinished work, twins and downloads. Listing it, and removing what was named.

Nothing is removed but what this kit wrote, by its names; no link is followed; and nothing that another process is
writing at the moment is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from blip2nb.errors import RequestError
from blip2nb.forms import reads
from blip2nb.nearest import did_you_mean
from blip2nb.report.manifest import MANIFEST
from blip2nb.report.outputs import ItemRow
from blip2nb.report.runs import RunPaths, outputs_folder
from blip2nb.report.sweep import Outcome
from blip2nb.sizes import as_bytes
from blip2nb.sweeps.place import HIDDEN, RECORD
from blip2nb.variants import RELEASED, variant
from blip2nb.weights.download import cache_folder, locate
from blip2nb.weights.transfer import leftovers
from blip2nb.weights.writer import JOURNAL

MODELS, UNFINISHED, TWINS, DOWNLOADS = "models", "unfinished", "twins", "downloads"
_IN_USE = "another process is writing it now"
_LINKED = "it is, or is behind, a link to another place, which is not followed"


class _Kind(NamedTuple):
    """Something that the kit writes: a pattern of its names, the item that it is part of, and that item's group."""

    names: str
    item: str
    group: str
    what: str


_HIDDEN = re.compile(r"\.(.+)\.(partial|old|removed|lock)")  # beside a directory that is written or removed whole
_MODEL = _Kind("model", "model", MODELS, "converted model")
_TAPE = _Kind(r"tape(-images)?\.safetensors", "tape", "", "reference recording")
_FILES = r"(report|run|sweep)\.json|report\.html|(arrays|activations)\.safetensors|lavis\.ipynb|figures|request"
_REST = _Kind(_FILES, "rest", "", "report and figures")
_UNFINISHED = _Kind(f"{_HIDDEN.pattern}|{re.escape(HIDDEN)}", UNFINISHED, UNFINISHED, "unfinished work")
_LEFT = _UNFINISHED._replace(
    names=rf"({_TAPE.names}|{_FILES}|\..+\.pth)\.partial|\.(model|figures|request)\.(partial|old|removed|lock)"
)
_RUN = (_MODEL, _TAPE, _REST, _LEFT)
_TWINS = (
    _Kind(r"tiny-.+-r\d+", TWINS, "", "twins, made again where needed"),
    _UNFINISHED._replace(item=f"{TWINS}/{UNFINISHED}"),
)
_LANGUAGE = "|".join(re.escape(variant(name).language_folder) for name in RELEASED)
_HUB = (_Kind(_LANGUAGE, r"\g<0>", "", "downloaded language model"), _UNFINISHED)


@dataclasses.dataclass(frozen=True)
class Item:
    """Something that takes space.

    Attributes:
        name: what to call it by, such as tiny-blip2-opt-2.7b/model.
        group: models or unfinished; "" for all else.
        what: the same in words.
        size: bytes.
        paths: the files and folders it consists of.
        root: the outputs folder, or the cache, that all of them are in.
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


def choose(items: Sequence[Item], names: Iterable[str], models: bool = False) -> tuple[list[Item], list[Item]]:
    """The items that are meant: those that may be removed, and those that are kept though a name covers them.

    Args:
        names: an item's name; or a run's; or `unfinished`; or a path in the outputs folder, which is needed for a run
            that is called as something else is.
        models: also the converted models of all runs.

    Raises:
        RequestError: a name is nobody's or means several things, or all that it names is kept.
    """
    chosen = [item for item in items if models and item.group == MODELS]
    for name in names:
        chosen += _meant(items, name)
    once = list(dict.fromkeys(chosen))
    return [item for item in once if not item.kept], [item for item in once if item.kept]


def _meant(items: Sequence[Item], name: str) -> list[Item]:
    path, short = Path(name).expanduser().absolute(), name.rstrip("/")
    path = path.parent.resolve() / path.name
    inside = [item for item in items if "/" in name and path.exists() and path.is_relative_to(item.root)]
    sure = [item for item in inside if _covers(path.relative_to(item.root).as_posix(), item)]
    sure = sure or [item for item in items if item.group == short == UNFINISHED]
    found = sure or [item for item in items if _covers(short, item)]
    if not found:
        hint = did_you_mean(short, [item.name for item in items])
        raise RequestError(f"There is nothing called {name!r} to remove.{hint} `blip2nb clean` lists what there is.")
    if all(item.kept for item in found):
        raise RequestError(f"{found[0].name} was not removed: {found[0].kept}.")
    if not sure and len({item.root for item in found}) > 1:
        raise RequestError(
            f"{name!r} means several things. Say which: by a path, {found[0].root / short}, or one by one."
        )
    return found


def _covers(name: str, item: Item) -> bool:
    return bool(name) and (name == item.name or item.name.startswith(f"{name}/"))


def remove(items: Sequence[Item]) -> int:
    """Remove items, and the folders they leave empty. Returns the number of bytes freed.

    A directory loses its name before its first file goes, so that what looks whole is whole.

    Raises:
        RequestError: an item is kept, another process is writing it by now, or it cannot be removed.
    """
    for item in items:
        kept = item.kept or (_LINKED if any(map(_is_linked, item.paths)) else "")
        if kept:
            raise RequestError(f"{item.name} was not removed: {kept}.")
        try:
            with contextlib.ExitStack() as held:
                for lock in item.locks:
                    held.enter_context(FileLock(lock, blocking=False))
                    held.callback(lock.unlink, missing_ok=True)
                for path in item.paths:
                    if path not in item.locks:  # those go last
                        _remove(path)
        except Timeout as error:
            raise RequestError(f"{item.name} was not removed: {_IN_USE}.") from error
        except OSError as error:
            raise RequestError(
                f"{error.filename or item.name} cannot be removed ({error.strerror or error}). "
                "Remove it by hand, or as the user who wrote it."
            ) from error
        for folder in {path.parent for path in item.paths} - {item.root}:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
    return sum(item.size for item in items)


def _remove(path: Path) -> None:
    if path.is_dir():
        nameless = path.with_name(f".{_stage(path)[0]}.removed")
        if nameless.exists() and nameless != path:
            shutil.rmtree(nameless)
        shutil.rmtree(path.rename(nameless))
    else:
        path.unlink(missing_ok=True)


def remove_model(run: RunPaths) -> None:
    """Remove a run's converted model and nothing else.

    Raises:
        RequestError: what stands there is not a conversion of this kit.
    """
    folder = run.model.parent.resolve()
    remove([_item(str(run.model), MODELS, _MODEL.what, [folder / run.model.name], folder)])


def table(items: Sequence[Item]) -> str:
    """The items with their sizes, and the sum of them."""
    described = [item.what + (f" (kept: {item.kept})" if item.kept else "") for item in items]
    rows = [(item.name, as_bytes(item.size), what) for item, what in zip(items, described, strict=True)]
    rows.append(("total", as_bytes(sum(item.size for item in items)), ""))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {size:>7}  {what}".rstrip() for name, size, what in rows)


# -- the survey


def survey(output_dir: str | Path = "") -> list[Item]:
    """Everything that takes space, in the outputs folder and in the caches. Changes nothing."""
    return [*_outputs(outputs_folder(output_dir).resolve()), *_cache(cache_folder().resolve()), *_other_caches()]


def _outputs(outputs: Path) -> Iterator[Item]:
    items, other = _sort(outputs, "", (_UNFINISHED,), outputs)
    for folder in filter(Path.is_dir, other):
        if folder.is_symlink():
            yield _item(folder.name, "", "a link", [folder], outputs)
        elif (folder / MANIFEST).is_file():  # `convert --output` has put a model itself here
            yield _item(_name(folder), MODELS, _MODEL.what, [folder], outputs)
        else:
            yield from _folder(folder, outputs)
    yield from items


def _folder(folder: Path, outputs: Path) -> Iterator[Item]:
    """What a run's folder holds, or another one."""
    kinds = (*_RUN, *_of_a_sweep(folder)) if _is_run(folder) else (_LEFT,)
    items, other = _sort(folder, f"{folder.name}/", kinds, outputs)
    yield from items
    if other:
        why = f"it is not of this kit: {', '.join(path.name for path in other[:3])}"
        yield _item(f"{folder.name}/other", "", "something else", other, outputs, kept=why)


def _is_run(folder: Path) -> bool:
    marks = (f"model/{MANIFEST}", "report.json", "run.json", RECORD)
    return any((folder / mark).is_file() for mark in marks) or any(map(_is_tape, folder.glob("tape*.safetensors")))


def _is_tape(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as file:
            return "blip2nb" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _of_a_sweep(run: Path) -> Iterator[_Kind]:
    """The executed notebook that a sweep's record names."""
    with contextlib.suppress(OSError, ValueError):
        yield _REST._replace(names=re.escape(reads(Outcome, (run / RECORD).read_bytes()).executed))


def _cache(cache: Path) -> Iterator[Item]:
    """The kit's own cache."""
    yield from _sort(cache / "twins", "", _TWINS, cache)[0]
    for name in dict.fromkeys(["eva_vit_g.pth", *(variant(name).checkpoint for name in RELEASED)]):
        yield from _download(cache / "lavis" / name, cache)
    yield from _sort(cache / "hub", f"{DOWNLOADS}/", _HUB, cache)[0]


def _download(path: Path, cache: Path) -> Iterator[Item]:
    lock = path.with_name(f"{path.name}.lock")
    if path.is_file():
        yield _item(f"{DOWNLOADS}/{path.name}", "", "downloaded file", [path], cache, [lock])
    left = [one for one in (*leftovers(path), lock) if one.is_file()]
    if left:
        yield _item(f"{DOWNLOADS}/{left[0].name}", UNFINISHED, "unfinished download", left, cache, [lock])


def _other_caches() -> Iterator[Item]:
    """What the kit would read in the caches of LAVIS and Hugging Face. They are not the kit's to remove from."""
    found = {part.path: (part, variant(name)) for name in RELEASED for part in locate(variant(name)) if part.here}
    for path, (part, model) in found.items():
        if path.is_relative_to(cache_folder()):
            continue
        name, why = f"lavis/{part.name}", "delete it by hand if LAVIS does not need it"
        if part.name.endswith("/"):
            name, why = f"huggingface/{part.name[:-1]}", f"`hf cache rm model/{model.language_model}` removes it"
        yield Item(name, "", f"in {part.where}", part.size or 0, (path,), path.parent, kept=why)


# -- items


def _sort(folder: Path, prefix: str, kinds: Iterable[_Kind], root: Path) -> tuple[list[Item], list[Path]]:
    """The items in a folder, in the order of the kinds, and the paths that are of no kind."""
    rest = sorted(folder.iterdir()) if folder.is_dir() else []
    found: dict[str, tuple[_Kind, list[Path]]] = {}
    for kind in kinds:
        for path in rest[:]:
            if match := re.fullmatch(kind.names, _name(path)):
                found.setdefault(prefix + match.expand(kind.item), (kind, []))[1].append(path)
                rest.remove(path)
    items = [_item(name, kind.group, kind.what, paths, root) for name, (kind, paths) in found.items()]
    return items, rest


def _name(path: Path) -> str:
    """A path's name; of a directory's only copy, set aside by a conversion that was killed, the directory's, since the
    next one puts it back; "" of what is named like a part of the kit's work, and is none."""
    target, stage = _stage(path)
    if stage == "old" and path.is_dir() and not path.with_name(target).exists():
        return target
    if stage == "partial" and not target.endswith(".pth"):
        return path.name if any((path / mark).is_file() for mark in (JOURNAL, MANIFEST)) else ""
    return path.name if stage in ("", "partial", "lock") or path.is_dir() else ""


def _stage(path: Path) -> tuple[str, str]:
    """The name of the directory that a hidden path stands beside, and what it is to it; or its own name and ""."""
    match = _HIDDEN.fullmatch(path.name)
    return (match[1], match[2]) if match else (path.name, "")


def _lock(path: Path) -> Path:
    """What whoever writes a directory holds."""
    return path / "lock" if path.name == HIDDEN else path.with_name(f".{_stage(path)[0]}.lock")


def _item(
    name: str, group: str, what: str, paths: Sequence[Path], root: Path, locks: Sequence[Path] = (), kept: str = ""
) -> Item:
    locks = locks or list(dict.fromkeys(_lock(path) for path in paths if path.is_dir() or path.suffix == ".lock"))
    if group == MODELS and not (paths[0] / MANIFEST).is_file():
        kept = "it is not a conversion of this kit"
    kept = kept or (_IN_USE if any(map(_is_held, locks)) else _LINKED if any(map(_is_linked, paths)) else "")
    return Item(name, group, what, sum(map(_size, paths)), tuple(paths), root, tuple(locks), kept)


def _is_linked(path: Path) -> bool:
    """Whether a path is, or is behind, a link. The roots are resolved: without a link it is what it resolves to."""
    return path.resolve() != path


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a folder. Links count for themselves."""
    try:
        return sum(map(_size, path.iterdir())) if path.is_dir() and not path.is_symlink() else path.lstat().st_size
    except OSError:  # gone by now, or not to be looked into
        return 0


def _is_held(lock: Path) -> bool:
    """Whether another process holds a lock. One that does not exist is not made."""
    try:
        if lock.is_file():
            with FileLock(lock, blocking=False):
                pass
    except OSError:  # Timeout is one; and what is not ours to lock is not ours to remove
        return True
    return False
