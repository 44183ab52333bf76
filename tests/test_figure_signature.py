"""The signature: a planted fault is named as what it is, and rounding is not named at all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import looking_at, texts, title
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from records import content

from blip2nb.display import plots

NAME = "signature"
RNG = np.random.default_rng(0)
OURS = RNG.normal(0, 1, (60, 48))


def rounding(values: np.ndarray) -> np.ndarray:
    """What is lost when the values are kept as float32."""
    return values.astype(np.float32).astype(float) - values


def picture_of(residual: np.ndarray, ours: np.ndarray = OURS, width: float = 7.0, **about: Any) -> Figure:
    value, arrays = looking_at(ours, residual, **about)
    picture = plots.FIGURES[NAME](content(value), arrays, width)
    FigureCanvasAgg(picture).draw()
    return picture


def shares(residual: np.ndarray, ours: np.ndarray = OURS) -> dict[str, float]:
    """Pattern -> the share of the squared residual that it explains."""
    seen = looking_at(ours, residual)
    rows = plots.table(NAME, content(seen[0]), seen[1])
    return {row["pattern"]: row["explained"] for row in rows if row["pattern"]}


def fit(axes: Axes) -> np.ndarray:
    return np.array(next(line for line in axes.lines if line.get_label() == "fit").get_data())


def activation() -> tuple[np.ndarray, np.ndarray]:
    """gelu, and tanh's approximation to it minus gelu."""
    x = torch.from_numpy(RNG.normal(0, 1.5, (257, 176)))
    exact, tanh = (torch.nn.functional.gelu(x, approximate=kind).numpy() for kind in ("none", "tanh"))
    return exact, tanh - exact


BY_CHANNEL = RNG.normal(0, 1, (1, 48))
BY_POSITION = 1 + RNG.uniform(0, 3, (60, 1))
GELU, TANH = activation()


@pytest.mark.parametrize(
    ("residual", "words"),
    [
        (1e-3 * OURS, "residual = 0.001 × value: a scale (explains"),
        (-2e-4 * OURS, "residual = -2e-4 × value: a scale"),
        (0.01 + 0 * OURS, "residual = 0.01, an offset: a bias"),
        (0.01 - 0.02 * OURS, "residual = 0.01 − 0.02 × value: a bias and a scale"),
        (0.02 * BY_CHANNEL + 0 * OURS, "the same in each channel, up to 0.0"),
        (0.02 * BY_CHANNEL * OURS, "in each channel a scale of its own, up to 0.0"),
        (1e-5 * BY_POSITION**2 * np.sign(BY_POSITION - 2) * OURS, "in each position a scale of its own"),
        (1e-3 * OURS**2, "a curve over the value: an activation function"),
    ],
)
def test_a_planted_fault_is_named(residual: np.ndarray, words: str) -> None:
    assert words in title(picture_of(residual + rounding(OURS + residual)))


def test_another_activation_function_is_a_curve() -> None:
    picture = picture_of(TANH, GELU)
    assert "a curve over the value: an activation function (explains" in title(picture)
    found = shares(TANH, GELU)
    assert found["curve"] > 0.8 > 0.2 > found["line"]
    x, y = fit(picture.axes[0])
    near = (x > 1.0) & (x < 3.0)  # where gelu has one inverse: the curve is the difference itself
    inverse = np.interp(x[near], *(np.sort(one.ravel()) for one in (GELU[GELU > 0.5], GELU[GELU > 0.5])))
    expected = np.interp(inverse, *zip(*sorted(zip(GELU.ravel(), TANH.ravel(), strict=True)), strict=True))
    assert np.abs(y[near] - expected).max() < 0.2 * np.abs(TANH).max()


def test_rounding_is_not_named() -> None:
    exact = OURS * 1.7
    picture = picture_of(rounding(exact), exact, fault=False)
    assert title(picture).startswith("Only rounding at vision.block.02: no pattern in the residual")
    assert max(shares(rounding(exact), exact).values()) < 0.05
    assert "no pattern in the residual, or a mixed one" in title(picture_of(rounding(exact), exact))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(2, 30))
def test_noise_is_not_named_however_few_values_there_are(seed: int, positions: int, channels: int) -> None:
    rng = np.random.default_rng(seed)
    ours, noise = rng.normal(0, 1, (2, positions, channels))
    value, arrays = looking_at(ours, noise, fault=False)
    words = plots.alt_text(NAME, content(value), arrays)
    if positions * channels > 60:  # a handful of points can lie on a line
        assert "follow" in words or "no pattern" in words


def test_one_wrong_channel_of_many_is_said_to_be_few_values() -> None:
    ours = RNG.normal(0, 1, (100, 400))
    residual = rounding(ours)
    residual[:, 17] += 0.1 * RNG.normal(0, 1, 100)
    picture = picture_of(residual, ours)
    assert "of values hold 99.99 % of the squared residual; the rest follows no pattern" in title(picture)
    assert any("beyond" in words for words in texts(picture))
    arrows = [line for line in picture.axes[0].lines if line.get_label() == "beyond"]
    assert {line.get_marker() for line in arrows} >= {"^", "v"}


@pytest.mark.parametrize(("value", "residual"), [(0.5, 1e6), (1e4, -1e4), (1e6, 1e6)])
def test_one_outlier_does_not_tilt_the_line(value: float, residual: float) -> None:
    ours, off = OURS.copy(), 1e-3 * OURS
    ours[3, 3], off[3, 3] = value, residual
    picture = picture_of(off, ours)
    assert "residual = 0.001 × value: a scale" in title(picture)
    assert "but a few values are far off it" in title(picture)
    x, y = fit(picture.axes[0])
    np.testing.assert_allclose(y, 1e-3 * x, atol=1e-9)


def test_an_outlier_on_the_line_is_not_called_far_off() -> None:
    ours = OURS.copy()
    ours[3, 3] = 1e4
    words = title(picture_of(1e-3 * ours, ours))
    assert "residual = 0.001 × value: a scale (explains 100 %)" in words
    assert "far off" not in words


def test_an_outliers_rounding_is_no_scale() -> None:
    ours = OURS.copy()
    ours[:, 5] *= 1e4  # rounds to 1e4 times as much: a line through these alone would explain nearly everything
    assert "a scale" not in title(picture_of(rounding(1.1 * ours), ours, fault=False))


def test_what_is_named_explains_at_least_half() -> None:
    scale, noise = 1e-3 * OURS, 1e-3 * RNG.normal(0, 1, OURS.shape)
    assert "× value: a scale (explains" in title(picture_of(scale + 0.5 * noise))
    loud = scale + 1.5 * noise
    assert "no pattern in the residual" in title(picture_of(loud))
    assert 0.2 < shares(loud)["scale"] < 0.45
    x = OURS.ravel()
    found = shares(scale + 0.5 * noise)["scale"]
    residual = (scale + 0.5 * noise).ravel()
    plain = 1 - ((residual - x * (x @ residual) / (x @ x)) ** 2).sum() / (residual**2).sum()
    assert found == pytest.approx(plain, abs=0.03)  # the definition, of all values


def test_the_cloud_holds_every_value_and_counts_it_once() -> None:
    residual = 1e-3 * OURS + 1e-4 * RNG.normal(0, 1, OURS.shape)
    picture = picture_of(residual)
    hexagons = next(c for c in picture.axes[0].collections if isinstance(c, PolyCollection))
    assert np.asarray(hexagons.get_array()).sum() == OURS.size
    middles = np.asarray(hexagons.get_offsets())
    right, top = picture.axes[0].get_xlim()[1], picture.axes[0].get_ylim()[1]
    weights = np.asarray(hexagons.get_array())
    assert np.average(middles[:, 0], weights=weights) == pytest.approx(OURS.mean(), abs=right / 48)
    assert np.average(middles[:, 1] ** 2, weights=weights) == pytest.approx((residual**2).mean(), rel=0.05)
    assert picture.axes[0].get_xlim() == (-right, right)
    assert picture.axes[0].get_ylim() == (-top, top)
    rows = [row for row in plots.table(NAME, *looking_at(OURS, residual)) if row["count"] is not None]
    assert sum(row["count"] for row in rows) == OURS.size
    assert len(rows) == len(middles)


def test_the_bars_are_the_shares_and_the_named_one_stands_out() -> None:
    residual = 1e-3 * OURS
    picture = picture_of(residual)
    bars = picture.axes[1].patches
    assert [bar.get_width() for bar in bars] == pytest.approx(list(shares(residual).values()))
    names = [label.get_text() for label in picture.axes[1].get_yticklabels()]
    assert names == list(shares(residual))
    colours = [bar.get_facecolor() for bar in bars]
    assert [name for name, colour in zip(names, colours, strict=True) if colours.count(colour) == 1] == ["scale"]


def test_bit_equal_values_are_counted() -> None:
    residual = 1e-3 * OURS
    residual[:15] = 0
    assert any("25 % bit-equal" in words for words in texts(picture_of(residual)))
    picture = picture_of(np.zeros_like(OURS), fault=False)
    assert title(picture) == "Bit-equal at vision.block.02: there is no difference"
    assert any("100 % bit-equal" in words for words in texts(picture))
    assert [line for line in picture.axes[0].lines if line.get_label() == "fit"] == []
    hexagons = next(c for c in picture.axes[0].collections if isinstance(c, PolyCollection))
    assert set(np.abs(np.asarray(hexagons.get_offsets())[:, 1]).round(6)) == {0.0}


def test_what_is_not_a_number_is_left_out_and_counted() -> None:
    residual = 1e-3 * OURS
    residual[:6] = np.nan
    residual[7, 7] = np.inf
    picture = picture_of(residual)
    assert "residual = 0.001 × value: a scale" in title(picture)
    assert "10 % of the values are not a number" in title(picture)
    assert any("289 NaN" in words for words in texts(picture))
    lost = picture_of(np.full_like(OURS, math.nan))
    assert title(lost) == "Not a number at vision.block.02: no difference can be shown"
    assert not any(plots.table(NAME, *looking_at(OURS, np.full_like(OURS, np.nan)))[n]["explained"] for n in range(7))


@pytest.mark.parametrize("shape", [(1, 48), (60, 1), (1, 1), (2, 2)])
def test_a_sliver_can_be_drawn(shape: tuple[int, int]) -> None:
    ours = RNG.normal(0, 1, shape)
    assert "vision.block.02" in title(picture_of(1e-3 * ours, ours, 3.4))
    assert "vision.block.02" in title(picture_of(1e-3 + 0 * ours, np.zeros(shape), 3.4))
