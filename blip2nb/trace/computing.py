"""What does a part of a network compute? From what went in and what came out, without reading its code.

Each function tries the computations that networks use there, in float64, on the inputs that were recorded, until one
gives the output: of the reference's output and of the candidate's. Where the two have different explanations, their
difference is the cause. None of them needs the weights to be wrong or the code to be known.

`within` is how near the caller's own rounding comes. Who made the recording may have rounded worse, on another
processor or with another library: what fits best is recognised as well where it is as near as any correct computation
of that very function comes (see `allowed`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from blip2nb.trace.metrics import CEILING, FEW, THRESHOLD, UNIT

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
"""What is tried first: torch's own, EVA's and T5's, BERT's, then other round numbers. Any other is computed."""


T = TypeVar("T")


def off(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖value − wanted‖ ÷ ‖wanted‖; infinite where they do not fit."""
    if value.shape != wanted.shape:
        return math.inf
    error = (value.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300)
    return error.item() if error.isfinite() else math.inf


def allowed(within: float, rounding: float) -> float:
    """How near a computation that is recognised comes to what was recorded.

    Args:
        within: as near, in any case, as this.
        rounding: the same computation's distance in float32, here, to float64 on the same inputs, which says how
            well-conditioned it is; others may round a few times more.
    """
    return max(within, min(max(THRESHOLD * rounding, FEW), CEILING))


def likeliest(errors: Mapping[T, float]) -> T:
    """The first, unless one behind it fits twice as well: rounding alone moves an error less than that."""
    best = next(iter(errors))
    for one, error in errors.items():
        if error < errors[best] / 2:
            best = one
    return best


# -- activations


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """Which function, what it gives, and how far float32 is from that here."""

    name: str
    value: torch.Tensor
    rounding: float = 0.0


def activation(pieces: Sequence[torch.Tensor], wanted: torch.Tensor, within: float) -> Activation | None:
    """Which function makes `wanted` of what the layers before it gave: of one, or of two where one gates the other."""
    best, error = None, math.inf
    single = [piece.float() for piece in pieces]
    for exact, rounded in zip(_activated(pieces), _activated(single), strict=True):
        if (now := off(exact.value, wanted)) < error:
            best, error = dataclasses.replace(exact, rounding=off(rounded.value, exact.value)), now
    return best if best is not None and error <= allowed(within, best.rounding) else None


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

    def of(
        self, x: torch.Tensor, params: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]], dtype: torch.dtype
    ) -> torch.Tensor:
        """What it gives for x, computed in a dtype."""
        weight, bias = params[self.params]
        value = normalised(x.to(dtype), self.kind, self.eps) * weight.to(dtype)
        return value + bias.to(dtype) if self.bias and bias is not None else value

    def rounding(self, x: torch.Tensor, params: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]) -> float:
        """How far float32 is from what it gives, here."""
        return off(self.of(x, params, torch.float32), self.of(x, params, torch.float64))


def norm(
    x: torch.Tensor, wanted: torch.Tensor, params: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]], within: float
) -> Norm | None:
    """Which norm of `x` gives `wanted`.

    Args:
        x, wanted: (…, positions, channels), float64.
        params: name -> weight and bias of the norms that may have been meant, the likeliest first.
    """
    wide = {name: (w.double(), None if b is None else b.double()) for name, (w, b) in params.items()}
    errors: dict[Norm, float] = {}
    for name, (weight, bias) in wide.items():
        for kind in NORMS:
            for biased in (True, False) if bias is not None else (True,):
                shift = bias if biased and bias is not None else torch.zeros_like(weight)
                if weight.shape[-1] != x.shape[-1]:
                    continue
                eps, error = _eps_of(x, wanted, weight, shift, kind, within)
                one = Norm(kind, eps, name, biased)
                if error <= within:
                    return one
                errors[one] = error
    best = likeliest(errors) if errors else None
    near = best is not None and errors[best] < CEILING
    return best if best and near and errors[best] <= allowed(within, best.rounding(x, params)) else None


def normalised(x: torch.Tensor, kind: str, eps: float) -> torch.Tensor:
    """A norm of one of `NORMS`' kinds, without its weight and bias."""
    centred = x if kind == "rms" else x - x.mean(-1, keepdim=True)
    if "eps outside" in kind:
        return centred / (centred.std(-1, keepdim=True, correction=int("unbiased" in kind)) + eps)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _eps_of(
    x: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, kind: str, within: float
) -> tuple[float, float]:
    """The eps with which the norm comes nearest to `wanted`, and how near: one that is in use, or what the positions
    say of it where that fits much better."""
    errors = {eps: off(normalised(x, kind, eps) * weight + bias, wanted) for eps in EPS}
    best = min(errors, key=errors.__getitem__)
    if errors[best] <= within:
        return best, errors[best]
    centred = x if kind == "rms" else x - x.mean(-1, keepdim=True)
    plain = centred * weight
    size = (plain * (wanted - bias)).sum(-1) / plain.square().sum(-1).clamp_min(1e-300)
    eps = (1 / size.square() - centred.square().mean(-1)).median().item()
    fitted = [one for one in (float(f"{eps:.2g}"), eps) if one > 0]
    tried = {best: errors[best]}
    tried |= {one: off(normalised(x, kind, one) * weight + bias, wanted) for one in fitted if one not in tried}
    best = likeliest(tried)
    return best, tried[best]


# -- sums


def summed(pieces: Mapping[str, torch.Tensor], wanted: torch.Tensor, within: float) -> dict[str, float] | None:
    """How often each piece is in a sum, by least squares; None where no sum of them gives it.

    Of up to three pieces, two first: a residual and its branch. A part of less than a thousandth is none that anybody
    adds, and may be what rounding makes of a piece too many: any limit from the rounding to a third does.
    """
    usable = {name: piece for name, piece in pieces.items() if piece.shape == wanted.shape}
    errors: dict[tuple[tuple[str, float], ...], float] = {}
    limits: dict[tuple[tuple[str, float], ...], float] = {}
    for size in (2, 1, 3):
        for names in itertools.combinations(usable, size):
            columns = torch.stack([usable[name].double().flatten() for name in names], 1)
            gram = columns.T @ columns
            if torch.linalg.matrix_rank(gram) < size:
                continue
            factors = torch.linalg.solve(gram, columns.T @ wanted.double().flatten())
            if not bool((factors.abs() > 1e-3).all()):
                continue
            limit = max(within, FEW * ((columns.norm(dim=0) * factors.abs()).sum() / wanted.double().norm()).item())
            spread = limit * wanted.double().norm() * torch.linalg.inv(gram).diagonal().sqrt()
            said = zip(names, map(_shortest, factors.tolist(), spread.tolist()), strict=True)
            sum_ = tuple(said)
            errors[sum_], limits[sum_] = off(columns @ factors, wanted.flatten()), limit
            if errors[sum_] <= within:
                return dict(sum_)
    best = likeliest(errors) if errors else ()
    return dict(best) if best and errors[best] <= limits[best] else None


def _shortest(value: float, spread: float) -> float:
    """The number with the fewest digits that a measured one may be."""
    numbers = (float(f"{value:.{digits}g}") for digits in range(1, 7))
    return next((one for one in numbers if abs(one - value) <= spread), round(value, 6))


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

    def rounding(self, how: Attention) -> float:
        """How far float32 is from an attention's output, here."""
        exact = self.output(how)
        mask, bias = (None if one is None else one.float() for one in (self.mask, self.bias))
        parts = {name: part.float() for name, part in self.parts.items()}
        single = Scores(parts, self.rows, mask, bias).output(how)
        return math.inf if exact is None or single is None else off(single, exact)

    def _part(self, name: str, number: int) -> torch.Tensor:
        own = self.parts[("query", "key", "value")[number]]
        return torch.zeros_like(own) if name == "zeros" else self.parts[name]


def attention(scores: Scores, wanted: torch.Tensor, start: Attention, within: float) -> Attention | None:
    """Which attention gives `wanted`: the one to start from, else one that differs from it in one thing, or two."""
    errors: dict[Attention, float] = {}

    def tried(how: Attention) -> float:
        if how not in errors:
            errors[how] = _attention_off(scores, wanted, how)
        return errors[how]

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
    for other in (_heads_permuted(scores, wanted, start), _fitted_scale(tried, start)):
        if other is not None and tried(other) <= min(within, tried(start) / 2):
            return other
    best = likeliest(errors)
    return best if errors[best] < CEILING and errors[best] <= allowed(within, scores.rounding(best)) else None


def masked(scores: Scores, wanted: torch.Tensor, right: Attention, within: float) -> Attention | None:
    """Which mask makes `wanted` of an attention that is right but for that."""
    queries, keys = len(scores.parts["query"][0]), scores.parts["key"].shape[-2]
    words = [f"ahead {number}" for number in (-1, 1, 2)]
    # up to 64 positions, by choice: each costs an attention
    words += [f"window {number}" for number in range(1, min(queries, 64))]
    words += [f"prefix {number}" for number in range(1, min(keys, 64) + 1)]
    words += [f"without 0:{number}" for number in range(1, min(keys, 64))]
    limit = allowed(within, scores.rounding(right))
    for mask in words:
        how = dataclasses.replace(right, mask=mask)
        if _attention_off(scores, wanted, how) <= limit:
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
    for heads in range(1, min(channels, 128) + 1):  # chosen: more heads than any model that the kit knows has
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


def _heads_permuted(scores: Scores, wanted: torch.Tensor, start: Attention) -> Attention | None:
    output = scores.output(dataclasses.replace(start, heads_order=()))
    if output is None or output.shape != wanted.shape:
        return None
    ours, theirs = (one.unflatten(-1, (start.heads, -1)).double() for one in (output, wanted))
    apart = torch.stack([(ours - theirs[..., [head], :]).square().sum((0, 1, 3)) for head in range(start.heads)])
    order = tuple(apart.argmin(1).tolist())
    return dataclasses.replace(start, heads_order=order) if sorted(order) != list(order) else None


def _fitted_scale(tried: Callable[[Attention], float], start: Attention) -> Attention:
    """Any other scale, by golden section over its logarithm.

    Chosen: from a hundredth to a hundred times, beyond which scores are flat or one-hot, in steps of a quarter; 60 cuts
    by the golden ratio then leave 3e-13 of a step, less than float32 rounds.
    """
    low, high = math.log(start.scale / 100), math.log(start.scale * 100)
    grid = [low + (high - low) * n / 40 for n in range(41)]
    middle = min(grid, key=lambda x: tried(dataclasses.replace(start, scale=math.exp(x))))
    low, high, ratio = middle - (high - low) / 40, middle + (high - low) / 40, (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        first, second = (tried(dataclasses.replace(start, scale=math.exp(x))) for x in (a, b))
        low, high = (low, b) if first < second else (a, high)
    return dataclasses.replace(start, scale=math.exp((low + high) / 2))


# -- matrices


def product_rounding(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, value: torch.Tensor) -> float:
    """What float32 is off at most when it computes `value`, x·Wᵀ + b, in whatever order it adds: n roundings of sums
    about as large as what is added up, which go either way and grow as √n (Higham and Mary, 2019)."""
    plain = (x.double() @ weight.detach().double().T).norm()
    shift = 0.0 if bias is None else bias.detach().double().norm() * math.sqrt(math.prod(x.shape[:-1]))
    size = value.double().norm().clamp_min(1e-300)
    return max(FEW, (UNIT * math.sqrt(weight.shape[1]) * (plain + shift) / size).item())


# -- whatever it is


def pattern(found: torch.Tensor, expected: torch.Tensor, rounding: float) -> tuple[str, str] | None:
    """What sets two outputs of shape (…, positions, channels) apart, whatever was computed: (a cause's id, words)."""
    a, b = found.double().reshape(-1, found.shape[-1]), expected.double().reshape(-1, expected.shape[-1])
    apart = a - b
    within = max(10 * rounding, FEW)  # chosen: both sides round; patterns fit to 0.2 of it and miss by 10,000 times it
    size = b.norm().clamp_min(1e-300)
    factor = ((a * b).sum() / b.square().sum().clamp_min(1e-300)).item()
    if (a - factor * b).norm() <= within * a.norm().clamp_min(1e-300):
        if abs(factor) < FEW:
            return "residual", "nothing comes out of it"
        return "scale", f"it is {factor:.6g} × the reference's everywhere"
    offset = apart.mean(0)
    # chosen: what is no offset was 0.30 of it from one or more (`python -m benchmarks.faults`, two twins)
    if len(a) > 1 and (apart - offset).norm() <= max(0.02 * apart.norm(), within * size):
        return "bias_changed", "the same is added at every position, as by another bias"
    for name, axis in (("channels", 0), ("positions", 1)):
        sizes = apart.norm(dim=axis) / b.norm(dim=axis).clamp_min(1e-300)
        wrong = sizes > within
        if 0 < wrong.sum() <= wrong.numel() // 4:  # chosen: it was one in forty, or at least three quarters
            some = ", ".join(map(str, wrong.nonzero().flatten()[:6].tolist()))
            return "unknown", f"{int(wrong.sum())} of {wrong.numel()} {name} differ: {some}" + (
                ", …" if wrong.sum() > 6 else ""
            )
    order = _same_columns(a, b, within)
    if order is not None:
        return "unknown", f"its channels are the reference's in another order, beginning {order[:4]}"
    return None


def _same_columns(a: torch.Tensor, b: torch.Tensor, within: float) -> list[int] | None:
    if a.shape[1] > 8192 or len(a) < 2:  # chosen: a square of so many float64 values is half a gigabyte
        return None
    unit = [one / one.norm(dim=0).clamp_min(1e-300) for one in (a, b)]
    order = (unit[0].T @ unit[1]).argmax(1)
    moved = order != torch.arange(len(order))
    return order.tolist() if moved.any() and off(b[:, order], a) <= within else None
