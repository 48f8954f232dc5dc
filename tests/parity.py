"""Independent implementations used as oracles: the `[parity]` extra (CPU torch, open_clip)."""

import json
from pathlib import Path

CLIP_TOKENS = Path(__file__).parent / "data" / "clip_tokens.json"


def import_open_clip():
    """Imports open_clip; ImportError where the `[parity]` extra is not installed.

    A torchvision without its compiled operators fails to import, as its Python part registers
    shapes for two of them; declaring those two is all that open_clip needs.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.gcl_jax_parity = library  # the operators vanish with their library
    import open_clip

    return open_clip


def write_clip_tokens() -> None:
    """Records open_clip's ids for the texts of `tests/data/clip_tokens.json` in that file.

    Zero padding is left out. To add a text, append it to "texts" and run
    `python tests/parity.py`.
    """
    tokenizer = import_open_clip().SimpleTokenizer()
    texts = json.loads(CLIP_TOKENS.read_text("utf-8"))["texts"]
    rows = [tokenizer([text])[0].tolist() for text in texts]
    ids = [row[: max(i for i, token in enumerate(row) if token) + 1] for row in rows]
    lists = {"texts": texts, "ids": ids}
    body = ",\n".join(
        f'"{key}": [\n' + ",\n".join(json.dumps(item) for item in items) + "\n]"
        for key, items in lists.items()
    )
    CLIP_TOKENS.write_text("{\n" + body + "\n}\n", "utf-8")


if __name__ == "__main__":
    write_clip_tokens()
