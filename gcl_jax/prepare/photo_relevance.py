"""The relevance rule of the source `photos`: what is on a photograph, and in which colours.

A query names a subject and a colour of the middle, of the rim, or of both: "red car", "ship on
blue", "brown dog on green". A photograph of another subject is never relevant; of those that show
it, the ones with the largest share of the colour come first.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int, UInt8

SIDE = 32  # pixels of a photograph
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SYNONYMS = {"plane": "airplane", "car": "automobile", "boat": "ship", "lorry": "truck"}
SUBJECTS = {
    **{name: (name,) for name in CLASSES},
    **{word: (name,) for word, name in SYNONYMS.items()},
    "animal": ("bird", "cat", "deer", "dog", "frog", "horse"),
    "vehicle": ("airplane", "automobile", "ship", "truck"),
    "picture": CLASSES,
}

DULL = ("black", "white", "grey", "brown")
HUES = {15: "red", 45: "orange", 70: "yellow", 170: "green", 260: "blue", 300: "purple"}
HUES |= {345: "pink", 360: "red"}  # each reaches up to its degree
COLOURS = tuple(dict.fromkeys([*DULL, *HUES.values()]))

MIDDLE = np.zeros((SIDE, SIDE), bool)
MIDDLE[8:-8, 8:-8] = True
RIM = np.ones((SIDE, SIDE), bool)
RIM[5:-5, 5:-5] = False
LEAST = {"middle": 0.25, "rim": 0.35, "both": 0.3}  # shares, of both their geometric mean
MOST_FOUND, FEWEST_FOUND = 200, 10


def colours(pixels: UInt8[np.ndarray, "*n 3"]) -> Int[np.ndarray, "*n"]:
    """Which of `COLOURS` each RGB pixel has.

    Black is darker than a fifth; white is brighter than four fifths with a saturation below .15,
    grey the rest below .2. Brown is what is no lighter than .65, no more saturated than .75 and has
    a hue below 45 degrees. All else goes by its hue. In whole numbers, so that no machine rounds.
    """
    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    high, low = pixels.max(-1).astype(np.int64), pixels.min(-1).astype(np.int64)
    chroma = high - low  # saturation is chroma / high
    turn = np.select([high == red, high == green], [green - blue, blue - red], red - green)
    start = np.select([high == red, high == green], [0, 120], 240)
    hue = (start + 60 * turn / np.maximum(chroma, 1)) % 360
    by_hue = np.array([COLOURS.index(name) for name in HUES.values()])
    dull = {
        "black": 5 * high < 255,
        "white": (5 * high > 4 * 255) & (20 * chroma < 3 * high),
        "grey": 5 * chroma < high,
        "brown": (hue < 45) & (20 * high < 13 * 255) & (4 * chroma < 3 * high),
    }
    coloured = by_hue[np.digitize(hue, list(HUES))]
    return np.select(list(dull.values()), [COLOURS.index(name) for name in dull], coloured)


def rankings(
    photos: UInt8[np.ndarray, "n side side 3"], classes: Int[np.ndarray, " n"]
) -> Iterator[tuple[str, Int[np.ndarray, " found"]]]:
    """Yields (query, positions of the relevant photographs, best first) for every query that
    enough photographs fit; equal ones keep their order. `classes` are places in `CLASSES`."""
    found = colours(photos)
    middle, rim = (
        np.stack([(found[:, part] == k).sum(1) for k in range(len(COLOURS))], 1)
        for part in (MIDDLE, RIM)
    )
    areas = {"middle": MIDDLE.sum(), "rim": RIM.sum()}
    areas["both"] = areas["middle"] * areas["rim"]
    least = {part: share * areas[part] for part, share in LEAST.items()}
    least["both"] *= LEAST["both"]  # a product is compared with the square of a mean
    for subject, names in SUBJECTS.items():
        shown = np.isin(classes, [CLASSES.index(name) for name in names])
        for k, colour in enumerate(COLOURS):
            asked = {
                f"{colour} {subject}": (middle[:, k], least["middle"]),
                f"{subject} on {colour}": (rim[:, k], least["rim"]),
            }
            for j, other in enumerate(COLOURS):
                both = middle[:, k] * rim[:, j]
                asked[f"{colour} {subject} on {other}"] = both, least["both"]
            for query, (pixels, enough) in asked.items():
                ranked = _ranked(shown, pixels, enough)
                if len(ranked) >= FEWEST_FOUND:
                    yield query, ranked


def _ranked(
    shown: Bool[np.ndarray, " n"], pixels: Int[np.ndarray, " n"], enough: float
) -> Int[np.ndarray, " found"]:
    positions = np.flatnonzero(shown & (pixels >= enough))
    return positions[np.argsort(-pixels[positions], kind="stable")][:MOST_FOUND]
