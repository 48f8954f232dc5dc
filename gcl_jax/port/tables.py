"""The porting tables: which of their tensors is which of our parameters, one table per family.

A row is (our dotted path, their key, layout). "*" stands for the number of the block: theirs are
one tensor per block, ours are stacked on axis 0. "{q,k,v}_proj" names several tensors: theirs are
joined along their outputs (axis 0), ours along theirs (the last axis). torch keeps a linear map as
(out, in), we as (in, out).

Keys that hold no parameter of ours, and may be left out of a checkpoint we read, are in `LEFT_OUT`;
nothing else ever is.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """How one tensor comes in (theirs to ours) and goes out (ours to theirs)."""

    load: Callable[[np.ndarray], np.ndarray]
    dump: Callable[[np.ndarray], np.ndarray]


def _load_patches(kernel):
    """(width, channel, row, column) to (row * column * channel, width)."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _dump_patches(matrix):
    size = round((matrix.shape[0] / 3) ** 0.5)
    return matrix.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout(lambda x: x, lambda x: x)
TRANSPOSED = Layout(lambda x: x.T, lambda x: x.T)
PATCHES = Layout(_load_patches, _dump_patches)
# Leading axes of length 1.
ONE = Layout(lambda x: x.reshape(x.shape[1:]), lambda x: x[None])
ONE_ONE = Layout(lambda x: x.reshape(x.shape[2:]), lambda x: x[None, None])


Triples = Iterable[tuple[str, str, Layout]]


def _linear(ours: str, theirs: str) -> Triples:
    return (
        (f"{ours}.kernel", f"{theirs}.weight", TRANSPOSED),
        (f"{ours}.bias", f"{theirs}.bias", SAME),
    )


def _norm(ours: str, theirs: str) -> Triples:
    return (
        (f"{ours}.scale", f"{theirs}.weight", SAME),
        (f"{ours}.bias", f"{theirs}.bias", SAME),
    )


def under(ours: str, theirs: str, *parts: Triples) -> Triples:
    """`parts` with prefixes before both names."""
    return tuple((ours + a, theirs + b, layout) for a, b, layout in itertools.chain(*parts))


def _blocks(theirs: str, *parts: Triples) -> Triples:
    return under("transformer.blocks.", f"{theirs}.*.", *parts)


# open_clip's transformer: image and text towers of CLIP, text tower of SigLIP.
_RESBLOCKS = _blocks(
    "transformer.resblocks",
    _norm("ln_1", "ln_1"),
    (
        ("attn.in_proj.kernel", "attn.in_proj_weight", TRANSPOSED),
        ("attn.in_proj.bias", "attn.in_proj_bias", SAME),
    ),
    _linear("attn.out_proj", "attn.out_proj"),
    _norm("ln_2", "ln_2"),
    _linear("mlp.c_fc", "mlp.c_fc"),
    _linear("mlp.c_proj", "mlp.c_proj"),
)

OPEN_CLIP_VISION = under(
    "visual.",
    "visual.",
    (
        ("patch_embedding", "conv1.weight", PATCHES),
        ("class_embedding", "class_embedding", SAME),
        ("positional_embedding", "positional_embedding", SAME),
    ),
    _norm("ln_pre", "ln_pre"),
    _RESBLOCKS,
    _norm("ln_post", "ln_post"),
    (("proj", "proj", SAME),),
)

# SigLIP's image tower in open_clip is timm's.
TIMM_VISION = under(
    "visual.",
    "visual.trunk.",
    (
        ("patch_embedding", "patch_embed.proj.weight", PATCHES),
        ("patch_bias", "patch_embed.proj.bias", SAME),
        ("positional_embedding", "pos_embed", ONE),
    ),
    _blocks(
        "blocks",
        _norm("ln_1", "norm1"),
        _linear("attn.in_proj", "attn.qkv"),
        _linear("attn.out_proj", "attn.proj"),
        _norm("ln_2", "norm2"),
        _linear("mlp.c_fc", "mlp.fc1"),
        _linear("mlp.c_proj", "mlp.fc2"),
    ),
    _norm("ln_post", "norm"),
    (("pool.probe", "attn_pool.latent", ONE_ONE),),
    _linear("pool.q_proj", "attn_pool.q"),
    _linear("pool.kv_proj", "attn_pool.kv"),
    _linear("pool.out_proj", "attn_pool.proj"),
    _norm("pool.ln", "attn_pool.norm"),
    _linear("pool.mlp.c_fc", "attn_pool.mlp.fc1"),
    _linear("pool.mlp.c_proj", "attn_pool.mlp.fc2"),
)

OPEN_CLIP_TEXT = (
    ("token_embedding", "token_embedding.weight", SAME),
    ("positional_embedding", "positional_embedding", SAME),
    *_RESBLOCKS,
    *_norm("ln_final", "ln_final"),
)
OPEN_CLIP_PROJECTION: dict[str, Triples] = {
    "linear": (("projection.kernel", "text_projection", SAME),),
    "linear_bias": tuple(_linear("projection", "text_projection")),
    "none": (),
}
OPEN_CLIP_BERT_PROJECTION: dict[str, Triples] = {
    "linear": (("projection.kernel", "proj.weight", TRANSPOSED),),
    "mlp": (
        ("projection.hidden", "proj.0.weight", TRANSPOSED),
        ("projection.kernel", "proj.2.weight", TRANSPOSED),
    ),
    "none": (),
}

# BertModel, RobertaModel, XLMRobertaModel.
BERT = (
    ("token_embedding", "embeddings.word_embeddings.weight", SAME),
    ("positional_embedding", "embeddings.position_embeddings.weight", SAME),
    ("token_type_embedding", "embeddings.token_type_embeddings.weight", SAME),
    *_norm("ln_embedding", "embeddings.LayerNorm"),
    *_blocks(
        "encoder.layer",
        _linear("attn.in_proj", "attention.self.{query,key,value}"),
        _linear("attn.out_proj", "attention.output.dense"),
        _norm("ln_1", "attention.output.LayerNorm"),
        _linear("mlp.c_fc", "intermediate.dense"),
        _linear("mlp.c_proj", "output.dense"),
        _norm("ln_2", "output.LayerNorm"),
    ),
)

# The transformer of CLIPModel and SiglipModel.
_LAYERS = _blocks(
    "encoder.layers",
    _norm("ln_1", "layer_norm1"),
    _linear("attn.in_proj", "self_attn.{q,k,v}_proj"),
    _linear("attn.out_proj", "self_attn.out_proj"),
    _norm("ln_2", "layer_norm2"),
    _linear("mlp.c_fc", "mlp.fc1"),
    _linear("mlp.c_proj", "mlp.fc2"),
)
_HF_TEXT = under(
    "text.",
    "text_model.",
    (
        ("token_embedding", "embeddings.token_embedding.weight", SAME),
        ("positional_embedding", "embeddings.position_embedding.weight", SAME),
    ),
    _LAYERS,
    _norm("ln_final", "final_layer_norm"),
)
_HF_VISION = under(
    "visual.",
    "vision_model.",
    (
        ("patch_embedding", "embeddings.patch_embedding.weight", PATCHES),
        ("positional_embedding", "embeddings.position_embedding.weight", SAME),
    ),
    _LAYERS,
    _norm("ln_post", "post_layernorm"),
)
HF_CLIP = (
    ("logit_scale", "logit_scale", SAME),
    *_HF_TEXT,
    *_HF_VISION,
    ("visual.class_embedding", "vision_model.embeddings.class_embedding", SAME),
    *_norm("visual.ln_pre", "vision_model.pre_layrnorm"),  # their spelling
    ("visual.proj", "visual_projection.weight", TRANSPOSED),
    ("text.projection.kernel", "text_projection.weight", TRANSPOSED),
)
HF_SIGLIP = (
    ("logit_scale", "logit_scale", ONE),
    ("logit_bias", "logit_bias", ONE),
    *_HF_TEXT,
    *_linear("text.projection", "text_model.head"),
    *_HF_VISION,
    ("visual.patch_bias", "vision_model.embeddings.patch_embedding.bias", SAME),
    *under(
        "visual.pool.",
        "vision_model.head.",
        (
            ("probe", "probe", ONE_ONE),
            ("{q,kv}_proj.kernel", "attention.in_proj_weight", TRANSPOSED),
            ("{q,kv}_proj.bias", "attention.in_proj_bias", SAME),
        ),
        _linear("out_proj", "attention.out_proj"),
        _norm("ln", "layernorm"),
        _linear("mlp.c_fc", "mlp.fc1"),
        _linear("mlp.c_proj", "mlp.fc2"),
    ),
)

# Patterns of keys that are no parameter of ours, and why.
LEFT_OUT = {
    r"input_resolution|context_length|vocab_size": "sizes that OpenAI's files carry",
    r"(.*\.)?position_ids": "a constant 0, 1, 2, ...",
    r"(text\.transformer\.|bert\.|roberta\.)?pooler\.dense\.(weight|bias)": (
        "BERT's pooling head, which mean and first pooling do not use"
    ),
    r"cls\.(predictions|seq_relationship)\..*|lm_head\..*": "the pretraining head of a masked LM",
}
