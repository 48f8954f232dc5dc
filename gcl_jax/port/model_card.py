"""The README.md of an exported model."""

from collections.abc import Mapping

from gcl_jax.config import ModelConfig

_LOAD = {
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{name}")
tokenizer = open_clip.get_tokenizer("local-dir:{name}")
""",
    "hugging_face": """from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{name}")
processor = AutoImageProcessor.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
""",
    "sentence_transformers": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode(["a query"], prompt_name="query")
documents = model.encode(["a document"], prompt_name="document")
""",
    "safetensors": """from gcl_jax.port.configs import model_config
from gcl_jax.port.convert import load_pretrained

cfg = model_config("{name}")
params = load_pretrained("{name}", cfg)
""",
}
_LIBRARY = {
    "open_clip": "open_clip",
    "hugging_face": "transformers",
    "sentence_transformers": "sentence-transformers",
    "safetensors": "gcl_jax",
}


def model_card(
    name: str, cfg: ModelConfig, format: str, metrics: Mapping[str, Mapping[str, float]]
) -> str:
    """Markdown: what the model is, how it is loaded, and `metrics`, {split: {metric: value}}."""
    text_only = cfg.vision is None
    how = "sentence_transformers" if format == "hugging_face" and text_only else format
    task = "sentence-similarity" if text_only else "zero-shot-image-classification"
    front = {"library_name": _LIBRARY[how], "pipeline_tag": task}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items())]
    lines += ["tags:", "- generalized-contrastive-learning", "---", "", f"# {name}", ""]
    lines += [
        "A dual encoder for ranked search, trained with gcl_jax by Generalized Contrastive "
        "Learning (arXiv 2404.08535).",
        "",
        *_facts(cfg),
        "",
        "## How to load it",
        "",
        "```python",
        *_LOAD[how].format(name=name).splitlines(),
        "```",
        "",
        "Embeddings are compared by cosine: normalise them to length 1.",
    ]
    if metrics:
        columns = list(dict.fromkeys(key for values in metrics.values() for key in values))
        lines += ["", "## Evaluation", "", "| split | " + " | ".join(columns) + " |"]
        lines.append("|---" * (1 + len(columns)) + "|")
        for split, values in metrics.items():
            cells = [f"{values[key]:.4f}" if key in values else "" for key in columns]
            lines.append(f"| {split} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _facts(cfg: ModelConfig) -> list[str]:
    vision, text = cfg.vision, cfg.text
    facts = [f"- embeddings: {cfg.embed_dim} dimensions"]
    if vision is not None:
        facts.append(
            f"- images: {vision.image_size} x {vision.image_size} pixels in patches of "
            f"{vision.patch_size}, {vision.layers} layers of width {vision.width}"
        )
    facts.append(
        f"- texts: up to {text.context_length} tokens, {text.layers} layers of width {text.width}"
    )
    if text.query_prefix or text.document_prefix:
        facts.append(
            f"- prefixes: `{text.query_prefix}` before queries, `{text.document_prefix}` before "
            "documents"
        )
    return facts
