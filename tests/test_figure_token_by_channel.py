"""Position × channel: the differences are drawn where they are, and the title says where they sit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_up import WIDTHS, looking_at, texts, title
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from records import content

from blip2nb.display import plots
from blip2nb.display.figures.cells import cell_steps, largest_by_cell

NAME = "token_by_channel"
RNG = np.random.default_rng(0)
OURS = RNG.normal(0, 1, (17, 48))
NOISE = 1e-3 * RNG.normal(0, 1, OURS.shape)


def picture_of(residual: np.ndarray, width: float = 7.0, ours: np.ndarray | None = None, **about: Any) -> Figure:
    value, arrays = looking_at(OURS if ours is None else ours, residual, **about)
    picture = plots.FIGURES[NAME](content(value), arrays, width)
    FigureCanvasAgg(picture).draw()
    return picture


def panels(picture: Figure) -> tuple[Axes, Axes, Axes]:
    """The heat map, the sizes by channel, the sizes by position."""
    heat, above, beside = picture.axes[:3]
    return heat, above, beside


def line(axes: Axes) -> np.ndarray:
    return np.array(next(one for one in axes.lines if one.get_label() == "RMS").get_data())


def test_the_heat_map_is_the_difference_signed_and_symmetric_around_zero() -> None:
    heat, _, _ = panels(picture_of(NOISE))
    image = heat.images[0]
    np.testing.assert_allclose(image.get_array(), NOISE, rtol=1e-9, atol=1e-15)
    assert image.get_clim() == pytest.approx((-np.abs(NOISE).max(), np.abs(NOISE).max()))
    assert image.get_cmap().name == "PuOr"
    assert image.get_extent() == [-0.5, 47.5, 16.5, -0.5]  # the first position on top


def test_the_sides_show_the_rms_of_each_channel_and_position() -> None:
    _, above, beside = panels(picture_of(NOISE))
    np.testing.assert_allclose(line(above), [np.arange(48), np.sqrt((NOISE**2).mean(axis=0))], rtol=1e-6)
    np.testing.assert_allclose(line(beside), [np.sqrt((NOISE**2).mean(axis=1)), np.arange(17)], rtol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_at_full_size_a_lone_difference_is_still_seen(width: float) -> None:
    ours = np.ones((257, 1408))
    residual = np.zeros_like(ours)
    residual[101, 777] = -0.5
    picture = picture_of(residual, width, ours, heads=16)
    heat, above, _ = panels(picture)
    cells = np.asarray(heat.images[0].get_array())
    assert cells.size < residual.size / 8
    (down,), (across,) = np.nonzero(cells)
    assert cells[down, across] == -0.5
    left, right, bottom, top = heat.images[0].get_extent()
    assert top + (bottom - top) * down / cells.shape[0] <= 101 <= top + (bottom - top) * (down + 1) / cells.shape[0]
    assert (
        left + (right - left) * across / cells.shape[1] <= 777 <= left + (right - left) * (across + 1) / cells.shape[1]
    )
    assert heat.get_xlim() == (-0.5, 1407.5)
    assert heat.get_ylim() == (256.5, -0.5)
    np.testing.assert_allclose(line(above)[1][777], 0.5 / np.sqrt(257), rtol=1e-6)
    assert "one value, position 101, channel 777, holds 100 % of the squared error" in title(picture)


def test_a_cell_shows_the_largest_of_its_values_with_its_sign() -> None:
    values = np.array([[[1.0, -3.0, 0.5], [2.0, 0.0, -0.1]]])
    assert largest_by_cell(values, (2, 2)).tolist() == [[-3.0, 0.5]]
    assert largest_by_cell(values, (1, 1)).tolist() == values[0].tolist()
    assert np.isnan(largest_by_cell(np.array([[[1e9, np.nan]]]), (1, 2))).all()
    assert cell_steps((257, 1408), (96, 240)) == (3, 6)
    assert cell_steps((3, 20, 20), (96, 240)) == (1, 1)


def planted(where: tuple[Any, Any], size: float = 1.0) -> np.ndarray:
    residual = NOISE.copy()
    residual[where] += size
    return residual


@pytest.mark.parametrize(
    ("residual", "about", "words"),
    [
        (NOISE, {}, "Fault at vision.block.02: the error is everywhere: no channel holds more than 3.4 %"),
        (NOISE, {"fault": False}, "Only rounding at vision.block.02: the error is everywhere"),
        (planted(np.s_[:, 30]), {"heads": 4}, "one channel, 30, holds 99.99 % of the squared error"),
        (planted(np.s_[:, 24:36]), {"heads": 4}, "one head, 2, holds 99.99 % of the squared error"),
        (planted(np.s_[:, 24:28]), {}, "4 of 48 channels hold 99.99 % of the squared error"),
        (planted(np.s_[5, :]), {"heads": 4}, "one position, 5, holds 99.99 % of the squared error"),
        (planted(np.s_[5, 30], 10), {"heads": 4}, "one value, position 5, channel 30, holds"),
        (planted(np.s_[:, ::12]), {"heads": 4}, "4 of 48 channels hold 99.99 %"),
    ],
)  # fmt: skip
def test_the_title_says_where_the_error_sits(residual: np.ndarray, about: dict[str, Any], words: str) -> None:
    assert words in title(picture_of(residual, **about))


def test_half_of_two_heads_is_not_one_head() -> None:
    residual = NOISE.copy()
    residual[:, :24] *= 1.3  # 63 % of the square
    assert "everywhere" in title(picture_of(residual, heads=2))
    residual[:, :24] *= 2
    assert "one head, 0," in title(picture_of(residual, heads=2))


def test_where_lavis_is_as_lopsided_as_the_error_the_title_says_so() -> None:
    ours = np.ones((17, 48))
    ours[:, 7] = 1e3
    both = "one channel, 7, holds 99.99 % of the squared error, and 99.99 % of the squared values"
    assert both in title(picture_of(1e-3 * ours, ours=ours))
    assert title(picture_of(1e-3 * ours)).endswith("one channel, 7, holds 99.99 % of the squared error")


def test_channels_are_named_by_the_models_numbers_when_only_some_were_kept() -> None:
    picture = picture_of(planted(np.s_[:, 30]), heads=4, channels=144, channel_step=3)
    heat, _, _ = panels(picture)
    assert "one channel, 90," in title(picture)
    np.testing.assert_allclose(heat.get_xticks(), [-0.5, 11.5, 23.5, 35.5, 47.5])
    assert [label.get_text() for label in heat.get_xticklabels()] == ["0", "36", "72", "108", "144"]
    assert "every 3rd" in heat.get_xlabel()
    plain, _, _ = panels(picture_of(NOISE, channels=144, channel_step=3))
    named = {tick.get_loc(): tick.label1.get_text() for tick in plain.xaxis.get_major_ticks()}
    assert {int(text) / 3 for at, text in named.items() if 0 <= at < 48} == {at for at in named if 0 <= at < 48}


def test_every_heads_border_has_a_tick_even_if_not_all_are_numbered() -> None:
    ours = np.ones((9, 1408))
    heat, above, _ = panels(picture_of(1e-3 * ours, 3.4, ours, heads=16))
    np.testing.assert_allclose(heat.get_xticks(), np.arange(17) * 88 - 0.5)
    numbered = [label.get_text() for label in heat.get_xticklabels() if label.get_text()]
    assert numbered[:2] == ["0", "352"]
    borders = {one.get_xdata()[0] for one in above.lines if one.get_label() != "RMS" and len(one.get_xdata()) == 2}
    assert set(heat.get_xticks()[1:-1]) <= borders


def test_a_position_in_a_text_is_named_by_its_text() -> None:
    ours = RNG.normal(0, 1, (11, 48))
    residual = np.zeros_like(ours)
    residual[6] = 0.1
    assert "one position, 6 (␣photo), holds" in title(picture_of(residual, ours=ours, stage="language.block.01"))
    assert "one position, 6, holds" in title(picture_of(residual, ours=ours, stage="vision.block.01"))


def test_exact_zeros_are_said_and_have_their_row() -> None:
    picture = picture_of(np.zeros_like(OURS), fault=False)
    assert title(picture) == "Bit-equal at vision.block.02: there is no difference"
    assert not np.asarray(picture.axes[0].images[0].get_array()).any()
    _, above, beside = panels(picture)
    for axis, at in ((above.yaxis, line(above)[1]), (beside.xaxis, line(beside)[0])):
        shown = {tick.get_loc(): tick.label1.get_text().strip() for tick in axis.get_major_ticks()}
        assert shown == {at[0]: "bit-equal"}
        assert set(at) == {at[0]}
    assert [label.get_text() for label in picture.axes[3].get_xticklabels()] == ["", "bit-equal", ""]
    some = NOISE.copy()
    some[:, 9] = 0
    _, above, beside = panels(picture_of(some))
    named = {tick.get_loc(): tick.label1.get_text() for tick in above.yaxis.get_major_ticks()}
    assert named[line(above)[1][9]] == "bit-equal"
    assert "\nbit-equal" not in [tick.label1.get_text() for tick in beside.xaxis.get_major_ticks()]


def test_what_is_not_a_number_is_hatched_and_counted() -> None:
    residual = NOISE.copy()
    residual[3, 5] = np.nan
    residual[:, 40] = np.nan
    picture = picture_of(residual)
    heat, above, beside = panels(picture)
    assert np.ma.getmaskarray(heat.images[0].get_array()).sum() == 18
    assert heat.patch.get_hatch()
    spans = [(p.get_x(), p.get_width()) for p in above.patches if p.get_gid() == "NaN"]
    assert spans == [(39.5, 1.0)]
    assert np.flatnonzero(np.isnan(line(above)[1])).tolist() == [40]
    assert [patch for patch in beside.patches if patch.get_gid() == "NaN"] == []  # every position has numbers
    assert "2.2 % of the values are not a number" in title(picture)
    assert not panels(picture_of(NOISE))[0].patch.get_hatch()
    lost = picture_of(np.full_like(OURS, np.nan))
    assert title(lost) == "Not a number at vision.block.02: no difference can be shown"
    assert "bit-equal" not in texts(lost)


def test_infinity_is_no_number_and_does_not_stretch_the_scale() -> None:
    residual = NOISE.copy()
    residual[2, 2] = np.inf
    picture = picture_of(residual)
    assert picture.axes[0].images[0].get_clim()[1] == pytest.approx(np.abs(NOISE).max())
    assert "of the values are not a number" in title(picture)


def test_the_table_is_what_is_drawn() -> None:
    value, arrays = looking_at(OURS, NOISE)
    rows = plots.table(NAME, content(value), arrays)
    assert len(rows) == 48 + 17 + 48 * 17
    cells = np.array([row["value"] for row in rows if row["what"] == "difference"]).reshape(17, 48)
    np.testing.assert_allclose(cells, NOISE, rtol=1e-9, atol=1e-15)
    by_channel = [row["value"] for row in rows if row["what"] == "RMS by channel"]
    np.testing.assert_allclose(by_channel, np.sqrt((NOISE**2).mean(axis=0)))
    assert len({tuple(row) for row in rows}) == 1
