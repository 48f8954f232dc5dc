"""`config.loss`: the objectives, their weights and what each of them may set."""

import dataclasses


@dataclasses.dataclass(slots=True)
class ObjectivesConfig:
    """The weight of each objective in the loss; 0 leaves it out."""

    gcl: float = 1.0
    sigmoid: float = 0.0
    bixse: float = 0.0
    listnet: float = 0.0
    listmle: float = 0.0
    rince: float = 0.0
    one_to_k: float = 0.0
    hard_negatives: float = 0.0
    fused: float = 0.0
    mixed: float = 0.0


@dataclasses.dataclass(slots=True)
class ListNetConfig:
    """Targets in proportion to exp(weight / `temperature`), or to the weight for temperature 0."""

    temperature: float = 0.0


@dataclasses.dataclass(slots=True)
class ListMLEConfig:
    """Loss weights in (0, 1] are cut into `levels`; documents of one level tie."""

    levels: int = 10


@dataclasses.dataclass(slots=True)
class RinceConfig:
    """Loss weights in (0, 1] are cut into `levels`; the temperature grows from the model's own at
    the best level to `spread` times as much at the lowest."""

    levels: int = 4
    spread: float = 2.0


@dataclasses.dataclass(slots=True)
class OneToKConfig:
    """`text_to_text`: weight of the contrast among the texts, beside that with the documents."""

    text_to_text: float = 0.5


@dataclasses.dataclass(slots=True)
class HardNegativesConfig:
    """Weights of the cross-modal `rank` and the `intra`-modal terms beside the contrast;
    `max_margin` of the former, in units of logits."""

    rank: float = 0.2
    intra: float = 0.2
    max_margin: float = 10.0


@dataclasses.dataclass(slots=True)
class MixedConfig:
    """A fixed `temperature`; mixing coefficients are drawn from Beta(`beta`, `beta`)."""

    temperature: float = 0.2
    beta: float = 0.5


@dataclasses.dataclass(slots=True)
class LossConfig:
    """What is learned from the global batch: a weighted sum of `objectives` (docs/objectives.md),
    by default the score-weighted contrastive loss alone (method: Loss 1 to 5).

    `form`: how documents reach all queries, see docs/loss.md. `dtype` is that of the embeddings in
    the products; logits, statistics and sums are float32 always.
    `targets`: "diagonal" is the paper's, each row's own pair; "known" also attracts every other
    (query, document) of the batch that the training split has a score for. `matryoshka_dims`: the
    loss is the mean over these leading parts of the embeddings, each normalised anew.
    """

    objectives: ObjectivesConfig = dataclasses.field(default_factory=ObjectivesConfig)
    score_to_weight: str = "inverse"
    thresholds: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    targets: str = "diagonal"
    weight_norm: str = "none"
    merged: float = 1.0
    field_pairs: float = 1.0
    pair_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    mask_duplicates: bool = False
    form: str = "auto"
    dtype: str = "float32"
    matryoshka_dims: tuple[int, ...] = ()
    listnet: ListNetConfig = dataclasses.field(default_factory=ListNetConfig)
    listmle: ListMLEConfig = dataclasses.field(default_factory=ListMLEConfig)
    rince: RinceConfig = dataclasses.field(default_factory=RinceConfig)
    one_to_k: OneToKConfig = dataclasses.field(default_factory=OneToKConfig)
    hard_negatives: HardNegativesConfig = dataclasses.field(default_factory=HardNegativesConfig)
    mixed: MixedConfig = dataclasses.field(default_factory=MixedConfig)
