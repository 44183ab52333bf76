"""What became of a weight: the one that is there against the one that should be. Pure functions on tensors."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from blip2nb.trace.metrics import UNIT
from blip2nb.trace.vocabulary import FUSED, FUSED_PARAMETERS, MIXED, role_of_parameter

_NEARLY_ALL = 0.75
"""So large a share of the rows must be the right ones, elsewhere. Chosen: of the faults that move rows (35, of `python
-m benchmarks.faults` in two twins) all were, and by one shift 0.99 or more, or 0.08 or less."""


@dataclasses.dataclass(frozen=True)
class Change:
    """What was done to a weight: a cause's id and what shows it."""

    id: str
    words: str


def what_changed(name: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None = None) -> Change | None:
    """What turns the expected weight into the one that was found; None where they are bit-equal.

    Args:
        name: the parameter's; its ending says whether it is a bias, a position embedding or a query.
        found, expected: of one shape and dtype.
        heads: into how many heads its rows or columns are divided, where they are.
    """
    if found.shape != expected.shape:
        return Change("weight_changed", f"its shape is {tuple(found.shape)} and should be {tuple(expected.shape)}")
    found, expected = found.detach().cpu(), expected.detach().cpu().to(found.dtype)
    if torch.equal(found, expected):
        return None
    tests = (_not_finite, _zero, _rounded, _fused, _transposed, _reordered, _reordered_columns, _scaled, _resampled)
    for test in tests:
        change = test(name, found, expected, heads)
        if change is not None:
            return change
    return _values(name, found, expected)


def kind_of(name: str) -> str:
    """bias, position, position bias, query, key, value, qkv, kv, norm or weight, by a parameter's name."""
    parts = name.split(".")
    if "relative_attention_bias" in name:
        return "position bias"
    if "position" in parts[-1] or (len(parts) > 1 and "position" in parts[-2]) or parts[-1] == "pos_embed":
        return "position"
    if parts[-1].endswith("bias"):
        return "bias"
    if role_of_parameter(name) in MIXED:
        return role_of_parameter(name)
    return "norm" if len(parts) > 1 and "norm" in parts[-2].lower() else "weight"


def _not_finite(name: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None) -> Change | None:
    wrong = ~found.isfinite() & expected.isfinite()
    if not wrong.any():
        return None
    first = wrong.nonzero()[0].tolist()
    return Change("not_a_number", f"{found[tuple(first)].item()} stands at {first} ({int(wrong.sum())} such values)")


def _zero(name: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None) -> Change | None:
    if found.any():
        return None
    ids = {"bias": "bias_missing", "position": "position_missing", "position bias": "position_bias_missing"}
    ids |= dict.fromkeys(MIXED, "qkv_missing")
    return Change(ids.get(kind_of(name), "weight_missing"), "all its values are zero")


def _rounded(name: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None) -> Change | None:
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(found, expected.to(dtype).to(found.dtype)):
            word = str(dtype).removeprefix("torch.")
            return Change("rounded_weights", f"every value is the right one rounded to {word}")
    return None


def _fused(name: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None) -> Change | None:
    """Queries, keys and values in one tensor: which part stands where, and what was done to one of them."""
    words = FUSED.get(role_of_parameter(name), ())
    if not words or len(found) % len(words):
        return None
    if found.dim() == 2 and len(found) < found.shape[1]:  # transposed, as GPT-2 keeps it: its rows are not of one part
        return None
    given, right = found.chunk(len(words)), expected.chunk(len(words))
    stands: list[str] = []
    for number, part in enumerate(given):
        if torch.equal(part, right[number]):
            stands.append(words[number])
        elif not part.any():
            stands.append("zeros")
        else:
            stands.append(next((words[n] for n, one in enumerate(right) if torch.equal(part, one)), "?"))
    wrong = [number for number, one in enumerate(stands) if one != words[number]]
    if stands.count("?") == 1 and len(wrong) == 1:
        return _one_part(name, words[wrong[0]], given[wrong[0]], right[wrong[0]], heads)
    if not wrong or "?" in stands:
        return None
    if all(stands[number] == "zeros" for number in wrong):
        missing = " and ".join(words[number] for number in wrong)
        return Change("bias_missing" if name.endswith("bias") else "qkv_missing", f"the part of the {missing} is zero")
    return Change("qkv_swapped", f"{', '.join(stands)} stand where {', '.join(words)} should")


def _one_part(name: str, word: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None) -> Change | None:
    """Only the queries', the keys' or the values' part is another: looked at as if it stood alone."""
    path, _, leaf = name.rpartition(".")
    holder = path if leaf in FUSED_PARAMETERS else path.rpartition(".")[0]
    alone = f"{holder}.{word}.{leaf.removeprefix('in_proj_')}"
    change = what_changed(alone, found.contiguous(), expected.contiguous(), heads)
    return None if change is None else Change(change.id, f"in the part of the {word}, {change.words}")


def _transposed(name: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None) -> Change | None:
    square = found.dim() == 2 and found.shape[0] == found.shape[1]
    if square and torch.equal(found, expected.T):
        return Change("transposed", "it is the right matrix transposed")
    return None


def _reordered(name: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None) -> Change | None:
    """The same rows in another order."""
    while found.dim() > 1 and len(found) == 1:
        found, expected = found[0], expected[0]
    order = row_order(found, expected)
    if order is None:
        return None
    kind = kind_of(name)
    if heads and kind not in ("position", "position bias") and (whole := _heads_moved(order, heads, "rows")):
        return whole
    shift = _shift(order)
    if shift:
        ids = {"bias": "bias_shifted", "position": "position_shifted", "position bias": "position_bias"}
        return Change(ids.get(kind, "weight_changed"), f"it is shifted by {shift} of {len(order)} rows")
    if kind in ("position", "position bias"):
        id = "position_order" if kind == "position" else "position_bias"
        return Change(id, f"its rows are in another order: {_grid_words(order)}")
    return _by_heads(order, heads, "rows", kind)


def _reordered_columns(name: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None) -> Change | None:
    if found.dim() != 2:
        return None
    order = row_order(found.T, expected.T)
    if order is None:
        return None
    return _by_heads(order, heads, "columns", kind_of(name))


def _heads_moved(order: Sequence[int], heads: int, what: str) -> Change | None:
    """Whether whole heads changed places, of one projection or of three that lie in one tensor."""
    for count in (heads, 3 * heads):
        width = len(order) // count
        if width < 2 or len(order) % count:
            continue
        blocks = [order[n * width : (n + 1) * width] for n in range(count)]
        if all(block[0] >= 0 and block[0] % width == 0 and _runs(block) for block in blocks):
            stands = [block[0] // width for block in blocks]
            words = f"the heads stand in the order {stands} ({what} of {width})"
            return Change("heads_permuted", words + (", queries, keys and values mixed" if count > heads else ""))
    width = len(order) // heads
    across = [head * width + channel for channel in range(width) for head in range(heads)]
    back = [channel * heads + head for head in range(heads) for channel in range(width)]
    if list(order) in (across, back):
        return Change("heads_permuted", f"its {what} go across the heads instead of head by head")
    return None


def _by_heads(order: Sequence[int], heads: int | None, what: str, kind: str) -> Change:
    if heads and (whole := _heads_moved(order, heads, what)):
        return whole
    shift = _shift(order)
    if shift:
        return Change("weight_changed", f"its {what} are shifted by {shift}")
    if kind == "bias":
        return Change("bias_changed", "its values are in another order")
    moved = sum(number != one for number, one in enumerate(order))
    return Change("weight_changed", f"its {what} are in another order ({moved} of {len(order)} moved)")


def _runs(block: Sequence[int]) -> bool:
    return all(b - a == 1 for a, b in itertools.pairwise(block))


def row_order(found: torch.Tensor, expected: torch.Tensor) -> list[int] | None:
    """Which of the expected rows stands at each place; None unless nearly all of them are found, some elsewhere."""
    if len(found) < 2:
        return None
    places: dict[bytes, list[int]] = {}
    for number, row in enumerate(expected.float().contiguous().numpy()):
        places.setdefault(row.tobytes(), []).append(number)
    if len(places) < len(expected) // 2:  # too many equal rows to tell which is which
        return None
    order = []
    for number, row in enumerate(found.float().contiguous().numpy()):
        there = places.get(row.tobytes(), [])
        order.append(number if number in there else there[0] if there else -1)
    known = sum(one >= 0 for one in order)
    moved = sum(one not in (-1, number) for number, one in enumerate(order))
    return order if known >= _NEARLY_ALL * len(order) and moved >= 2 else None  # one alone may be chance


def _shift(order: Sequence[int]) -> int:
    """By how many places nearly all rows are moved, circularly or with the end cut; 0 where there is no such number."""
    size = len(order)
    for shift in (1, -1, 2, -2, *range(3, min(size, 65))):  # 64, by choice: what is made by mistake is 1 or 2
        hits = sum(one in (number + shift, (number + shift) % size) for number, one in enumerate(order))
        if hits >= _NEARLY_ALL * size:
            return -shift
    return 0


def _grid_words(order: Sequence[int]) -> str:
    size = len(order)
    if list(order) == list(reversed(range(size))):
        return "back to front"
    if order[-1] == 0 and list(order[:-1]) == list(range(1, size)):
        return "the first stands last"
    for extra in (1, 0):
        side = math.isqrt(size - extra)
        if side * side == size - extra:
            grid = [extra + column * side + row for row in range(side) for column in range(side)]
            if list(order[extra:]) == grid:
                return f"the {side} × {side} grid is transposed"
    return f"{sum(one != number for number, one in enumerate(order))} of {size} moved"


def _scaled(name: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None) -> Change | None:
    factor = proportion(found, expected)
    if factor is None:  # what is stored in half precision was rounded after it was multiplied
        factor = proportion(found, expected, within=2.0**-11)  # the most that rounding to float16 changes
        # chosen: nobody folds in so small a scale
        factor = factor if factor is not None and abs(factor - 1) > 0.01 else None
    if factor is None:
        return None
    id = "embedding_scale" if "embed" in name and "position" not in name else "scale"
    return Change(id, f"it is {factor:.6g} × the right one")


def proportion(found: torch.Tensor, expected: torch.Tensor, within: float = 4 * UNIT) -> float | None:
    """The factor between two tensors that are proportional to rounding; None where they are not, or equal. A weight is
    multiplied once or twice, and rounded as often."""
    found, expected = found.double(), expected.double()
    size = (expected * expected).sum()
    factor = ((found * expected).sum() / size).item() if size else 0.0
    left = (found - factor * expected).norm() / found.norm().clamp_min(1e-300)
    return factor if left <= within and abs(factor - 1) > within else None


_ALMOST = 1e-3
"""A grid that is this near was interpolated so. Stored in float16 afterwards it is 1.6e-4 away (positions_interpolated
in tiny-blip2-flan-t5-xl); the next size 2.4e-3 or more, of noise and of smooth grids."""

_SMOOTHER, _RELATED = 0.8, 0.2
"""Or it was interpolated in a way that is not known: so much smoother, and so alike that it is no other grid. Chosen:
of noise, bicubic through half the side leaves 0.64 of the roughness and a cosine of 0.44; less goes unnamed."""


def _resampled(name: str, found: torch.Tensor, expected: torch.Tensor, heads: int | None) -> Change | None:
    """A grid of position embeddings that went through another size."""
    if kind_of(name) != "position" or found.numel() == found.shape[-1]:
        return None
    a, b = (one.reshape(-1, one.shape[-1]).float() for one in (found, expected))
    for way, rest in _interpolations(b):
        if (a - rest).norm() <= _ALMOST * b.norm():
            return Change("position_interpolated", f"it is the right one interpolated {way}")
    rough = [(one[1:] - one[:-1]).norm() / one.norm() for one in (a, b)]
    related = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    if rough[0] < _SMOOTHER * rough[1] and related > _RELATED:
        return Change("position_interpolated", f"it is smoother than the right one ({rough[0] / rough[1]:.2f} ×)")
    return None


def _interpolations(rows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for extra in (1, 0):
        side = math.isqrt(len(rows) - extra)
        if side * side != len(rows) - extra:
            continue
        grid = rows[extra:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        for other in range(max(2, side // 3), 2 * side + 1):
            for mode in ("bicubic", "bilinear") if other != side else ():
                there = torch.nn.functional.interpolate(grid, size=(other, other), mode=mode, align_corners=False)
                back = torch.nn.functional.interpolate(there, size=(side, side), mode=mode, align_corners=False)
                flat = back.permute(0, 2, 3, 1).reshape(side * side, -1)
                yield f"through {other} × {other} ({mode})", torch.cat([rows[:extra], flat])


def _values(name: str, found: torch.Tensor, expected: torch.Tensor) -> Change:
    """Nothing but the values themselves."""
    differ = found != expected
    count, size = int(differ.sum()), found.numel()
    bias = kind_of(name) == "bias"
    largest = (found.double() - expected.double()).abs().argmax()
    a, b = found.flatten()[largest].item(), expected.flatten()[largest].item()
    if bias and count and not found[differ].any():
        return Change("bias_missing", f"{count} of {size} values are zero and should not be")
    if count <= max(1, size // 10):  # chosen: so few are named, more are measured
        return Change(
            "bias_changed" if bias else "weight_changed",
            f"{count} of {size} values differ, most the one that is {a:.9g} and should be {b:.9g}",
        )
    related = torch.nn.functional.cosine_similarity(found.double().flatten(), expected.double().flatten(), dim=0).item()
    if related > 0.7:  # chosen for the words alone: the cause is the same
        size_of = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
        id = "bias_changed" if bias else "weight_changed"
        return Change(id, f"{count} of {size} values differ, by {size_of:.1e} of its norm")
    words = f"it has little in common with the right one (cosine {related:.2f})"
    return Change("bias_changed" if bias else "weight_changed", words)
