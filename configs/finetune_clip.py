"""Fine-tunes a CLIP, from open_clip or Hugging Face, on your own images and titles.

What to change first:
    init_from and model   the weights (a file, a folder, a hub id), and what they are of: another
                          preset is --config.model=ViT-L-14 (`python -m gcl_jax.port --list`)
    data.store, data.document_fields    the folder that `prepare` wrote, your columns
    optim.lr              1e-5 to 5e-5; with LoRA ten times that
    optim.lr_multipliers  each tower's share of it, by pattern; optim.layer_decay, each layer's
    model.lora_rank       8, say, trains low-rank updates alone, with less memory
Frozen at first: one run with --config.optim.freeze=visual, and from its workdir, as init_from of
another run, without (docs/finetune.md).
"""

from gcl_jax.config import DataConfig, LossConfig, OptimConfig, TrainConfig
from gcl_jax.models.presets import preset


def get_config() -> TrainConfig:
    return TrainConfig(
        model=preset("ViT-B-32"),
        init_from="laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        data=DataConfig(
            store="stores/mine",
            document_fields={"image": 0.5, "title": 0.5},
            augmentation="crop",
        ),
        loss=LossConfig(targets="known"),
        optim=OptimConfig(lr=2e-5, lr_multipliers={"visual": 0.5}, layer_decay=0.8),
    )
