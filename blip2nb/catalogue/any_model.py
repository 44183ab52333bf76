"""A catalogue of the mistakes that ports are made of, each to be put into a model on purpose: for tests and teaching.

    from blip2nb.catalogue import any_model

    fault = any_model.CATALOGUE["qkv_swapped"]
    target = fault.targets(model)[0]                      # where it fits, at any depth
    with fault.planted(model, target, seed=0):            # as it was again afterwards, bit for bit
        trace.compare(reference, model, stages, inputs)   # is it found there?

Places are found by what modules are (a norm has an eps, an attention has query, key and value), not by whose model it
is. A fault in *files* is a pure change of tensors by name, so that it can be planted in a live model or in what is
stored on disk. A fault in *code* gives a module another `forward` or another attribute; a copy of the module, such as
the float64 referee's, has the fault too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blip2nb.catalogue import in_code as code
from blip2nb.catalogue import in_files as files
from blip2nb.catalogue.planting import Fault


def _files(name: str, words: str, cause: str, where: Callable, how: Callable, *also: str) -> Fault:
    return Fault(name, words, "files", cause, where, how, frozenset(also))


def _code(name: str, words: str, cause: str, where: Callable, how: Callable, *also: str) -> Fault:
    return Fault(name, words, "code", cause, where, how, frozenset(also))


def catalogue(faults: Sequence[Fault]) -> dict[str, Fault]:
    """Faults by name. Raises ValueError for a name that two of them have."""
    named = {fault.name: fault for fault in faults}
    if len(named) != len(faults):
        raise ValueError("Two faults have one name.")
    return named


# fmt: off
CATALOGUE: dict[str, Fault] = catalogue([
    _files("qkv_swapped", "Two of query, key and value stand in each other's place.",
           "qkv_swapped", files.qkv_pairs, files.swap_qkv),
    _files("qkv_missing", "The query, the key or the value was not written and is zero.",
           "qkv_missing", files.qkv_single, files.lose_qkv),
    _files("heads_permuted", "Heads of the query, the value or all three are in another order.",
           "heads_permuted", files.headed, files.permute_heads),
    _files("qkv_interleaved", "A fused weight is laid out head by head, each with its query, key and value.",
           "heads_permuted", files.fused, files.interleave, "qkv_swapped"),
    _files("scale_folded_in", "The attention's scale was multiplied into the query, and is applied again.",
           "attention_scale", files.queries, files.scale_query, "scale"),
    _files("key_bias", "A key's bias is another; no output depends on it.",
           "bias_changed", files.key_biases, files.noise_key),
    _files("bias_missing", "A bias was not written and is zero.",
           "bias_missing", files.biases, files.zero),
    _files("bias_shifted", "A bias is shifted by one.",
           "bias_shifted", files.biases, files.shift),
    _files("bias_changed", "A bias has other values.",
           "bias_changed", files.biases, files.add_noise),
    _files("transposed", "A square matrix is transposed.",
           "transposed", files.squares, files.transpose),
    _files("weight_missing", "A matrix was not written and is zero.",
           "weight_missing", files.matrices, files.zero, "qkv_missing"),
    _files("weight_doubled", "A matrix is twice what it should be.",
           "scale", files.matrices, files.double),
    _files("weight_not_loaded", "A matrix kept the random values it was initialised with.",
           "weight_changed", files.matrices, files.start_anew),
    _files("weight_borrowed", "The next layer's matrix stands here too.",
           "weight_swapped", files.borrowed, files.copy_pairs),
    _files("weights_exchanged", "Two matrices side by side stand in each other's place.",
           "weight_swapped", files.siblings, files.exchange_pairs),
    _files("value_changed", "One value of a tensor is another.",
           "weight_changed", files.everything, files.change_one, "bias_changed"),
    _files("bit_flipped", "One bit of a tensor is flipped.",
           "weight_changed", files.everything, files.flip_bit, "bias_changed"),
    _files("not_a_number", "One value of a tensor is NaN or infinite.",
           "not_a_number", files.spoilable, files.spoil),
    _files("rounded_tensor", "One tensor went through a dtype of half the size.",
           "rounded_weights", files.inexact, files.round_values),
    _files("rounded_model", "The whole model went through a dtype of half the size.",
           "rounded_weights", files.inexact_model, files.round_values),
    _files("norms_swapped", "Two norms of a layer have each other's weights.",
           "norms_swapped", files.swappable_norms, files.exchange_pairs),
    _files("layers_swapped", "Two layers stand in each other's place.",
           "layers_swapped", files.swappable_layers, files.exchange_pairs),
    _files("layer_repeated", "A layer holds the weights of one before it.",
           "layer_repeated", files.repeatable_layers, files.copy_pairs),
    _files("positions_shifted", "The position embedding is shifted by one.",
           "position_shifted", files.position_tables, files.shift_positions),
    _files("positions_missing", "The position embedding is zero.",
           "position_missing", files.position_tables, files.zero),
    _files("positions_reordered", "The positions are in another order than the patches.",
           "position_order", files.position_orders, files.reorder_positions, "position_shifted"),
    _files("positions_interpolated", "The position embedding was resized to another image and back.",
           "position_interpolated", files.position_grids, files.interpolate_positions),
    _files("position_bias_missing", "The table of relative positions is zero.",
           "position_bias_missing", files.relative_tables, files.zero),
    _files("embedding_scaled", "The embedding is multiplied by the root of its width.",
           "embedding_scale", files.token_tables_of, files.embed_larger, "scale"),
    _files("head_tied", "The last layer is a copy of the embedding, and should be its own.",
           "tied", files.untied, files.copy_pairs),
    _code("eps", "A norm's eps is another.",
          "eps", code.other_eps, code.setting(lambda module, target: {target.names[0]: float(target.form)})),
    _code("norm_kind", "A norm subtracts the mean, or does not, and should be the other.",
          "norm_kind", code.centred, code.other_norm),
    _code("activation", "Another activation function is computed.",
          "activation", code.other_activations, code.exchange_activation),
    _code("attention_scale", "The attention's scale is left out or applied twice.",
          "attention_scale", code.scaled_attentions, code.setting(code.other_scale)),
    _code("head_count", "The attention is cut into another number of heads.",
          "head_count", code.countable_heads, code.setting(code.other_heads)),
    _code("qkv_exchanged", "Two of query, key and value are called in each other's place.",
          "qkv_swapped", code.exchangeable_parts, code.exchange_modules),
    _code("norms_exchanged", "Two norms of a layer are called in each other's place.",
          "norms_swapped", code.norms_to_exchange, code.exchange_modules),
    _code("norm_after", "The norms come after their branches, or before, and should not.",
          "residual", code.norm_first, code.opposite, "norms_swapped"),
    _code("bias_left_out", "A bias is not added.",
          "bias_missing", code.linears_with_bias, code.setting(lambda module, target: {"bias": None})),
    _code("output_halved", "What a layer gives is multiplied by a half.",
          "scale", code.products, code.half_the_output),
    _code("logits_scaled", "The logits are divided by the root of the width, as in models with one table.",
          "logits_scale", code.logits, code.smaller_logits, "scale"),
    _code("embedding_multiplied", "Embeddings are multiplied by the root of their width.",
          "embedding_scale", code.called_tables, code.larger_embedding, "scale"),
    _code("head_shared", "The embedding serves as the last layer, which should have weights of its own.",
          "tied", files.untied, code.share),
    _code("position_offset", "Positions are looked up without the table's offset.",
          "position_shifted", code.offsets, code.setting(lambda module, target: {"offset": 0})),
    _code("position_buckets", "Relative positions fall into other buckets.",
          "position_bias", code.bucketed, code.setting(code.other_buckets)),
    _code("attention_mask", "An attention looks ahead where it should not, or does not where it should.",
          "attention_mask", code.maskable, code.other_mask),
    _code("dropout", "A module was left in training mode.",
          "dropout", code.droppable, code.setting(lambda module, target: {"training": True})),
    _code("residual", "What goes past a branch is not added to it, or twice.",
          "residual", code.residuals, code.other_residual),
])
# fmt: on
