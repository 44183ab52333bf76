"""Faults in a model's files: where each fits, and what it does to the tensors there. For the catalogue.

What changes tensors is called with copies of them by name, the target, and a generator for what is left to chance.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import nn

from blip2nb.catalogue.anatomy import (
    Attention,
    alike_layers,
    attentions,
    norm_pairs,
    output_layers,
    owner,
    owners,
    token_tables,
)
from blip2nb.catalogue.planting import Target, Tensors
from blip2nb.trace.paths import join
from blip2nb.trace.vocabulary import FUSED, role_of, role_of_parameter

_RELATIVE = "relative_attention_bias.weight"
_POSITIONS = re.compile(r"(^|\.)(pos(ition)?_?emb\w*|embed_pos\w*)(\.weight)?$")


def _parts(tensors: Tensors) -> dict[str, list[torch.Tensor]]:
    """What makes q, k and v of an attention's tensors, as views: letter -> weight, and bias if there is one."""
    out: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    for name, tensor in tensors.items():
        role = role_of_parameter(name)
        if role == "qkv":
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                out[letter].append(third)
        else:
            out[role[0]].append(tensor)
    return out


def _exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def _chosen(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One value of a tensor, as a view of one element."""
    at = int(torch.randint(tensor.numel(), (1,), generator=generator))
    return tensor.view(-1)[at : at + 1]


# -- faults in the files: queries, keys, values


def qkv_pairs(model: nn.Module) -> Iterator[Target]:
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    for found in attentions(model):
        for one, other in ("qk", "qv", "kv"):
            names = found.names if found.fused else _of(found, one + other)
            alike = found.fused or len({shapes[name] for name in names if name.endswith("weight")}) == 1
            if alike:
                yield Target(owners(names), names, f"{one} and {other}")


def _of(found: Attention, letters: str) -> tuple[str, ...]:
    """The names of parameters that make some of q, k and v, of an attention that keeps them apart."""
    return tuple(name for name in found.names if role_of_parameter(name)[0] in letters)


def qkv_single(model: nn.Module) -> Iterator[Target]:
    for found in attentions(model):
        for letter in "qkv":
            names = found.names if found.fused else _of(found, letter)
            yield Target(owners(names), names, letter)


def swap_qkv(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    parts = _parts(tensors)
    for one, other in zip(parts[target.form[0]], parts[target.form[-1]], strict=True):
        _exchange(one, other)


def lose_qkv(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    for tensor in _parts(tensors)[target.form]:
        tensor.zero_()


def headed(model: nn.Module) -> Iterator[Target]:
    """Forms: which of q, k and v have their heads in another order, and how many heads there are."""
    for found in attentions(model):
        for letters in ("q", "v", "qkv"):
            names = found.names if found.fused else _of(found, letters)
            yield Target(owners(names), names, f"{letters}, {found.heads} heads")


def permute_heads(tensors: Tensors, target: Target, generator: torch.Generator) -> None:
    letters, heads = target.form.removesuffix(" heads").split(", ")
    order = torch.randperm(int(heads), generator=generator)
    if torch.equal(order, torch.arange(int(heads))):
        order = order.roll(1)
    for letter in letters:
        for tensor in _parts(tensors)[letter]:
            by_head = tensor.unflatten(0, (int(heads), -1))
            by_head.copy_(by_head[order].clone())


def fused(model: nn.Module) -> Iterator[Target]:
    for found in attentions(model):
        if found.fused:
            yield Target(owners(found.names), found.names, f"{found.heads} heads")


def interleave(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    """(3, heads, width of a head) as (heads, 3, width of a head): how other libraries lay a fused weight out."""
    heads = int(target.form.removesuffix(" heads"))
    for tensor in tensors.values():
        by_head = tensor.unflatten(0, (3, heads, -1)).transpose(0, 1)
        tensor.copy_(by_head.reshape(tensor.shape).clone())


def scale_query(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    parts = _parts(tensors)["q"]
    heads = int(target.form.removesuffix(" heads"))
    for tensor in parts:
        tensor.mul_((parts[0].shape[0] // heads) ** -0.5)


def queries(model: nn.Module) -> Iterator[Target]:
    for found in attentions(model):
        names = found.names if found.fused else _of(found, "q")
        yield Target(owners(names), names, f"{found.heads} heads")


def key_biases(model: nn.Module) -> Iterator[Target]:
    for found in attentions(model):
        names = tuple(name for name in found.names if name.endswith("bias"))
        names = names if found.fused else tuple(name for name in _of(found, "k") if name in names)
        if names:
            yield Target(owners(names), names)


_NOISE = 0.1
"""Standard deviation of what is added to a tensor. Chosen: weights are compared bit by bit, so that any change that
does not round away is found; this one shows in what a layer gives, too."""


def noise_key(tensors: Tensors, _: Target, generator: torch.Generator) -> None:
    for tensor in _parts(tensors)["k"]:
        tensor.add_((torch.randn(tensor.shape, generator=generator) * _NOISE).to(tensor.dtype).to(tensor.device))


# -- faults in the files: any tensor


def _parameters(model: nn.Module, keep: Callable[[str, torch.Tensor], bool]) -> Iterator[Target]:
    for name, tensor in model.named_parameters():
        if keep(name, tensor):
            yield Target((owner(name),), (name,))


def biases(model: nn.Module) -> Iterator[Target]:
    return _parameters(model, lambda name, tensor: name.endswith("bias"))


def everything(model: nn.Module) -> Iterator[Target]:
    return _parameters(model, lambda name, tensor: True)


def _is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """A weight that something is multiplied with, no table that something is looked up in."""
    return tensor.dim() >= 2 and name.endswith("weight") and not re.search("emb|pos|relative", name)


def matrices(model: nn.Module) -> Iterator[Target]:
    return _parameters(model, _is_matrix)


def squares(model: nn.Module) -> Iterator[Target]:
    return _parameters(
        model,
        lambda name, tensor: _is_matrix(name, tensor) and tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1],
    )


def zero(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def shift(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    for tensor in tensors.values():
        tensor.copy_(tensor.roll(1))


def add_noise(tensors: Tensors, target: Target, generator: torch.Generator) -> None:
    for tensor in tensors.values():
        tensor.add_((torch.randn(tensor.shape, generator=generator) * _NOISE).to(tensor.dtype).to(tensor.device))


def transpose(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    for tensor in tensors.values():
        tensor.copy_(tensor.t().clone())


def double(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    for tensor in tensors.values():
        tensor.mul_(2)


def start_anew(tensors: Tensors, target: Target, generator: torch.Generator) -> None:
    """As initialised: the fate of a tensor whose name nothing matched."""
    for tensor in tensors.values():
        tensor.copy_((torch.randn(tensor.shape, generator=generator) * tensor.float().std()).to(tensor.dtype))


def change_one(tensors: Tensors, target: Target, generator: torch.Generator) -> None:
    for tensor in tensors.values():
        value = _chosen(tensor, generator)
        value.add_(tensor.abs().max().clamp_min(_NOISE))  # as large as the largest, also where all are zero


# IEEE 754's fractions, and bfloat16's: an exponent's bit may make a value infinite, which is another fault
_MANTISSA = {torch.float32: (torch.int32, 23), torch.float16: (torch.int16, 10), torch.bfloat16: (torch.int16, 7)}


def flip_bit(tensors: Tensors, target: Target, generator: torch.Generator) -> None:
    for tensor in tensors.values():
        whole, bits = _MANTISSA[tensor.dtype]
        bit = int(torch.randint(bits, (1,), generator=generator))
        _chosen(tensor, generator).view(whole).bitwise_xor_(1 << bit)


def spoil(tensors: Tensors, target: Target, generator: torch.Generator) -> None:
    for tensor in tensors.values():
        _chosen(tensor, generator).fill_(math.nan if target.form == "NaN" else math.inf)


def spoilable(model: nn.Module) -> Iterator[Target]:
    for target in everything(model):
        for form in ("NaN", "infinity"):
            yield dataclasses.replace(target, form=form)


_ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def inexact(model: nn.Module) -> Iterator[Target]:
    for name, tensor in model.named_parameters():
        for form in _rounds(tensor):
            yield Target((owner(name),), (name,), form)


def inexact_model(model: nn.Module) -> Iterator[Target]:
    for form in _ROUNDED:
        names = tuple(name for name, tensor in model.named_parameters() if form in _rounds(tensor))
        if names:
            yield Target(owners(names), names, form)


def _rounds(tensor: torch.Tensor) -> list[str]:
    """The dtypes that cannot hold a tensor's values."""
    return [form for form, dtype in _ROUNDED.items() if not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)]


def round_values(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    for tensor in tensors.values():
        tensor.copy_(tensor.to(_ROUNDED[target.form]).to(tensor.dtype))


# -- faults in the files: what stands where


def swappable_norms(model: nn.Module) -> Iterator[Target]:
    for one, other in norm_pairs(model):
        leaves = [name for name, _ in model.get_submodule(one).named_parameters()]
        names = tuple(f"{path}.{leaf}" for leaf in leaves for path in (one, other))
        yield Target((one, other), names)


def exchange_pairs(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    """Names come in pairs: this one and the one it is exchanged with."""
    for one, other in zip(target.names[::2], target.names[1::2], strict=True):
        _exchange(tensors[one], tensors[other])


def copy_pairs(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    """Names come in pairs: this one and the one that comes to stand there too."""
    for one, other in zip(target.names[::2], target.names[1::2], strict=True):
        tensors[one].copy_(tensors[other])


def swappable_layers(model: nn.Module) -> Iterator[Target]:
    for one, other in alike_layers(model):
        leaves = [name for name, _ in model.get_submodule(one).named_parameters()]
        names = tuple(f"{path}.{leaf}" for leaf in leaves for path in (one, other))
        yield Target((one, other), names, whole=True)


def repeatable_layers(model: nn.Module) -> Iterator[Target]:
    for one, other in alike_layers(model):
        leaves = [name for name, _ in model.get_submodule(one).named_parameters()]
        yield Target((other,), tuple(f"{path}.{leaf}" for leaf in leaves for path in (other, one)), whole=True)


def borrowed(model: nn.Module) -> Iterator[Target]:
    """A matrix and the same one of the next layer."""
    for one, other in alike_layers(model):
        for leaf, tensor in model.get_submodule(one).named_parameters():
            if _is_matrix(leaf, tensor):
                yield Target((owner(f"{one}.{leaf}"),), (f"{one}.{leaf}", f"{other}.{leaf}"), "the next layer's")


def siblings(model: nn.Module) -> Iterator[Target]:
    """Two matrices of one shape side by side that are no query, key or value, such as a gate and what it gates."""
    for path, module in model.named_modules():
        inside = [
            (name, child.weight.shape)
            for name, child in module.named_children()
            if isinstance(child, nn.Linear) and role_of(name) not in FUSED["qkv"]
        ]
        for (one, shape), (other, its) in itertools.pairwise(inside):
            if shape == its:
                names = (join(path, f"{one}.weight"), join(path, f"{other}.weight"))
                yield Target(owners(names), names, f"{one} and {other}")


# -- faults in the files: positions, tables


def _positions(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor in model.named_parameters() if _POSITIONS.search(name))


def position_tables(model: nn.Module) -> Iterator[Target]:
    for name, _ in _positions(model):
        yield Target((owner(name),), (name,))


def shift_positions(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    for tensor in tensors.values():
        tensor.copy_(tensor.roll(1, dims=-2))


def position_grids(model: nn.Module) -> Iterator[Target]:
    """Positions of a class token and of a square of patches."""
    for name, tensor in _positions(model):
        if tensor.dim() == 3 and math.isqrt(tensor.shape[1] - 1) ** 2 == tensor.shape[1] - 1:
            yield Target((owner(name),), (name,))


def position_orders(model: nn.Module) -> Iterator[Target]:
    for target in position_grids(model):
        for form in ("columns before rows", "class token last"):
            yield dataclasses.replace(target, form=form)


def reorder_positions(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    for tensor in tensors.values():
        first, patches = tensor[:, :1].clone(), tensor[:, 1:].clone()
        if target.form == "class token last":
            tensor.copy_(torch.cat([patches, first], dim=1))
        else:
            side = math.isqrt(patches.shape[1])
            turned = patches.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
            tensor.copy_(torch.cat([first, turned], dim=1))


def interpolate_positions(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    """As if another image size had been in between: to 7/8 of the side and back. Any other size smooths it, too."""
    for tensor in tensors.values():
        patches = tensor[:, 1:].float()
        side = math.isqrt(patches.shape[1])
        grid = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        for size in (side * 7 // 8, side):
            grid = nn.functional.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)
        tensor[:, 1:].copy_(grid.permute(0, 2, 3, 1).flatten(1, 2))


def relative_tables(model: nn.Module) -> Iterator[Target]:
    return _parameters(model, lambda name, tensor: name.endswith(_RELATIVE))


def token_tables_of(model: nn.Module) -> Iterator[Target]:
    for path, _ in token_tables(model):
        yield Target((path,), (f"{path}.weight",))


def embed_larger(tensors: Tensors, target: Target, _: torch.Generator) -> None:
    for tensor in tensors.values():
        tensor.mul_(tensor.shape[-1] ** 0.5)


def untied(model: nn.Module) -> Iterator[Target]:
    for path, module, table in output_layers(model):
        if module.weight is not model.get_submodule(table).weight:
            yield Target((path,), (f"{path}.weight", f"{table}.weight"))
