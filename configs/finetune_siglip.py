"""Fine-tunes a SigLIP 2, from open_clip or Hugging Face, on your own images and titles.

What to change first:
    --config=configs/finetune_siglip.py:NAME    another SigLIP of a fixed resolution, as
                          `gcl_jax.port --list` names them, such as ViT-L-16-SigLIP2-384
    init_from             the weights, where no hub can be reached; model.text.tokenizer is then the
                          folder of the tokenizer
    data.store, data.document_fields    the folder that `prepare` wrote, your columns
    optim.lr              1e-5 to 5e-5; with LoRA (--config.model.lora_rank=8) ten times that
    optim.lr_multipliers  each tower's share of it; optim.layer_decay, each layer's
    optim.freeze          more than the token table, which is half of a base model: visual, too
    loss.objectives       sigmoid is what it was trained with; gcl=1, sigmoid=0 to compare
"""

from gcl_jax.config import DataConfig, LossConfig, ObjectivesConfig, OptimConfig, TrainConfig
from gcl_jax.models.presets import preset


def get_config(name: str = "ViT-B-16-SigLIP2-256") -> TrainConfig:
    return TrainConfig(
        model=preset(name),
        init_from=f"timm/{name}",
        data=DataConfig(
            store="stores/mine",
            document_fields={"image": 0.5, "title": 0.5},
            augmentation="crop",
        ),
        loss=LossConfig(objectives=ObjectivesConfig(gcl=0, sigmoid=1), targets="known"),
        optim=OptimConfig(
            lr=1e-5,
            lr_multipliers={"visual": 0.5},
            layer_decay=0.8,
            freeze=("text.token_embedding",),
        ),
    )
