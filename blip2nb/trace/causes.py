"""What a fault may come from: the causes the kit knows by name, and what speaks for one."""

from __future__ import annotations

import dataclasses

CAUSES: dict[str, str] = {
    "eps": "another eps",
    "activation": "another activation function",
    "attention_scale": "attention scores scaled differently",
    "logits_scale": "logits scaled differently",
    "embedding_scale": "embeddings scaled differently",
    "scale": "a constant factor",
    "head_count": "another number of heads",
    "heads_permuted": "heads in another order",
    "qkv_swapped": "query, key and value exchanged",
    "qkv_missing": "query, key or value missing",
    "bias_missing": "a bias that is missing or zero",
    "bias_shifted": "a bias shifted by some channels",
    "bias_changed": "another bias",
    "transposed": "a transposed matrix",
    "norms_swapped": "norms exchanged",
    "norm_kind": "another kind of norm",
    "layers_swapped": "layers exchanged",
    "layer_repeated": "one layer in another's place",
    "weight_swapped": "another tensor in its place",
    "weight_missing": "a weight that is zero",
    "weight_changed": "values of a weight that differ",
    "rounded_weights": "weights rounded to half precision",
    "position_shifted": "position embeddings shifted",
    "position_interpolated": "position embeddings interpolated",
    "position_order": "position embeddings in another order",
    "position_missing": "position embeddings missing",
    "position_bias_missing": "a relative position bias that is missing",
    "position_bias": "another relative position bias",
    "image_mean_std": "another mean or standard deviation of the pixels",
    "interpolation": "the image resized differently",
    "channel_order": "colour channels in another order",
    "pixels": "other pixel values",
    "prompt": "another text",
    "bos_missing": "no beginning-of-sequence token",
    "newline_missing": "no line break behind the text",
    "padding_side": "padding on the other side",
    "tokens": "other tokens",
    "sequence_order": "image and text in another order",
    "tied": "two weights tied that should be separate",
    "attention_mask": "another attention mask",
    "dropout": "dropout left on",
    "residual": "a residual branch missing, doubled or added elsewhere",
    "not_a_number": "NaN or infinity in a weight",
    "overflow": "numbers too large for the precision",
    "precision": "computed in lower precision than the rest",
    "attribute": "another setting of the module",
    "unknown": "nothing the kit knows by name",
}
"""id -> what people call it."""


@dataclasses.dataclass(frozen=True)
class CounterTest:
    """What was changed, and what became of the error there.

    Attributes:
        change: what was done, as the end of a sentence: "with eps 1e-05".
        local_error, excess: before and after; an excess is None where the stage does not run in float64.
        passed: after it only rounding is left.
    """

    change: str
    local_error: tuple[float, float]
    excess: tuple[float | None, float | None]
    passed: bool

    def __str__(self) -> str:
        before, after = self.local_error
        return f"{self.change} the error falls from {before:.1e} to {after:.1e}" + (", rounding" if self.passed else "")


@dataclasses.dataclass(frozen=True)
class Cause:
    """One likely reason of a fault.

    Attributes:
        id: one of `CAUSES`.
        words: what is wrong, in a sentence's half: "eps is 1e-06, the reference has 1e-05".
        module: the candidate's module or parameter.
        evidence: what the numbers show.
        counter_test: what happened when it was put right; None where that was not tried.
    """

    id: str
    words: str
    module: str
    evidence: str = ""
    counter_test: CounterTest | None = None

    @property
    def proven(self) -> bool:
        """Whether putting it right leaves rounding alone."""
        return self.counter_test is not None and self.counter_test.passed

    def __str__(self) -> str:
        test = f" ({self.counter_test})" if self.counter_test else ""
        return f"{self.words}{test}"
