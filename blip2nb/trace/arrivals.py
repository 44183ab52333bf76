"""What reaches a place and should not: told from what arrived and what should have. Pure functions on tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch

from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.computing import pattern
from blip2nb.trace.metrics import CEILING, FEW, UNIT, distance
from blip2nb.trace.weights import proportion, row_order


def explain(
    module: str, name: str, found: torch.Tensor, expected: torch.Tensor, others: Mapping[str, torch.Tensor]
) -> Cause:
    """The likeliest reason why `found` arrives at a module where `expected` should.

    Args:
        name: the argument's, such as attention_mask or input_ids.
        others: the reference's values elsewhere; what arrives may be one of them.
    """
    found, expected = found.detach().cpu(), expected.detach().cpu()
    mask = "mask" in name
    if found.shape != expected.shape:
        return _of_another_shape(module, name, found, expected, mask)
    if mask:
        return Cause(
            "attention_mask", f"{_share(found, expected)} of the mask differs", module, "compared with the mask"
        )
    if not expected.is_floating_point():
        id = "position_bias" if "relative_attention_bias" in module else "tokens"
        places = (found != expected).nonzero()[:4].tolist()  # a few say where
        return Cause(
            id, f"{_share(found, expected)} of {name} differs, first at {places}", module, "compared one by one"
        )
    if expected.dim() == 4 and expected.shape[1] == 3:
        return image(module, found, expected)
    if bool((~found.isfinite() & expected.isfinite()).any()):
        return Cause("not_a_number", f"NaN or infinity arrives as {name}", module, "the reference has numbers there")
    if not found.any():
        return Cause("unknown", f"nothing but zeros arrives as {name}", module, "all values are zero")
    factor = proportion(found, expected, within=FEW)
    if factor is not None:
        id = "logits_scale" if "head" in module.rpartition(".")[2] else "embedding_scale"
        return Cause(id, f"{name} is {factor:.6g} × what it should be", module, "they are proportional",
                     _undone(f"divided by {factor:.6g}", found / factor, found, expected))  # fmt: skip
    for other, value in others.items():
        if value.shape == found.shape and torch.equal(value.to(found.dtype), found):
            return Cause(
                "unknown", f"what arrives as {name} is the reference's value at {other}", module, "bit for bit"
            )
    rows = [one.reshape(-1, one.shape[-1]) for one in (found, expected)]
    some = (rows[0] != rows[1]).any(-1)
    part = proportion(rows[0][some], rows[1][some], within=FEW)
    if part is not None:
        words = f"{int(some.sum())} of {len(some)} positions of {name} are {part:.6g} × what they should be"
        return Cause("embedding_scale", words, module, "they are proportional")
    order = row_order(*rows)
    if order is not None:
        return _rows(module, name, order, rows)
    said = pattern(found, expected, UNIT)
    return Cause(*said, module, "its pattern") if said else Cause("unknown", f"{name} differs", module, "compared")


def _of_another_shape(module: str, name: str, found: torch.Tensor, expected: torch.Tensor, mask: bool) -> Cause:
    shapes = f"{name} has the shape {tuple(found.shape)} and should have {tuple(expected.shape)}"
    if mask or not expected.is_floating_point():
        return Cause("attention_mask" if mask else "tokens", shapes, module, "compared by shape")
    if found.dim() == 4:
        return Cause("pixels", shapes, module, "compared by shape")
    id = "tokens" if name == "inputs_embeds" and found.shape[-1] == expected.shape[-1] else "unknown"
    return Cause(id, shapes, module, "compared by shape")


def _rows(module: str, name: str, order: list[int], rows: list[torch.Tensor]) -> Cause:
    """The same positions in another order."""
    runs = [start for start in range(1, len(order)) if order[start] != order[start - 1] + 1]
    if len(runs) == 1 and -1 not in order:
        cut = runs[0]
        words = f"the last {len(order) - cut} positions of {name} stand where the first should"
        words = words if order[0] else f"{name} has its parts in another order"
        return Cause("sequence_order", words, module, "the same rows, bit for bit, in another order")
    moved = sum(one not in (-1, number) for number, one in enumerate(order))
    gone = order.count(-1)
    words = f"{moved} of {len(order)} positions of {name} hold another's values" + (
        f", {gone} unknown ones" * bool(gone)
    )
    return Cause("tokens" if gone else "sequence_order", words, module, "compared row by row")


def image(module: str, found: torch.Tensor, expected: torch.Tensor) -> Cause:
    """What was done to pixel values, (images, 3, height, width)."""
    a, b = found.double(), expected.double()
    for order in itertools.permutations(range(3)):
        if list(order) != [0, 1, 2] and distance(a[:, list(order)], b) < FEW:
            words = f"the colour channels stand in the order {list(order)}"
            return Cause("channel_order", words, module, "with the order undone the pixels are equal",
                         _undone("with the order undone", found[:, list(order)], found, expected))  # fmt: skip
    fits, remade = _affine(a, b)
    left = distance(remade, b)
    same = all(math.isclose(slope, 1, rel_tol=CEILING) and abs(offset) < CEILING for slope, offset in fits)
    if left < CEILING and not same:
        words = ", ".join(f"{slope:.4g} × + {offset:.4g}" for slope, offset in fits)
        return Cause("image_mean_std", f"each channel is the right one with a factor and an offset: {words}", module,
                     "by least squares", _undone("with factor and offset undone", remade, found, expected))  # fmt: skip
    for order in itertools.permutations(range(3)):  # exchanged before each channel got its mean and deviation
        back, undone = a[:, list(order)], _affine(a[:, list(order)], b)[1]
        if list(order) != [0, 1, 2] and distance(undone, b) < CEILING:
            words = f"the colour channels stand in the order {list(order)}"
            return Cause("channel_order", words, module, "exchanged before mean and deviation were taken off",
                         _undone("with the order undone", undone, back, expected))  # fmt: skip
    for words, dims in (("mirrored", (3,)), ("upside down", (2,)), ("turned by 180°", (2, 3))):
        if distance(a.flip(dims), b) < FEW:
            return Cause("pixels", f"the image is {words}", module, "undone, the pixels are equal")
    # chosen: over the catalogue's faults of images the same one, resized otherwise, has 0.994, a mirrored one 0.51
    related = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    if related > 0.9:
        words = f"the same image, resized or cropped differently (cosine {related:.4f})"
        return Cause("interpolation", words, module, "not a matter of mean, deviation or channels")
    return Cause(
        "pixels", f"another image, or one prepared quite differently (cosine {related:.2f})", module, "compared"
    )


def _affine(found: torch.Tensor, expected: torch.Tensor) -> tuple[list[tuple[float, float]], torch.Tensor]:
    """The factor and offset of each channel that come nearest, and what was found with them undone."""
    fits, remade = [], torch.empty_like(found)
    for channel in range(3):
        x, y = expected[:, channel].flatten(), found[:, channel].flatten()
        spread = x.var(unbiased=False).clamp_min(1e-300)
        slope = ((x - x.mean()) * (y - y.mean())).mean() / spread
        offset = y.mean() - slope * x.mean()
        fits.append((slope.item(), offset.item()))
        remade[:, channel] = (found[:, channel] - offset) / (slope if slope else 1.0)
    return fits, remade


def _undone(change: str, remade: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> CounterTest:
    before, after = distance(found, expected), distance(remade.to(expected.dtype), expected)
    passed = after < CEILING
    return CounterTest(change, (before, after), (math.inf, 1.0 if passed else math.inf), passed)


def _share(found: torch.Tensor, expected: torch.Tensor) -> str:
    wrong = (found != expected) if not found.is_floating_point() else ~torch.isclose(found, expected.to(found.dtype))
    return f"{wrong.double().mean().item():.0%}"
