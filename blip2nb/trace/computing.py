"""What does a part of a network compute? From what went in and what came out, without reading its code.

Each function tries the computations that networks use there, in float64, on the inputs that were recorded, until one
gives the output: of the reference's output and of the candidate's. Where the two have different explanations, their
difference is the cause. None of them needs the weights to be wrong or the code to be known.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_new": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu2": lambda x: torch.relu(x).square(),
    "leaky_relu": torch.nn.functional.leaky_relu,
    "elu": torch.nn.functional.elu,
    "softplus": torch.nn.functional.softplus,
    "mish": torch.nn.functional.mish,
    "identity": lambda x: x,
}

NORMS = ("layer", "rms", "layer with eps outside", "layer with eps outside, unbiased")
"""Layer norm and root-mean-square norm; and layer norms that add eps to the deviation instead of the variance."""

EPS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-7, 1e-3, 1e-4, 1e-2, 0.0)


def off(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖value − wanted‖ ÷ ‖wanted‖; infinite where they do not fit."""
    if value.shape != wanted.shape:
        return math.inf
    error = (value.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300)
    return error.item() if error.isfinite() else math.inf


# -- activations


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """Which function, and what it gives."""

    name: str
    value: torch.Tensor


def activation(pieces: Sequence[torch.Tensor], wanted: torch.Tensor, within: float) -> Activation | None:
    """Which function makes `wanted` of what the layers before it gave: of one, or of two where one gates the other."""
    best, error = None, within
    for one in _activated(pieces):
        if (now := off(one.value, wanted)) < error:
            best, error = one, now
    return best


def _activated(pieces: Sequence[torch.Tensor]) -> Iterable[Activation]:
    for name, function in ACTIVATIONS.items():
        for piece in pieces:
            yield Activation(name, function(piece))
        for one, other in itertools.permutations(pieces, 2):
            if one.shape == other.shape:
                yield Activation(name if one is pieces[0] else f"{name} of the other branch", function(one) * other)


# -- norms


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm's computation. `params` names whose weight and bias it uses."""

    kind: str
    eps: float
    params: str
    bias: bool = True


def norm(
    x: torch.Tensor, wanted: torch.Tensor, params: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]], within: float
) -> Norm | None:
    """Which norm of `x` gives `wanted`.

    Args:
        x, wanted: (…, positions, channels), float64.
        params: name -> weight and bias of the norms that may have been meant, the likeliest first.
    """
    wide = {name: (w.double(), None if b is None else b.double()) for name, (w, b) in params.items()}
    for name, (weight, bias) in wide.items():
        for kind in NORMS:
            for biased in (True, False) if bias is not None else (True,):
                shift = bias if biased and bias is not None else torch.zeros_like(weight)
                if weight.shape[-1] != x.shape[-1]:
                    continue
                eps = _eps_of(x, wanted, weight, shift, kind, within)
                if eps is not None:
                    return Norm(kind, eps, name, biased)
    return None


def normalised(x: torch.Tensor, kind: str, eps: float) -> torch.Tensor:
    """A norm of one of `NORMS`' kinds, without its weight and bias."""
    centred = x if kind == "rms" else x - x.mean(-1, keepdim=True)
    if "eps outside" in kind:
        return centred / (centred.std(-1, keepdim=True, correction=int("unbiased" in kind)) + eps)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _eps_of(
    x: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, kind: str, within: float
) -> float | None:
    """The eps with which the norm gives `wanted`: one that is in use, else what each position says of it."""
    errors = {eps: off(normalised(x, kind, eps) * weight + bias, wanted) for eps in EPS}
    best = min(errors, key=errors.__getitem__)
    if errors[best] <= within:
        return best
    centred = x if kind == "rms" else x - x.mean(-1, keepdim=True)
    plain = centred * weight
    size = (plain * (wanted - bias)).sum(-1) / plain.square().sum(-1).clamp_min(1e-300)
    eps = (1 / size.square() - centred.square().mean(-1)).median().item()
    for one in (float(f"{eps:.2g}"), eps):
        if one > 0 and off(normalised(x, kind, one) * weight + bias, wanted) <= within:
            return one
    return None


# -- sums


def summed(pieces: Mapping[str, torch.Tensor], wanted: torch.Tensor, within: float) -> dict[str, float] | None:
    """How often each piece is in a sum, by least squares; None where no sum of them gives it. Parts of less than a
    thousandth are left out."""
    usable = {name: piece for name, piece in pieces.items() if piece.shape == wanted.shape}
    for size in (2, 1, 3):
        for names in itertools.combinations(usable, size):
            columns = torch.stack([usable[name].double().flatten() for name in names], 1)
            gram = columns.T @ columns
            if torch.linalg.matrix_rank(gram) < size:
                continue
            factors = torch.linalg.solve(gram, columns.T @ wanted.double().flatten())
            if off(columns @ factors, wanted.flatten()) <= within and bool((factors.abs() > 1e-3).all()):
                return {name: round(factor.item(), 6) for name, factor in zip(names, factors, strict=True)}
    return None


# -- attention


@dataclasses.dataclass(frozen=True)
class Attention:
    """An attention's computation. All but `order` are compared by value.

    Attributes:
        heads: their number.
        scale: what the scores are multiplied by.
        mask: "given", "none", "causal", or one of `masked`'s: "window 16", "prefix 32", "ahead 1", "without 0:32".
        bias: whether the position bias that was handed in is added.
        order: which of query, key and value stand as each; "zeros" for none.
        heads_order: which head's output stands in each place.
    """

    heads: int
    scale: float
    mask: str = "none"
    bias: bool = False
    order: tuple[str, str, str] = ("query", "key", "value")
    heads_order: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What an attention works on.

    Attributes:
        parts: "query", "key", "value" -> (batch, positions, channels).
        rows: the positions of the query whose outputs are wanted.
        mask, bias: (batch or 1, heads or 1, queries, keys), added to the scores, if any.
    """

    parts: Mapping[str, torch.Tensor]
    rows: Sequence[int]
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def output(self, how: Attention) -> torch.Tensor | None:
        """The attention's output at the rows, (batch, rows, channels); None where the shapes do not allow it."""
        q, k, v = (self._part(name, number) for number, name in enumerate(how.order))
        if q.shape[-1] % how.heads or k.shape[-2] != v.shape[-2] or k.shape[-1] != q.shape[-1]:
            return None
        q = q[:, self.rows]
        q, k, v = (one.unflatten(-1, (how.heads, -1)).transpose(1, 2) for one in (q, k, v))
        scores = q @ k.transpose(-1, -2) * how.scale
        for added in (self.mask if how.mask == "given" else None, self.bias if how.bias else None):
            if added is not None:
                fits = added.shape[1] in (1, how.heads) and added.shape[2] in (1, len(self.parts["query"][0]))
                if not fits or added.shape[3] != k.shape[2]:
                    return None
                scores = scores + (added[:, :, self.rows] if added.shape[2] > 1 else added)
        if how.mask not in ("given", "none"):
            hidden = _hidden(how.mask, torch.tensor(list(self.rows))[:, None], torch.arange(k.shape[2])[None])
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        out = scores.softmax(-1) @ v
        if how.heads_order:
            out = out[:, list(how.heads_order)]
        return out.transpose(1, 2).flatten(2)

    def _part(self, name: str, number: int) -> torch.Tensor:
        own = self.parts[("query", "key", "value")[number]]
        return torch.zeros_like(own) if name == "zeros" else self.parts[name]


def attention(scores: Scores, wanted: torch.Tensor, start: Attention, within: float) -> Attention | None:
    """Which attention gives `wanted`: the one to start from, else one that differs from it in one thing, or two."""
    tried = functools.partial(_attention_off, scores, wanted)
    if tried(start) <= within:
        return start
    channels = scores.parts["query"].shape[-1]
    best, error = start, tried(start)
    for how in _changes(start, channels, scores):
        now = tried(how)
        if now < error:
            best, error = how, now
        if now <= within:
            return how
    for how in _changes(best, channels, scores):
        if tried(how) <= within:
            return how
    permuted = _heads_permuted(scores, wanted, start, within)
    return permuted if permuted is not None else _fitted_scale(tried, start, within)


def masked(scores: Scores, wanted: torch.Tensor, right: Attention, within: float) -> Attention | None:
    """Which mask makes `wanted` of an attention that is right but for that."""
    queries, keys = len(scores.parts["query"][0]), scores.parts["key"].shape[-2]
    words = [f"ahead {number}" for number in (-1, 1, 2)]
    words += [f"window {number}" for number in range(1, min(queries, 64))]
    words += [f"prefix {number}" for number in range(1, min(keys, 64) + 1)]
    words += [f"without 0:{number}" for number in range(1, min(keys, 64))]
    for mask in words:
        how = dataclasses.replace(right, mask=mask)
        if _attention_off(scores, wanted, how) <= within:
            return how
    return None


def _hidden(mask: str, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Where a mask that is said in words hides a key from a query."""
    kind, _, number = mask.partition(" ")
    if kind == "without":
        start, _, end = number.partition(":")
        return (key > query) | ((key >= int(start)) & (key < int(end)) & (query >= int(end)))
    shift = int(number or 0)
    if kind == "window":
        return (key > query) | (key <= query - shift)
    if kind == "prefix":
        return (key > query) & (key >= shift)
    return key > query + shift  # causal, or so many ahead


def _attention_off(scores: Scores, wanted: torch.Tensor, how: Attention) -> float:
    output = scores.output(how)
    return math.inf if output is None else off(output, wanted)


def _changes(start: Attention, channels: int, scores: Scores) -> Iterable[Attention]:
    """Attentions that differ from one in a single thing that people get wrong."""
    for mask in ("none", "causal", *(["given"] if scores.mask is not None else [])):
        yield dataclasses.replace(start, mask=mask)
    if scores.bias is not None:
        yield dataclasses.replace(start, bias=not start.bias)
    width = channels // start.heads
    for scale in (width**-0.5, 1.0, 1 / width, channels**-0.5, 1 / channels, width**-0.25, math.sqrt(width)):
        yield dataclasses.replace(start, scale=scale)
    for heads in range(1, min(channels, 128) + 1):
        if channels % heads == 0:
            yield dataclasses.replace(start, heads=heads, scale=(channels // heads) ** -0.5)
            yield dataclasses.replace(start, heads=heads)
    shapes = {tuple(part.shape) for part in scores.parts.values()}
    for order in sorted(_orders(len(shapes) > 1), key=lambda one: sum(map(operator.ne, one, start.order))):
        yield dataclasses.replace(start, order=order)


def _orders(crossed: bool) -> Iterable[tuple[str, str, str]]:
    """What may stand for query, key and value. Where the last two come from elsewhere only they can be exchanged."""
    names, others = ("query", "key", "value", "zeros"), ("key", "value", "zeros")
    yield from (
        itertools.product(("query", "zeros"), others, others) if crossed else itertools.product(names, names, names)
    )


def _heads_permuted(scores: Scores, wanted: torch.Tensor, start: Attention, within: float) -> Attention | None:
    output = scores.output(dataclasses.replace(start, heads_order=()))
    if output is None or output.shape != wanted.shape:
        return None
    ours, theirs = (one.unflatten(-1, (start.heads, -1)).double() for one in (output, wanted))
    apart = torch.stack([(ours - theirs[..., [head], :]).square().sum((0, 1, 3)) for head in range(start.heads)])
    order = tuple(apart.argmin(1).tolist())
    how = dataclasses.replace(start, heads_order=order)
    return how if sorted(order) != list(order) and _attention_off(scores, wanted, how) <= within else None


def _fitted_scale(tried: Callable[[Attention], float], start: Attention, within: float) -> Attention | None:
    """Any other scale, by golden section over its logarithm."""
    low, high = math.log(start.scale / 100), math.log(start.scale * 100)
    grid = [low + (high - low) * n / 40 for n in range(41)]
    middle = min(grid, key=lambda x: tried(dataclasses.replace(start, scale=math.exp(x))))
    low, high, ratio = middle - (high - low) / 40, middle + (high - low) / 40, (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        first, second = (tried(dataclasses.replace(start, scale=math.exp(x))) for x in (a, b))
        low, high = (low, b) if first < second else (a, high)
    how = dataclasses.replace(start, scale=math.exp((low + high) / 2))
    return how if tried(how) <= max(within, 1e-6) else None


# -- whatever it is


def pattern(found: torch.Tensor, expected: torch.Tensor, rounding: float) -> tuple[str, str] | None:
    """What sets two outputs of shape (…, positions, channels) apart, whatever was computed: (a cause's id, words)."""
    a, b = found.double().reshape(-1, found.shape[-1]), expected.double().reshape(-1, expected.shape[-1])
    apart = a - b
    within = max(10 * rounding, 1e-6)
    size = b.norm().clamp_min(1e-300)
    factor = ((a * b).sum() / b.square().sum().clamp_min(1e-300)).item()
    if (a - factor * b).norm() <= within * a.norm().clamp_min(1e-300):
        if abs(factor) < 1e-6:
            return "residual", "nothing comes out of it"
        return "scale", f"it is {factor:.6g} × the reference's everywhere"
    offset = apart.mean(0)
    if len(a) > 1 and (apart - offset).norm() <= max(0.02 * apart.norm(), within * size):
        return "bias_changed", "the same is added at every position, as by another bias"
    for name, axis in (("channels", 0), ("positions", 1)):
        sizes = apart.norm(dim=axis) / b.norm(dim=axis).clamp_min(1e-300)
        wrong = sizes > within
        if 0 < wrong.sum() <= wrong.numel() // 4:
            some = ", ".join(map(str, wrong.nonzero().flatten()[:6].tolist()))
            return "unknown", f"{int(wrong.sum())} of {wrong.numel()} {name} differ: {some}" + (
                ", …" if wrong.sum() > 6 else ""
            )
    order = _same_columns(a, b, within)
    if order is not None:
        return "unknown", f"its channels are the reference's in another order, beginning {order[:4]}"
    return None


def _same_columns(a: torch.Tensor, b: torch.Tensor, within: float) -> list[int] | None:
    if a.shape[1] > 8192 or len(a) < 2:
        return None
    unit = [one / one.norm(dim=0).clamp_min(1e-300) for one in (a, b)]
    order = (unit[0].T @ unit[1]).argmax(1)
    moved = order != torch.arange(len(order))
    return order.tolist() if moved.any() and off(b[:, order], a) <= within else None
