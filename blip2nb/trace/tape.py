"""A tape: what a reference model took in and gave out at named places, in one safetensors file.

Needs `vocabulary.py` beside it and nothing else of this kit, so that it can record where the reference lives: torch and
safetensors only, Python 3.8. Places are written `path.of.a.module` (its output) or `path.of.a.module:argument` (what it
was handed under that name); `path.of.a.module:0` is its first argument, whatever that is called.
"""

import contextlib
import copy
import inspect
import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import save_file

if __package__:
    from blip2nb.trace.vocabulary import MIXED, role_of
else:  # copied to where the reference is
    from vocabulary import MIXED, role_of  # type: ignore[no-redef]

FORMAT = 3

SAMPLE = 32
"""So many positions are kept of what a module inside a stage took in and gave out, where each is computed alone.
Chosen: any few show a fault, and more make a larger tape; the stage itself is compared at all of them."""


def split_place(place):
    """("module.path", "argument") or ("module.path", None) for a module's output."""
    path, _, argument = place.partition(":")
    return path, argument or None


def first_tensor(value):
    """A module's main output: itself if it is a tensor, else the first tensor in the tuple, list or dict."""
    if isinstance(value, torch.Tensor) or value is None:
        return value
    for part in value.values() if hasattr(value, "values") else value:
        if isinstance(part, torch.Tensor):
            return part
    raise TypeError("no tensor in a {}".format(type(value).__name__))


def with_first(output, value):
    """A module's output with its first tensor replaced, in that tensor's dtype and on its device."""
    if isinstance(output, torch.Tensor):
        return value.to(output.device, output.dtype)
    if hasattr(output, "values"):
        name = next(name for name, one in output.items() if isinstance(one, torch.Tensor))
        replaced = copy.copy(output)
        replaced[name] = value.to(output[name].device, output[name].dtype)
        return replaced
    at = next(number for number, one in enumerate(output) if isinstance(one, torch.Tensor))
    return (*output[:at], value.to(output[at].device, output[at].dtype), *output[at + 1 :])


@contextlib.contextmanager
def recording(model, places, samples=()):
    """Record places of `model` while the block runs; only the first call of each module counts.

    Args:
        model: any torch module. Its forward code runs as it is; each module's `forward` is called through a wrapper
            for as long as the block lasts, which works in every version of torch.
        places: iterable of places, each kept whole.
        samples: more places, of which `SAMPLE` positions are enough. Kept whole all the same where positions are mixed
            afterwards: what an attention takes in, queries, keys and values, and look-ups.

    Yields:
        dict place -> tensor (detached copy, on the CPU), filled as the model runs. An argument that was None or not
        a tensor is left out.

    Raises:
        AttributeError: the model has no such module.
        TypeError: the module's forward has no such argument.
    """
    wanted = {}  # type: dict
    for place in samples:
        path, argument = split_place(place)
        wanted.setdefault(path, {})[argument] = _thinned(path, model.get_submodule(path), argument)
    for place in places:
        path, argument = split_place(place)
        wanted.setdefault(path, {})[argument] = False
    by_module = {}  # type: dict
    for path, arguments in wanted.items():
        by_module.setdefault(model.get_submodule(path), []).append((path, arguments))
    out = {}  # type: dict
    wrapped = []
    try:
        for module, named in by_module.items():
            own = vars(module).get("forward")  # some libraries put one on the instance; it must come back
            _wrap(module, named, out)
            wrapped.append((module, own))
        yield out
    finally:
        for module, own in wrapped:
            del module.forward
            if own is not None:
                module.forward = own


def _thinned(path, module, argument):
    """Whether what happens at one position depends on that position alone, also in what comes after."""
    if role_of(path) in MIXED or isinstance(module, torch.nn.Embedding):
        return False
    return argument is None or "att" not in path.rpartition(".")[2].lower()


def _wrap(module, named, out):
    original = module.forward
    signature = inspect.signature(original)
    for path, arguments in named:
        for argument in arguments:
            if argument not in (None, "0", *signature.parameters):
                raise TypeError("{}.forward has no argument {!r}, only {}".format(path, argument, signature))

    def forward(*args, **kwargs):
        bound = signature.bind(*args, **kwargs).arguments
        for path, arguments in named:
            for argument, thin in arguments.items():
                if argument is not None:
                    value = next(iter(bound.values()), None) if argument == "0" else bound.get(argument)
                    _keep(out, "{}:{}".format(path, argument), value, thin)
        result = original(*args, **kwargs)
        for path, arguments in named:
            if None in arguments:
                _keep(out, path, first_tensor(result), arguments[None])
        return result

    module.forward = forward


def _keep(out, place, value, thin):
    if isinstance(value, torch.Tensor) and place not in out:
        out[place] = (sample(value) if thin else value).detach().to("cpu", copy=True).contiguous()


def sample(value):
    """`SAMPLE` positions of a tensor (…, positions, channels), evenly spaced; the whole of a smaller one."""
    return value[..., sample_rows(value.shape[-2]), :] if value.dim() > 1 else value


def sample_rows(positions):
    """Which of so many positions `sample` keeps."""
    return [n * positions // SAMPLE for n in range(SAMPLE)] if positions > SAMPLE else list(range(positions))


@contextlib.contextmanager
def first_call(module):
    """The arguments with which `module` is first called while the block runs.

    Yields:
        dict argument -> value, empty until then. Tensors are copies, and what `**` collects stands under its own names.
    """
    given = {}  # type: dict
    signature = inspect.signature(module.forward)
    collected = [name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD]

    own, original = vars(module).get("forward"), module.forward

    def forward(*args, **kwargs):
        if not given:
            bound = dict(signature.bind(*args, **kwargs).arguments)
            for name in collected:
                bound.update(bound.pop(name, {}))
            given.update((name, _copied(value)) for name, value in bound.items())
        return original(*args, **kwargs)

    module.forward = forward
    try:
        yield given
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _copied(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def attributes(model):
    """The plain numbers, words and flags that each module carries: where eps, scales and head counts are found."""
    out = {}
    for path, module in model.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and name != "training" and isinstance(value, (bool, int, float, str))
        }
        if plain:
            out[path] = plain
    return out


def save_tape(path, tensors, metadata=None, parts=()):
    """Write a tape whole or not at all. Equal tensors are stored once.

    Args:
        tensors: name -> tensor.
        metadata: anything JSON can hold; `Tape.metadata` gives it back.
        parts: (prefix, path) of smaller tapes that this one takes in, with the prefix before each of their names: so
            that what is recorded in turns need not be in memory at once. `take.<n>/` is how `Tape.take` finds a take.
    """
    stored, aliases = {}, {}
    seen = {}  # type: dict
    for name, tensor in tensors.items():
        key = (tensor.dtype, tuple(tensor.shape), tensor.flatten().view(torch.uint8).numpy().tobytes())
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            stored[name] = tensor
    text = json.dumps({"format": FORMAT, "aliases": aliases, "tape": metadata or {}})
    temporary = "{}.partial".format(path)
    save_file(stored, temporary, metadata={"blip2nb": text})
    if parts:
        joined = "{}.joined".format(path)
        _join([("", temporary), *parts], joined)
        os.replace(joined, temporary)
    os.replace(temporary, path)


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def _join(parts, path):
    """One safetensors file of several, byte by byte. The widest numbers come first, so that all lie where they may."""
    rows, aliases, heads = [], {}, []  # type: list, dict, list
    for prefix, source in parts:
        with open(source, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size).decode())
        heads.append(json.loads(header.pop("__metadata__")["blip2nb"]))
        aliases.update((prefix + name, prefix + other) for name, other in heads[-1]["aliases"].items())
        for name, about in header.items():
            rows.append((prefix + name, about, source, 8 + size + about["data_offsets"][0]))
    rows.sort(key=lambda row: -_BYTES.get(row[1]["dtype"], 1))
    text = json.dumps(dict(heads[0], aliases=aliases))
    header, end = {"__metadata__": {"blip2nb": text}}, 0  # type: ignore[var-annotated]
    for name, about, _, _ in rows:
        start, end = end, end + about["data_offsets"][1] - about["data_offsets"][0]
        header[name] = dict(about, data_offsets=[start, end])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for _, about, source, at in rows:
            with open(source, "rb") as file:
                file.seek(at)
                out.write(file.read(about["data_offsets"][1] - about["data_offsets"][0]))


class Tape:
    """A tape on disk; tensors are read when asked for.

    Attributes:
        metadata: provenance and whatever else was recorded beside the tensors.
    """

    def __init__(self, path):
        self.path = str(path)
        try:
            with safe_open(self.path, framework="pt") as file:
                head = json.loads((file.metadata() or {})["blip2nb"])
                self._stored = set(file.keys())
        except FileNotFoundError:
            raise
        except Exception as error:  # the library raises its own, KeyError and ValueError are ours
            raise ValueError("{} is not a tape, or not a whole one ({}). Record it again.".format(path, error))
        if head["format"] != FORMAT:
            raise ValueError(
                "{} is a tape of format {}, this version reads {}. Record it again.".format(
                    path, head["format"], FORMAT
                )
            )
        self.metadata = head["tape"]
        self._aliases = head["aliases"]
        self._file = None

    def __contains__(self, name):
        return name in self._stored or name in self._aliases

    def __getitem__(self, name):
        """The recorded tensor. Raises KeyError if there is none of that name."""
        if self._file is None:  # opening reads the list of all tensors, which takes longer than most of them
            self._file = safe_open(self.path, framework="pt")
        return self._file.get_tensor(self._aliases.get(name, name) if name in self else _no_tensor(self.path, name))

    def names(self):
        return sorted(self._stored | set(self._aliases))

    @property
    def takes(self):
        """How many takes it holds: the first, under plain names, and those under `take.<n>/`."""
        return 1 + len({name.partition("/")[0] for name in self.names() if name.startswith("take.")})

    def take(self, number):
        """What was recorded of one take, place -> tensor, read at once. The first is 0, which every tape has.

        Raises:
            KeyError: there is no such take.
        """
        if not 0 <= number < self.takes:
            _no_tensor(self.path, "take.{}".format(number))
        prefix = "take.{}/".format(number) if number else ""
        names = [name for name in self.names() if name.startswith(prefix or ("take.", "image.")) == bool(number)]
        read = {}  # type: dict
        with safe_open(self.path, framework="pt") as file:
            for name in names:
                stored = self._aliases.get(name, name)
                if stored not in read:
                    read[stored] = file.get_tensor(stored)
        return {name[len(prefix) :]: read[self._aliases.get(name, name)] for name in names}

    def __repr__(self):
        size = os.path.getsize(self.path) / 1e6
        return "Tape({}: {} tensors, {:.1f} MB)".format(os.path.basename(self.path), len(self.names()), size)


def _no_tensor(path, name):
    raise KeyError("{} holds no {!r}".format(path, name))
