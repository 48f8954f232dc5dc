"""Fine-tunes a text encoder of BERT's family on your own titles, without images.

What to change first:
    init_from and model   the weights and what they are of, such as --config.model=e5-small-v2;
                          model.text.tokenizer, where no hub can be reached, is the folder of both
    data.store, data.document_fields    the folder that `prepare` wrote, your columns of text
    optim.lr              2e-5 to 2e-4: small models take more
    model.text.context_length    the most tokens of a text; long ones take time
    loss.score_to_weight  how much less a lower score counts: inverse (much), linear, constant
"""

from gcl_jax.config import DataConfig, LossConfig, OptimConfig, TrainConfig
from gcl_jax.models.presets import preset


def get_config() -> TrainConfig:
    model = preset("all-MiniLM-L6-v2")
    model.text.context_length = 64
    return TrainConfig(
        model=model,
        init_from="sentence-transformers/all-MiniLM-L6-v2",
        data=DataConfig(store="stores/mine", document_fields={"title": 1.0}, cached_records=20_000),
        loss=LossConfig(targets="known"),
        optim=OptimConfig(lr=5e-5, layer_decay=0.9),
    )
