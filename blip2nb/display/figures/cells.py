"""Fewer dots than values: each dot shows the largest of the values that share it."""

from __future__ import annotations

import math

import numpy as np


def cell_steps(shape: tuple[int, ...], cells: tuple[int, int]) -> tuple[int, int]:
    """How many (rows, columns) of an image of this shape share a cell, so that there are at most `cells` of them."""
    down, across = (max(1, math.ceil(size / most)) for size, most in zip(shape[-2:], cells, strict=True))
    return down, across


def largest_by_cell(values: np.ndarray, steps: tuple[int, int]) -> np.ndarray:
    """(layers, height, width) to the largest difference, signed, in each cell of `steps` rows and columns.

    A picture has fewer dots than there are values: drawn as they are, lone differences would vanish. A cell with a NaN
    is NaN; what is missing of the last cells counts as zero.
    """
    layers, height, width = values.shape
    down, across = (math.ceil(size / step) for size, step in zip((height, width), steps, strict=True))
    padded = np.zeros((layers, down * steps[0], across * steps[1]))
    padded[:, :height, :width] = values
    blocks = padded.reshape(layers, down, steps[0], across, steps[1]).transpose(1, 3, 0, 2, 4)
    flat = blocks.reshape(down, across, -1)
    largest = np.abs(flat).argmax(axis=-1)  # a NaN counts as the largest
    return np.take_along_axis(flat, largest[..., None], axis=-1)[..., 0]
