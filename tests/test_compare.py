"""trace.compare serves any two torch modules: here torchvision's ViT against transformers', and small made-up ones."""

import copy
import math

import pytest
import torch
from torch import nn

from blip2nb import trace
from blip2nb.proof.rows import of_comparison
from blip2nb.trace.diagnosis.known import attribute_differences
from blip2nb.trace.diagnosis.repairs import repaired
from blip2nb.trace.metrics import ARRIVAL_TOLERANCE, THRESHOLD, compare_logits, distance
from blip2nb.trace.stage import places
from blip2nb.trace.tape import Tape, attributes, recording, save_tape


@pytest.fixture(scope="module")
def vits():
    """One ViT in two libraries, with the same weights: torchvision's fused attention, transformers' separate one."""
    from torchvision.models.vision_transformer import VisionTransformer
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    theirs = VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    config = ViTConfig(
        image_size=32, patch_size=8, num_hidden_layers=4, num_attention_heads=4, hidden_size=32, intermediate_size=64,
        num_labels=10, layer_norm_eps=1e-6,
    )  # fmt: skip
    ours = ViTForImageClassification(config).eval()
    state = ours.state_dict()
    source = theirs.state_dict()
    separate = any("attention.query" in name for name in state)  # transformers has named them either way
    qkv = ("query", "key", "value") if separate else ("q_proj", "k_proj", "v_proj")
    for name in state:
        state[name] = _vit_tensor(name, source, qkv)
    ours.load_state_dict(state)
    return theirs, ours


def _vit_tensor(name, source, qkv):
    leaf = name.rsplit(".", 1)[-1]
    fixed = {
        "cls_token": "class_token",
        "position_embeddings": "encoder.pos_embedding",
        "patch_embeddings.projection.weight": "conv_proj.weight",
        "patch_embeddings.projection.bias": "conv_proj.bias",
        "vit.layernorm.weight": "encoder.ln.weight",
        "vit.layernorm.bias": "encoder.ln.bias",
        "classifier.weight": "heads.head.weight",
        "classifier.bias": "heads.head.bias",
    }
    for ending, other in fixed.items():
        if name.endswith(ending):
            return source[other]
    number = next(part for part in name.split(".") if part.isdigit())
    layer = f"encoder.layers.encoder_layer_{number}"
    for at, part in enumerate(qkv):
        if f".{part}." in name:
            return source[f"{layer}.self_attention.in_proj_{leaf}"].chunk(3)[at]
    if "layernorm_before" in name:
        return source[f"{layer}.ln_1.{leaf}"]
    if "layernorm_after" in name:
        return source[f"{layer}.ln_2.{leaf}"]
    if "attention" in name:
        return source[f"{layer}.self_attention.out_proj.{leaf}"]
    return source[f"{layer}.mlp.{0 if 'intermediate' in name or 'fc1' in name else 3}.{leaf}"]


def _vit_stages(ours):
    layers = next(path for path, one in ours.named_modules() if isinstance(one, nn.ModuleList) and len(one) == 4)
    blocks = [
        trace.Stage(
            f"block.{n}",
            f"encoder.layers.encoder_layer_{n}",
            f"{layers}.{n}",
            inputs={"hidden_states": ":input"},
        )
        for n in range(4)
    ]
    norm = trace.Stage("norm", "encoder.ln", "vit.layernorm", inputs={"input": ":input"}, modules={"": ""})
    return [*blocks, norm, trace.Stage("logits", "heads.head", "classifier", inputs={"input": ":input"})]


def test_two_libraries_models_with_the_same_weights_differ_by_rounding_alone(vits):
    theirs, ours = vits
    found = trace.compare(theirs, ours, _vit_stages(ours), torch.randn(1, 3, 32, 32))
    assert found.faults == []
    assert len(found.stages) == 6
    assert all(0.5 < stage.excess < 2 for stage in found.stages)
    assert all(stage.arrival_error <= ARRIVAL_TOLERANCE for stage in found.stages)
    assert 0 < found["logits"].drift < 1e-5
    assert "no error above rounding" in repr(found)


@pytest.mark.parametrize("number", range(4))
def test_a_fault_is_found_where_it_was_planted_and_nowhere_else(vits, number):
    theirs, ours = vits
    broken = copy.deepcopy(ours)
    stages = _vit_stages(ours)
    norms = [module for path, module in broken.named_modules() if path.endswith("layernorm_after")]
    norms[number].eps = 1e-4
    found = trace.compare(theirs, broken, stages, torch.randn(1, 3, 32, 32))
    assert [stage.name for stage in found.faults] == [f"block.{number}"]
    assert found.first_divergence.name == f"block.{number}"
    assert f"first wrong at block.{number}" in repr(found)
    later = [stage for stage in found.stages if stage.name > f"block.{number}" and stage.name.startswith("block")]
    assert all(stage.drift > stage.local_error and stage.excess < 2 for stage in later)


def test_two_faults_at_once_are_both_found(vits):
    theirs, ours = vits
    broken = copy.deepcopy(ours)
    norms = [module for path, module in broken.named_modules() if path.endswith("layernorm_before")]
    norms[0].eps = norms[2].eps = 1e-4
    found = trace.compare(theirs, broken, _vit_stages(ours), torch.randn(1, 3, 32, 32))
    assert [stage.name for stage in found.faults] == ["block.0", "block.2"]


def test_a_difference_between_the_stages_shows_as_arrival_error(vits):
    theirs, ours = vits
    broken = copy.deepcopy(ours)
    with torch.no_grad():
        broken.vit.embeddings.position_embeddings.mul_(1.01)
    found = trace.compare(theirs, broken, _vit_stages(ours), torch.randn(1, 3, 32, 32))
    assert [stage.name for stage in found.faults] == ["block.0"]
    assert found["block.0"].arrival_error > ARRIVAL_TOLERANCE
    assert found["block.0"].excess < 2


def test_a_recording_on_disk_serves_as_the_reference(vits, tmp_path):
    theirs, ours = vits
    image = torch.randn(1, 3, 32, 32)
    stages = _vit_stages(ours)
    with torch.no_grad(), recording(theirs, places(stages)) as recorded:
        theirs(image)
    save_tape(tmp_path / "tape.safetensors", recorded, {"of": "torchvision"})
    tape = Tape(tmp_path / "tape.safetensors")
    assert tape.metadata == {"of": "torchvision"}
    apart = sum(tensor.numel() * 4 for tensor in recorded.values())
    assert (tmp_path / "tape.safetensors").stat().st_size < apart, "equal tensors are stored once"
    live, taped = trace.compare(theirs, ours, stages, image), trace.compare(tape, ours, stages, image)
    assert [stage.drift for stage in taped.stages] == [stage.drift for stage in live.stages]
    for one, other in zip(live.stages, taped.stages, strict=True):
        # tensors from a file lie at other addresses, which can change how a product is rounded
        assert other.local_error == pytest.approx(one.local_error, abs=1e-7)
    assert taped.faults == []


def test_recording_and_comparing_leave_the_models_as_they_were(vits):
    theirs, ours = vits
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = ours(image).logits
    trace.compare(theirs, ours, _vit_stages(ours), image)
    for module in [*ours.modules(), *theirs.modules()]:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    with torch.no_grad():
        assert torch.equal(ours(image).logits, before)


class _Toy(nn.Module):
    """A look-up, a norm that is called twice, and a second module fed by both."""

    def __init__(self, eps=1e-5):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8, eps=eps)
        self.head = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.norm(self.table(ids) * 0.01)
        return self.head(x) + self.norm(x * 3)


_TOY_STAGES = [
    trace.Stage("ids", "table:input", "table:input"),
    trace.Stage("table", "table", "table"),
    trace.Stage("norm", "norm", "norm", inputs={"input": ":input"}, modules={"": ""}),
    trace.Stage("head", "head", "head", inputs={"input": ":input"}),
]


@pytest.fixture
def toys():
    torch.manual_seed(1)
    toy = _Toy().eval()
    return toy, copy.deepcopy(toy)


def test_the_first_call_of_a_module_counts(toys):
    reference, candidate = toys
    found = trace.compare(reference, candidate, _TOY_STAGES, torch.tensor([[1, 2, 3]]))
    assert found.faults == []
    assert all(stage.bit_equal for stage in found.stages if not stage.junction)


def test_an_exact_operation_that_differs_is_infinitely_more_than_its_rounding(toys):
    reference, candidate = toys
    with torch.no_grad():
        candidate.table.weight[2, 0] += 1e-6
    found = trace.compare(reference, candidate, _TOY_STAGES, torch.tensor([[1, 2, 3]]))
    assert found["table"].excess == math.inf
    assert found.first_divergence.name == "table"


def test_whole_numbers_are_compared_exactly_and_shapes_too(toys):
    reference, candidate = toys
    other = trace.compare(
        reference, candidate, _TOY_STAGES, torch.tensor([[1, 2, 4]]), reference_inputs=torch.tensor([[1, 2, 3]])
    )
    assert other["ids"].arrival_error == pytest.approx(1 / 3)
    longer = trace.compare(
        reference, candidate, _TOY_STAGES, torch.tensor([[1, 2, 3, 4]]), reference_inputs=torch.tensor([[1, 2, 3]])
    )
    assert longer.first_divergence.name == "ids"
    assert longer["head"].drift == math.inf


def test_nan_is_a_fault_where_it_arises(toys):
    reference, candidate = toys
    with torch.no_grad():
        candidate.head.bias[3] = math.nan
    found = trace.compare(reference, candidate, _TOY_STAGES, torch.tensor([[1, 2, 3]]))
    assert [stage.name for stage in found.faults] == ["head"]


def test_what_is_asked_wrongly_is_said(toys):
    reference, candidate = toys
    with pytest.raises(ValueError, match="eval mode"):
        trace.compare(reference, copy.deepcopy(candidate).train(), _TOY_STAGES, torch.tensor([[1]]))
    with pytest.raises(ValueError, match="table:input"):
        trace.compare({}, candidate, _TOY_STAGES, torch.tensor([[1]]))
    ids = torch.tensor([[1]])
    with pytest.raises(AttributeError, match=r"x: \w+ has no 'nothing'"):
        trace.compare(reference, candidate, [trace.Stage("x", "nothing", "head")], ids)
    with pytest.raises(AttributeError, match=r"x: \w+ has no 'nothing'"):
        trace.compare(reference, candidate, [trace.Stage("x", "head", "nothing")], ids)
    with pytest.raises(ValueError, match="x: head is called with input, not with 'nothing'"):
        trace.compare(reference, candidate, [trace.Stage("x", "head:nothing", "head")], ids)
    with pytest.raises(ValueError, match="x: head is called with input, not with 'x'"):
        trace.compare(reference, candidate, [trace.Stage("x", "head", "head", inputs={"x": ":input"})], ids)


def test_what_a_stage_raises_on_the_references_inputs_names_the_stage(toys):
    reference, candidate = toys
    stage = trace.Stage(
        "last", "head", "head", inputs={"input": ":input"}, arrange={"input": lambda value: value[..., 1:]}
    )
    with pytest.raises(RuntimeError) as caught:
        trace.compare(reference, candidate, [stage], torch.tensor([[1]]), explain=False)
    assert "the stage last" in "".join(caught.value.__notes__)
    finding = trace.compare(reference, candidate, [stage], torch.tensor([[1]])).findings[-1]
    assert (finding.stage, finding.module) == ("last", "head")
    assert "it stops there: RuntimeError" in finding.causes[0].words


def test_a_comparison_of_ones_own_models_is_shown_and_drawn(toys):
    from blip2nb.display import plots

    reference, candidate = toys
    candidate.norm.eps = 1e-3
    found = trace.compare(reference, candidate, _TOY_STAGES, torch.tensor([[1, 2, 3]]))
    assert found._repr_html_().count("<b>wrong</b>") == len(found.faults) == 1
    picture = plots.FIGURES["depth_trace"](of_comparison(found), {})
    assert "First wrong at norm" in picture.get_suptitle()


def test_different_attributes_are_read_off_the_modules_and_can_be_put_right(toys):
    reference, candidate = toys
    candidate.norm.eps = 1e-3
    (difference,) = attribute_differences(attributes(reference), candidate, [("norm", "norm", "norm")])
    assert (difference.attribute, difference.reference, difference.candidate) == ("eps", 1e-5, 1e-3)
    ids = torch.tensor([[1, 2, 3]])
    assert trace.compare(reference, candidate, _TOY_STAGES, ids)["norm"].excess > THRESHOLD
    with repaired(candidate, [difference]):
        assert trace.compare(reference, candidate, _TOY_STAGES, ids).faults == []
    assert candidate.norm.eps == 1e-3


def test_a_damaged_tape_is_refused(tmp_path):
    path = tmp_path / "tape.safetensors"
    save_tape(path, {"a": torch.ones(3), "b": torch.ones(3)}, {})
    assert torch.equal(Tape(path)["b"], torch.ones(3))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a whole one"):
        Tape(path)


def test_distances_are_relative_and_logits_are_judged_in_five_ways():
    a = torch.tensor([[[3.0, 4.0, 0.0]]])
    assert distance(a, a) == 0
    assert distance(a * 1.5, a) == pytest.approx(0.5)
    assert distance(torch.ones(2), torch.zeros(2)) == math.inf
    judged = compare_logits(a.roll(1, -1), a)
    assert judged["top1_agreement"] == 0
    assert judged["max_abs"] == 4
    assert judged["kl"] > 1
    assert compare_logits(a + 1, a)["kl"] == pytest.approx(0, abs=1e-12)  # a constant changes no probability


def test_a_forward_that_a_module_had_of_its_own_comes_back(toys):
    reference, _ = toys
    reference.head.forward = lambda x: x + 1  # as some libraries put there
    with recording(reference, ["head"]) as recorded, torch.no_grad():
        reference(torch.tensor([[1]]))
    assert "head" in recorded
    assert reference.head.forward(1) == 2
