"""Checkpoints of other libraries in, trained models out; the tables are in `tables`."""

from gcl_jax.config import ModelConfig
from gcl_jax.models.port.configs import model_config
from gcl_jax.models.port.convert import Params, from_state_dict, merge_lora, to_state_dict
from gcl_jax.models.port.export import FORMATS, export_pretrained
from gcl_jax.models.port.files import locate, read_weights

__all__ = [
    "FORMATS",
    "export_pretrained",
    "from_state_dict",
    "load_pretrained",
    "merge_lora",
    "model_config",
    "to_state_dict",
]


def load_pretrained(source: str, cfg: ModelConfig, seed: int = 0) -> Params:
    """The parameters of the model `cfg`, nested dicts of numpy arrays in `cfg.param_dtype`, from
    `source`: a weights file (.safetensors; with torch also .bin, .pt, .pth, .ckpt), an index of
    shards, a folder that holds one, or a repository of the Hugging Face hub as "owner/name".

    The checkpoint may be open_clip's or OpenAI's, of transformers' CLIPModel, SiglipModel,
    BertModel, RobertaModel or XLMRobertaModel, or our own export. Every key must have its place and
    every parameter its key; what may be left out is listed in `tables.LEFT_OUT` and reported.
    Resized positions, the temperature of a BERT and `seed`: see `from_state_dict`.

    Raises:
        DataError: nothing at `source`, a file that is damaged or would run code, or keys that do
            not fit, all of them named.
    """
    return from_state_dict(read_weights(locate(source)), cfg, source, seed)
