"""From measured excesses of right models to the rate of false alarms: the statistics and tables of `false_alarms`.

An excess is the quotient of two rounding errors' norms. Were each error made of N independent values on a bell curve,
log(excess) would have a standard deviation of 1/√N, about a mean of zero. N is counted as the values that carry the
error (`alarm_rows.carrying`). Where there are very many, what is left is a small floor that does not shrink: the two
ways of computing are not equally exact. So what is looked at is z = log(excess) / √(1/N + floor²); its tail, fitted
once for all stages, says how seldom a stage of N values exceeds a threshold.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.results import table
from blip2nb.trace.metrics import THRESHOLD

Row = dict[str, Any]

PARTS = ("calibration", "held-out")
OTHER = "other processor"
UNITS = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}
TAIL_SHARE = 0.05  # the tail is fitted to the largest |z|: so many are 56 of the calibration runs, for two parameters
PER_MILLION = 1e6
_BINS = (0, 10, 30, 100, 200, 500, 1_000, 3_000, 10_000, 100_000, math.inf)  # chosen: rows of a table, no verdict
_MANY = 3_000  # values: 1/√N is then below 0.02, and the floor shows
_QUARTILE = 0.6745  # the median of |x| on a bell curve, in standard deviations
_FEWEST = 200  # values, below which a tail is not fitted: 5 % of them are 10, by choice the fewest for two parameters


@dataclasses.dataclass(frozen=True)
class Tail:
    """The distribution of the largest values: of all, `share` lie above `start`, and those follow a generalised Pareto
    distribution.

    Attributes:
        shape: above 0 for a heavy tail (a power), 0 for an exponential one, below 0 for one that ends.
        scale: how far it reaches, in the values' own unit.
    """

    start: float
    share: float
    shape: float
    scale: float
    count: int

    def beyond(self, value: float) -> float:
        """The probability of more than `value`, by the fit, and never below what an exponential tail would give: a
        few thousand values cannot prove that a tail ends."""
        over = max(value - self.start, 0) / self.scale
        if self.shape <= 0:
            return self.share * math.exp(-over)
        return self.share * (1 + self.shape * over) ** (-1 / self.shape)


def fit_tail(values: np.ndarray, share: float = TAIL_SHARE) -> Tail:
    """Fit the largest `share` of the values by probability-weighted moments (Hosking and Wallis, 1987)."""
    ordered = np.sort(values)
    count = max(int(len(ordered) * share), 10)  # as of `_FEWEST`
    start = float(ordered[-count - 1])
    over = ordered[-count:] - start
    mean = float(over.mean())
    weighted = float((over * (count - np.arange(1, count + 1) + 0.35) / count).mean())
    shape = 2 - mean / (mean - 2 * weighted)
    # the shape of an exponential tail's fit: its mean is its scale
    scale = mean if shape <= 0 else 2 * mean * weighted / (mean - 2 * weighted)
    return Tail(start, count / len(ordered), shape, scale, count)


def page(rows: Sequence[Row], stamp: Mapping[str, Any]) -> str:
    """All tables, with machine and versions beneath them."""
    parts = ["# How far apart two right models are", _INTRODUCTION, *_counts(rows), *_by_kind(rows), *_by_size(rows)]
    parts += [*_tail(rows), *_other(rows), *_half(rows), *_arrivals(rows), *_extremes(rows), *_planted(rows)]
    parts += ["## Machine and versions", "\n".join(f"- {what}: {value}" for what, value in stamp.items())]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = (
    "Written by `python -m benchmarks.false_alarms`. LAVIS and transformers on the same weights, the eps of the post "
    "layer norm repaired: whatever is called a fault here is a false alarm. A run is one pair on one set of weights, "
    "input and number of threads: a twin, or a block of a released model at its full size, with weights and inputs of "
    "scales from 1e-3 to 1e3, strong channels, and in every fourth run a single value a thousand times as large as the "
    "rest. Thresholds are chosen from the calibration runs; the held-out runs, of other seeds, only count."
)


def judged(rows: Iterable[Row], dtype: str, part: str = "") -> list[Row]:
    """The stages of right models at which something is computed."""
    wanted = (row for row in rows if row["dtype"] == dtype and row["set"] in ([part] if part else PARTS))
    return [{**stage, "run": row["run"]} for row in wanted for stage in row["stages"] if stage["excess"] is not None]


def alarms(stages: Iterable[Row], threshold: float = THRESHOLD, measure: str = "excess") -> list[Row]:
    """Those that would be called a fault."""
    return [stage for stage in stages if not stage[measure] <= threshold]


def _counts(rows: Sequence[Row]) -> list[str]:
    lines = []
    for part in PARTS:
        runs = {row["run"] for row in rows if row["set"] == part}
        twins = sum(run.startswith("twin") for run in runs)
        stages = judged(rows, "float32", part)
        if not stages:
            continue
        excesses = [stage["excess"] for stage in stages]
        equal = sum(stage["local"] == 0 for stage in stages)
        arrivals = [stage["arrival"] for row in rows for stage in row["stages"] if _of(row, part, "float32")]
        cells = [part, len(runs), twins, len(runs) - twins, len(stages), equal, len(alarms(stages))]
        cells += [min(excesses), max(excesses), max(value for value in arrivals if value is not None)]
        lines.append([*map(str, cells[:7]), *map(_number, cells[7:])])
    head = ["set", "runs", "twins", "blocks", "stages judged", "bit-equal", f"alarms at {THRESHOLD:g}"]
    said = (
        f"In float32. No alarm among n stages bounds their rate: below 3/n with 95 % confidence, "
        f"{3e6 / max(len(judged(rows, 'float32', 'held-out')), 1):.0f} in a million for the held-out ones. The fit "
        "below says more."
    )
    return ["## Alarms", said, table([*head, "smallest excess", "largest", "largest arrival error"], lines)]


def _of(row: Row, part: str, dtype: str) -> bool:
    return row["set"] == part and row["dtype"] == dtype


def _spread_row(name: str, stages: Sequence[Row], measure: str = "excess") -> list[str]:
    values = np.array([stage[measure] for stage in stages])
    cuts = [values.min(), np.quantile(values, 0.5, method="lower"), np.quantile(values, 0.999, method="higher")]
    return [name, str(len(values)), *map(_number, [*cuts, values.max()])]


def _by_kind(rows: Sequence[Row]) -> list[str]:
    stages = judged(rows, "float32")
    lines = []
    for kind, here in _grouped(stages, lambda stage: stage["kind"]).items():
        logs = np.log([stage["excess"] for stage in here if stage["local"]])
        equal = sum(stage["local"] == 0 for stage in here) / len(here)
        lines.append([*_spread_row(kind, here), f"{equal:.0%}", _number(float(logs.std())) if len(logs) > 1 else "–"])
    head = ["kind of stage", "judged", "min", "median", "99.9 %", "max", "bit-equal", "spread of log where not"]
    return ["## The excess in float32, by kind of stage", "Calibration and held-out together.", table(head, lines)]


def _by_size(rows: Sequence[Row]) -> list[str]:
    stages = [stage for stage in judged(rows, "float32") if stage["local"]]
    floor = floor_of(rows)
    lines = []
    for low, high in itertools.pairwise(_BINS):
        here = [stage for stage in stages if low <= stage["carrying"] < high]
        if len(here) < 5:  # chosen: no spread is told of fewer
            continue
        logs = np.log([stage["excess"] for stage in here])
        z = np.array([stage["z"] for stage in scored(here, floor)])
        name = f"{low:,} to {high:,.0f}" if high < math.inf else f"over {low:,}"
        expected = 1 / math.sqrt(np.median([stage["carrying"] for stage in here]))
        cells = [logs.mean(), logs.std(), expected, z.std(), np.abs(z).max(), math.exp(np.abs(logs).max())]
        lines.append([name, str(len(here)), *map(_number, cells)])
    said = (
        "Where the two are not bit-equal. N is the number of values that carry the error; two independent errors of N "
        f"values would give log(excess) a spread of 1/√N. z = log(excess) / √(1/N + {floor:.4f}²), with the floor "
        f"measured on the calibration runs' stages of over {_MANY:,} values."
    )
    head = ["N", "judged", "mean of log", "its spread", "1/√N", "spread of z", "farthest z", "farthest excess, as ≥ 1"]
    return ["## How the spread shrinks with the number of values", said, table(head, lines)]


def floor_of(rows: Sequence[Row]) -> float:
    """What is left of the spread of log(excess) where very many values carry the error, by its median: a few products
    of large matrices are added up in another order on the two sides, and stand apart."""
    stages = judged(rows, "float32", "calibration")
    many = [abs(math.log(one["excess"])) for one in stages if one["local"] and one["carrying"] > _MANY]
    return float(np.median(many)) / _QUARTILE if many else 0.0


def scored(stages: Iterable[Row], floor: float) -> list[Row]:
    """The stages with `spread`, what log(excess) is expected to vary by, and z, how often that it is from 0."""
    out = []
    for stage in stages:
        spread = math.sqrt(1 / stage["carrying"] + floor**2)
        out.append({**stage, "spread": spread, "z": math.log(stage["excess"]) / spread})
    return out


def _tail(rows: Sequence[Row]) -> list[str]:
    floor = floor_of(rows)
    parts = [scored((one for one in judged(rows, "float32", part) if one["local"]), floor) for part in PARTS]
    few = [one for one in parts[0] if one["carrying"] <= _MANY]
    if len(few) < _FEWEST or not parts[1]:
        return []
    tail = fit_tail(np.abs([one["z"] for one in few]))
    plain = fit_tail(np.abs(np.log([one["excess"] for one in parts[0]])))
    lines = []
    for threshold in (1.25, 1.5, 2.0, 2.5, 3.0, 4.0):  # around `THRESHOLD`, for comparison
        far = math.log(threshold)
        rates = [plain.beyond(far), float(np.mean([tail.beyond(far / one["spread"]) for one in few]))]
        rates += [tail.beyond(far / math.sqrt(1 / count + floor**2)) for count in (30, 100, 1_000)]
        seen = [f"{sum(abs(math.log(one['excess'])) > far for one in part)} of {len(part)}" for part in parts]
        smallest = f"{math.sqrt(threshold**2 - 1):.2f}"
        lines.append([f"{threshold:g}", *(_number(rate * PER_MILLION) for rate in rates), *seen, smallest])
    said = (
        f"Two fits to the largest {tail.share:.0%} on the calibration runs. Of |log(excess)| over all stages, whatever "
        f"N, {plain.count} values above {plain.start:.3f}: shape {plain.shape:+.2f}, scale {plain.scale:.3f}. Of |z| "
        f"over those with N up to {_MANY:,}, {tail.count} values above {tail.start:.2f}: shape {tail.shape:+.2f}, "
        f"scale {tail.scale:.2f}. A shape of 0 is an exponential tail, above 0 a heavier one, below 0 one that "
        "ends; where it is below 0, an exponential tail is taken. Rates are in a million stages, those bit-equal left "
        "out, of an excess above T or below 1/T. A fault of f times the stage's own rounding gives an excess of "
        "√(1 + f²)."
    )
    head = ["threshold T", "by log alone", f"by z, N up to {_MANY:,}", "at N = 30", "at N = 100", "at N = 1000"]
    head += ["beyond it in calibration", "held-out", "smallest fault it sees, in own roundings"]
    return ["## The tail, and what a threshold costs", said, table(head, lines), *_few(parts, tail, floor)]


def _few(parts: Sequence[Sequence[Row]], tail: Tail, floor: float) -> list[str]:
    """What a threshold that depends on N would have to be, for one alarm in a million stages."""
    far = _where(tail, 1 / PER_MILLION)
    lines = [
        [f"{count:,}", _number(math.exp(far * math.sqrt(1 / count + floor**2)))]
        for count in (10, 30, 100, 300, 1_000, 3_000)
    ]
    fewest = min(stage["carrying"] for part in parts for stage in part)
    said = (
        f"By z, one alarm in a million stages is at {far:.1f} spreads. Which threshold that is depends on how many "
        f"values carry the error; the fewest seen were {fewest:.0f}."
    )
    return [said, table(["N", "threshold for one in a million"], lines)]


def _other(rows: Sequence[Row]) -> list[str]:
    """LAVIS computing with other instructions than transformers."""
    stages = judged(rows, "float32", OTHER)
    if not stages:
        return []
    lines = []
    for kind, here in _grouped(stages, lambda stage: stage["kind"]).items():
        equal = sum(stage["local"] == 0 for stage in here) / len(here)
        most = max(here, key=lambda stage: abs(math.log(stage["excess"])))
        lines.append([*_spread_row(kind, here), f"{equal:.0%}", f"{most['stage']}, {most['run']}"])
    said = (
        "LAVIS here computed without wide vectors (MKL_CBWR=COMPATIBLE and the like), as a recording from another "
        f"machine may have been made: {len({stage['run'] for stage in stages})} runs, {len(stages)} stages, "
        f"{len(alarms(stages))} alarms at {THRESHOLD:g}. Sums of many products are then added up in another order, and "
        "the two sides are not equally exact: that moves the excess as a whole, and does not shrink with N."
    )
    head = ["kind of stage", "judged", "min", "median", "99.9 %", "max", "bit-equal", "farthest from 1"]
    return ["## A recording from another processor", said, table(head, lines)]


def _half(rows: Sequence[Row]) -> list[str]:
    parts: list[str] = []
    for dtype in ("bfloat16", "float16"):
        stages = judged(rows, dtype)
        if not stages:
            continue
        lines = []
        for kind, here in _grouped(stages, lambda stage: stage["kind"]).items():
            whole = _spread_row(kind, [stage for stage in here if "whole" in stage], "whole")
            lines.append([*_spread_row(kind, here), *whole[2:]])
        alone = [f"{name}, same weights" for name in ("min", "median", "99.9 %", "max")]
        whole = [f"{name}, float32" for name in ("min", "median", "99.9 %", "max")]
        parts += [
            f"### {dtype}",
            table(["kind of stage", "judged", *alone, *whole], lines),
            _half_thresholds(rows, dtype),
        ]
    if not parts:
        return []
    said = (
        "transformers in half precision, against LAVIS in float32. *Same weights*: the float64 referee has the "
        "half-precision weights and inputs, as `trace.compare` makes it; LAVIS's distance to it then holds the "
        "rounding of weights and inputs, and is infinite at a look-up, where nothing else is rounded. *Float32*: "
        "the referee has the float32 weights and inputs; the half-precision output is then far from it and LAVIS "
        "near, so that the quotient is near 0, and a fault is what makes it grow. Stages that transformers keeps "
        "in float32 have the excess of float32 in both."
    )
    return ["## Half precision", said, *parts]


# thresholds for comparison; a hundredth is the limit that `metrics.unit` has for the second
_HALF_MEASURES = {"excess": ("same weights", (2, 3, 5)), "whole": ("float32", (0.003, 0.01, 0.1))}


def _half_thresholds(rows: Sequence[Row], dtype: str) -> str:
    lines = []
    for measure, (words, thresholds) in _HALF_MEASURES.items():
        parts = [_in_half(judged(rows, dtype, part), measure) for part in PARTS]
        if len(parts[0]) < _FEWEST or not parts[1]:
            continue
        tail = fit_tail(np.log(parts[0]))
        for threshold in thresholds:
            seen = [f"{sum(value > threshold for value in part)} of {len(part)}" for part in parts]
            rate = _number(tail.beyond(math.log(threshold)) * PER_MILLION)
            both = [_number(max(max(part) for part in parts)), _number(tail.shape)]
            lines.append([words, *both, f"{threshold:g}", *seen, rate])
    said = (
        "Only where something is computed in half precision; look-ups are left out, and what transformers keeps in "
        "float32. The rate is by the tail of log(excess), fitted on the calibration runs."
    )
    head = ["referee", "largest", "shape of the tail", "threshold", "above it in calibration", "held-out"]
    return said + "\n\n" + table([*head, "per million, by the fit"], lines)


def _in_half(stages: Iterable[Row], measure: str) -> list[float]:
    return [stage[measure] for stage in stages if not _single(stage) and stage["kind"] != "look-up"]


def _single(stage: Row) -> bool:
    """Whether transformers keeps a stage in float32 in half precision too, or it came out bit-equal."""
    return stage["whole"] == stage["excess"]


def _where(tail: Tail, probability: float) -> float:
    """The value that is exceeded with a probability."""
    low, high = tail.start, tail.start + 1000 * tail.scale
    for _ in range(100):  # halvings: more than float64 can tell apart
        middle = (low + high) / 2
        low, high = (middle, high) if tail.beyond(middle) > probability else (low, middle)
    return high


def _arrivals(rows: Sequence[Row]) -> list[str]:
    lines = []
    for dtype, unit in UNITS.items():
        here = [stage for row in rows if row["dtype"] == dtype and row["set"] in PARTS for stage in row["stages"]]
        arrived = _grouped([stage for stage in here if stage["arrival"] is not None], lambda stage: stage["kind"])
        for kind, stages in arrived.items():
            values = np.array([stage["arrival"] for stage in stages])
            local = np.array([stage["local"] for stage in stages if stage["local"] is not None])
            cells = [f"{np.mean(values == 0):.0%}", _number(np.median(values)), _number(values.max())]
            cells += [_number(values.max() / unit)]
            cells += [_number(np.median(local) / unit), _number(local.max() / unit)] if len(local) else ["–", "–"]
            lines.append([dtype, kind, str(len(values)), *cells])
    said = (
        "What reaches a stage when all before it gave the reference's output. u is the largest relative error of one "
        "rounding: 2⁻²⁴ in float32, 2⁻⁸ in bfloat16, 2⁻¹¹ in float16. Of an addition between two stages both terms and "
        "the sum are rounded. The local error beside it is the whole of a stage's error in that dtype."
    )
    head = ["dtype", "kind of stage", "arrivals", "exactly 0", "median", "max", "max ÷ u"]
    return ["## Arrival errors", said, table([*head, "local error ÷ u, median", "max"], lines)]


def _extremes(rows: Sequence[Row]) -> list[str]:
    stages = sorted(judged(rows, "float32"), key=lambda stage: -abs(math.log(stage["excess"])))[:12]
    lines = [
        [_number(one["excess"]), one["stage"], str(one["n"]), _number(one.get("carrying", 0)), one["run"]]
        for one in stages
    ]
    return ["## The farthest from 1, in float32", table(["excess", "stage", "values", "N", "run"], lines)]


def _planted(rows: Sequence[Row]) -> list[str]:
    lines = []
    for dtype in UNITS:
        found = [stage for row in rows if _of(row, "planted", dtype) for stage in row["stages"]]
        found = [stage for stage in found if dtype == "float32" or not _single(stage)]
        for size, here in _grouped(found, lambda stage: stage["wanted"]).items():
            excess = [stage["excess"] for stage in here]
            whole = [stage["whole"] for stage in here if "whole" in stage]
            cells = [_number(min(excess)), _number(max(excess))]
            cells += [_number(min(whole)), _number(max(whole))] if whole else ["–", "–"]
            lines.append([dtype, f"{size:g}", str(len(here)), *cells])
    if not lines:
        return []
    said = (
        "The eps of one norm changed, so far that the stage's output changes by a multiple of its own rounding in that "
        "dtype. Stages that are kept in float32 are left out of the half-precision lines."
    )
    head = ["dtype", "fault ÷ own rounding", "planted", "excess, min", "max", "float32 referee, min", "max"]
    return ["## Faults of a known size", said, table(head, lines)]


def _grouped(stages: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for stage in stages:
        groups[key(stage)].append(stage)
    return dict(sorted(groups.items()))


def _number(value: float) -> str:
    return f"{value:.3g}"
