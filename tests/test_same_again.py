"""The same verification says the same in every process: nothing depends on the order in which Python keeps a set."""

import types

import pytest
import torch

from blip2nb.families.captioners.stages import parameter_pairs
from blip2nb.proof.knowledge import _Held
from blip2nb.trace.diagnosis.known import attribute_differences
from blip2nb.trace.tape import attributes, recording
from blip2nb.variants import variant
from blip2nb.weights.hashing import sha256_of

TWIN = variant("tiny-blip2-opt-2.7b")


def test_attributes_that_differ_are_named_in_one_order():
    names = [f"attribute_{number}" for number in range(30)]  # that a set has them in order is 1 chance in 10^32
    reference, candidate = torch.nn.Identity(), torch.nn.Identity()
    vars(reference).update(dict.fromkeys(names, 1))
    vars(candidate).update(dict.fromkeys(names, 2))
    found = attribute_differences(attributes(reference), candidate, [("stage", "", "")])
    assert [one.attribute for one in found] == sorted(names)


def test_parameters_that_hold_the_same_values_are_named_in_one_order():
    """A value may be known in several dtypes: its own is named first, the others by the name of their dtype."""
    whole = [name for name, (_, rows) in parameter_pairs(TWIN).items() if rows is None][:24]
    expected, digests = [], {}
    values = [torch.full((2,), float(number)) for number in range(8)]
    for number, value in enumerate(values):
        names = whole[3 * number : 3 * number + 3]
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        digests |= {name: sha256_of(value.to(dtype)) for name, dtype in zip(names, dtypes, strict=True)}
        expected.append([parameter_pairs(TWIN)[name][0] for name in names])
    tape = types.SimpleNamespace(metadata={"parameters": digests})
    subject = types.SimpleNamespace(recording=tape, variant=TWIN)
    found = [_Held(subject).named(value) for value in values]
    assert found == expected


def test_of_several_arguments_that_a_module_lacks_the_first_is_named():
    model = torch.nn.Sequential(torch.nn.Identity())
    places = [f"0:argument_{number}" for number in range(30)]
    with pytest.raises(TypeError, match="no argument 'argument_0'"), recording(model, places):
        pass
