"""A name that is not there gets the one that was probably meant, and none where there is none."""

import pytest

from blip2nb.nearest import did_you_mean
from blip2nb.variants import VARIANTS


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bilp2-opt2.7b", " Did you mean 'blip2-opt-2.7b'?"),
        ("flant5", " Did you mean 'blip2-flan-t5-xl'?"),
        ("t5-xxl", " Did you mean 'blip2-flan-t5-xxl'?"),
        ("gpt2", ""),
    ],
)
def test_a_misspelt_and_a_shortened_name_get_what_was_meant_and_a_foreign_one_nothing(name, hint):
    assert did_you_mean(name, VARIANTS) == hint
