"""What libraries call the modules and the settings of a network: the one table of names, and the role that each has.

Pure Python 3.8 that imports nothing: it travels with `tape.py` to where the reference lives. A name that is missing
here costs words, not judgement: a stage is judged all the same, and less is said of the cause.
"""

ROLES = {
    "query": ("q", "query", "q_proj", "query_proj", "wq", "to_q", "q_lin"),
    "key": ("k", "key", "k_proj", "key_proj", "wk", "to_k", "k_lin"),
    "value": ("v", "value", "v_proj", "value_proj", "wv", "to_v", "v_lin"),
    "qkv": ("qkv", "qkv_proj", "to_qkv", "c_attn", "Wqkv", "query_key_value", "in_proj"),
    "kv": ("kv", "kv_proj", "to_kv", "Wkv"),
    "output": ("o", "o_proj", "out_proj", "proj", "projection", "to_out", "out_lin"),
}
"""The role of a projection -> what it is called, by the last part of its path. `wo`, `dense` and `c_proj` are not here:
in some models they end an attention, in others an MLP, so there the path has to say it (see `in_attention`)."""

FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}
"""What a projection that makes several at once holds, in this order: of its output the channels, of its weight and bias
the rows."""

MIXED = frozenset(("query", "key", "value", *FUSED))
"""The roles whose outputs an attention mixes across positions: with all of them at hand it can be computed again."""

FUSED_PARAMETERS = ("in_proj_weight", "in_proj_bias")
"""Where torch.nn.MultiheadAttention keeps all three: parameters of its own, in no module."""

HOLDERS = {"att": "attention", "mlp": "mlp", "dense": "mlp", "intermediate": "activation", "embed": "embedding"}
"""A word in the name of a module that holds others -> what part of a network it is; the first that fits."""

# attributes that hold the same, in the order in which they are looked for
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
HEAD_WIDTH = ("head_dim", "attention_head_size", "key_value_proj_dim")
SCALE = ("scaling", "scale")
EPS = ("eps", "variance_epsilon")

SETTINGS = {
    **dict.fromkeys(EPS, "eps"),
    **dict.fromkeys(HEADS + HEAD_WIDTH, "head_count"),
    **dict.fromkeys(SCALE, "attention_scale"),
    "is_causal": "attention_mask",
    "has_relative_attention_bias": "position_bias_missing",
    "relative_attention_num_buckets": "position_bias",
    "relative_attention_max_distance": "position_bias",
    "offset": "position_shifted",
    "padding_idx": "tokens",
    "do_layer_norm_before": "residual",
    "has_cross_attention": "residual",
}
"""An attribute of a module -> what it is a cause of where it differs."""

BOOKKEEPING = frozenset((
    "p", "dropout", "attention_dropout", "hidden_dropout", "dropout_rate", "activation_dropout", "drop_prob",
    "layer_idx", "layer_num", "inplace", "gradient_checkpointing", "is_decoder", "config",
))  # fmt: skip
"""Attributes that say nothing about what a module in eval mode computes."""

BRANCHES = (
    ("layer_norm1", "self_attn"),
    ("layer_norm2", "mlp"),
    ("self_attn_layer_norm", "self_attn"),
    ("final_layer_norm", "fc2"),
    ("ln_1", "self_attention"),
    ("ln_2", "mlp"),
    ("layer_norm", "SelfAttention"),
    ("layer_norm", "EncDecAttention"),
    ("layer_norm", "DenseReluDense"),
)
"""The norm at the beginning of a branch and the module at its end, side by side in a layer: x + end(… norm(x))."""

_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


def role_of(path):
    """The role of a module by the last part of its path, a key of `ROLES`; "" where that says none."""
    return _ROLE_OF.get(path.rpartition(".")[2], "")


def role_of_parameter(name):
    """The role of the projection that a parameter is the weight or bias of; "" where its name says none."""
    path, _, leaf = name.rpartition(".")
    return "qkv" if leaf in FUSED_PARAMETERS else role_of(path)


def in_attention(path):
    """Whether a path is that of an attention, of something in one, or of a projection that only attentions have."""
    return "att" in path.lower() or bool(role_of(path))
