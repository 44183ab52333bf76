"""A tape: what a reference model took in and gave out at named places, in one safetensors file.

Stands alone, so that it can record where the reference lives: torch and safetensors only, Python 3.8. Places are
written `path.of.a.module` (its output) or `path.of.a.module:argument` (what it was handed under that name);
`path.of.a.module:0` is its first argument, whatever that is called.
"""

import contextlib
import inspect
import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FORMAT = 3

SAMPLE = 32
"""So many positions are kept of what a module inside a stage took in and gave out, where each is computed alone."""

_MIXED = {"q", "k", "v", "qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "qkv_proj"}


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


@contextlib.contextmanager
def recording(model, places, samples=()):
    """Record places of `model` while the block runs; only the first call of each module counts.

    Args:
        model: any torch module. Its forward code runs as it is; each module's `forward` is called through a wrapper
            for as long as the block lasts, which works in every version of torch.
        places: iterable of places, each kept whole.
        samples: more places, of which `SAMPLE` positions are enough. Kept whole all the same where positions are mixed
            afterwards: what a module with modules of its own takes in, queries, keys and values, and look-ups. What a
            module with modules of its own gives out is left away; the last of those gives it.

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
        module = model.get_submodule(path)
        if argument is not None or not list(module.children()):
            wanted.setdefault(path, {})[argument] = _thinned(path, module)
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


def _thinned(path, module):
    """Whether what a module does at one position depends on that position alone, also for what comes after it."""
    mixed = path.rpartition(".")[2] in _MIXED or isinstance(module, torch.nn.Embedding)
    return not mixed and not list(module.children())


def _wrap(module, named, out):
    original = module.forward
    signature = inspect.signature(original)
    for path, arguments in named:
        for argument in set(arguments) - {None, "0"}:
            if argument not in signature.parameters:
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


def save_tape(path, tensors, metadata=None):
    """Write a tape whole or not at all. Equal tensors are stored once.

    Args:
        tensors: name -> tensor.
        metadata: anything JSON can hold; `Tape.metadata` gives it back.
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
    os.replace(temporary, path)


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

    def __contains__(self, name):
        return name in self._stored or name in self._aliases

    def __getitem__(self, name):
        """The recorded tensor. Raises KeyError if there is none of that name."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self._aliases.get(name, name) if name in self else _no_tensor(self.path, name))

    def names(self):
        return sorted(self._stored | set(self._aliases))

    def __repr__(self):
        size = os.path.getsize(self.path) / 1e6
        return "Tape({}: {} tensors, {:.1f} MB)".format(os.path.basename(self.path), len(self.names()), size)


def _no_tensor(path, name):
    raise KeyError("{} holds no {!r}".format(path, name))
