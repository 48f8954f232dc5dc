"""Right against hard captions: `python -m gcl_jax.evaluate --workdir=RUN --compositional=PATH`.

PATH is a JSON file (a list of cases, or an object whose values they are), a JSONL file, or a folder
of such files, each with the cases of one task. A case is an image, a caption that is right, and one
or several that are wrong by a detail. The names of SugarCrepe (arXiv 2306.14610), of ARO's relation
and attribution (arXiv 2210.01936) and of VALSE (ACL 2022) are understood, and what ARO's order
tasks, which shuffle captions as they load them, keep in memory (`json.dump(dataset.test_cases)`):

    image      image, filename, image_path or image_file; bbox_x, bbox_y, bbox_w and bbox_h, if they
               are there, are the part of it that is seen (ARO)
    right      caption or true_caption
    wrong      negative_caption, false_caption or foil: a text, or a list of texts
    both       caption_options: a list, the right one first (ARO's order tasks)
    kind       kind, relation_name or attributes (ARO); by default there is but one

Of VALSE, cases that fewer than two annotators found valid (`mturk`) are left out, as its authors
do. So are wrong captions that are the right one word for word, as a shuffled one may be, and cases
without another; how many is told. A case is solved if the image is nearer to the right caption than
to every wrong one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Bool

from gcl_jax import distributed
from gcl_jax.data.store import visible_files
from gcl_jax.data.transforms import decode_image, read_file
from gcl_jax.embed.embedder import Embedder
from gcl_jax.embed.model import GivenRecords
from gcl_jax.errors import DataError
from gcl_jax.evaluate.results import of_model, writing
from gcl_jax.evaluate.tables import text_table
from gcl_jax.paths import write_json
from gcl_jax.runs import NEWEST, load_model

IMAGE = ("image", "filename", "image_path", "image_file")
RIGHT = ("caption", "true_caption")
WRONG = ("negative_caption", "false_caption", "foil")
BOTH = "caption_options"
KIND = ("kind", "relation_name", "attributes")
BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
VALID_VOTES = 2  # of VALSE's three
COLUMNS = ("cases", "accuracy", "chance")
MOST_KINDS = 20  # of a task that are printed; the file has all


class Case(NamedTuple):
    """box: of the image that is seen, (left, top, right, bottom) in pixels; None: all of it."""

    image: Path
    box: tuple[int, int, int, int] | None
    right: str
    wrong: tuple[str, ...]
    kind: str


def read_tasks(path: Path, image_root: Path | None = None) -> dict[str, list[Case]]:
    """{name of a file: its cases} of what is at `path` (see the module); images are looked for in
    `image_root`, or beside the file.

    Raises:
        DataError: there is nothing to read, or a case lacks something.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in visible_files(path) if file.suffix in (".json", ".jsonl")]
    if not files or not all(map(Path.is_file, files)):
        raise DataError(f"--compositional={path}: no such file, or a folder without JSON files")
    tasks = {}
    for file in files:
        root = image_root or file.parent
        found = [
            _case(case, f"{file}, case {name}", root, file.stem)
            for name, case in _entries(file)
            if not isinstance(case, dict) or _is_valid(case)
        ]
        cases = [kept for case in found if (kept := _without_equals(case)).wrong]
        same = sum(len(case.wrong) for case in found) - sum(len(case.wrong) for case in cases)
        if same:
            distributed.announce(
                f"{file}: {same} wrong captions are the right one word for word: left out, and "
                f"with them {len(found) - len(cases)} of {len(found)} cases that have no other"
            )
        if not cases:
            raise DataError(f"{file} has no case" + " that can be solved" * bool(found))
        tasks[str(file.relative_to(path).with_suffix("")) if path.is_dir() else file.stem] = cases
    return tasks


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    """(its number or name, the case) one after the other."""
    try:
        text = read_file(file).decode("utf-8-sig")
        if not text.strip():
            raise ValueError("it is empty")
        if file.suffix == ".jsonl":
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from None
    if isinstance(found, dict):
        return iter(found.items())
    if isinstance(found, list):
        return ((str(i), case) for i, case in enumerate(found))
    raise DataError(f"{file} holds no list of cases, and no object of them")


def _is_valid(case: dict) -> bool:
    votes = case.get("mturk")
    count = votes.get("caption") if isinstance(votes, dict) else None
    return not isinstance(count, int) or count >= VALID_VOTES


def _case(case: Any, place: str, root: Path, task: str) -> Case:
    if not isinstance(case, dict):
        raise DataError(f"{place}: no object, but {case!r:.80}")

    def value(names: Sequence[str]) -> Any:
        found = [case[name] for name in names if case.get(name)]
        if not found:
            full = ", ".join(name for name, x in case.items() if x)
            raise DataError(f"{place}: no {' or '.join(names)} that is not empty; it has {full}")
        return found[0]

    image = value(IMAGE)
    if both := case.get(BOTH):
        if not isinstance(both, list) or len(both) < 2:
            raise DataError(f"{place}: {BOTH} must list the right caption and then wrong ones")
        right, *wrong = both
    else:
        right, wrong = value(RIGHT), value(WRONG)
    wrong = [wrong] if isinstance(wrong, str) else wrong
    texts = [image, right, *wrong] if isinstance(wrong, list) else [wrong]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{place}: image and captions must be texts that are not empty")
    # As VALSE's images lie, of several data sets.
    places = [root / image, root / str(case.get("dataset", "")) / image]
    if not (there := [path for path in places if path.is_file()]):
        raise DataError(f"{place}: {places[0]}: no such file; set --image_root to the images")
    kind = next((case[name] for name in KIND if case.get(name)), task)
    kind = "_".join(map(str, kind)) if isinstance(kind, list) else str(kind)
    return Case(there[0], _box(case, place), right, tuple(wrong), kind)


def _without_equals(case: Case) -> Case:
    """Without wrong captions that are the right one."""
    wrong = [text for text in case.wrong if text.split() != case.right.split()]
    return case._replace(wrong=tuple(wrong))


def _box(case: Mapping, place: str) -> tuple[int, int, int, int] | None:
    if BOX[0] not in case:
        return None
    try:
        x, y, width, height = (int(case[name]) for name in BOX)
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{place}: {', '.join(BOX)} must be four whole numbers") from None
    if min(width, height) < 1 or max(width, height) > 2**16:
        raise DataError(f"{place}: a box of {width} x {height} pixels")
    return x, y, x + width, y + height


class _Seen(GivenRecords):
    """Images, each with the box of it that is seen."""

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        record, box = super().__getitem__(index), self._rows[int(index)]["box"]
        if box is not None:
            try:
                record["image"] = decode_image(record["image"], deep=False).crop(box)
            except DataError as error:
                raise DataError(f"record {record['id']!r}, field 'image': {error}") from None
        return record


def solved(embedder: Embedder, cases: Sequence[Case]) -> Bool[np.ndarray, " n"]:
    """Which cases are. A tie is not.

    Raises:
        DataError: an image that cannot be read.
    """
    seen = list(dict.fromkeys((case.image, case.box) for case in cases))
    texts = list(dict.fromkeys(text for case in cases for text in (case.right, *case.wrong)))
    images = _Seen("images", {"image": "image"}, [{"image": x, "box": box} for x, box in seen])
    captions = GivenRecords("captions", {"text": "text"}, [{"text": text} for text in texts])
    image_place = {one: i for i, one in enumerate(seen)}
    text_place = {text: i for i, text in enumerate(texts)}
    x = embedder.embed(
        "document", images, ["image"], np.arange(len(seen)), description="images"
    ).merged({"image": 1.0})
    t = embedder.embed(
        "query", captions, ["text"], np.arange(len(texts)), description="captions"
    ).merged({"text": 1.0})

    def is_solved(case: Case) -> bool:
        rows = [text_place[text] for text in (case.right, *case.wrong)]
        right, *wrong = t[rows] @ x[image_place[case.image, case.box]]
        return bool(right > max(wrong))

    return np.array([is_solved(case) for case in cases])


def accuracies(cases: Sequence[Case], is_solved: Bool[np.ndarray, " n"]) -> dict:
    """{"cases", "accuracy", "chance", "mean_of_kinds", "kinds": {kind: {"cases", "accuracy"}}}."""
    named = np.array([case.kind for case in cases])
    kinds = {
        str(kind): {
            "cases": int((named == kind).sum()),
            "accuracy": float(is_solved[named == kind].mean()),
        }
        for kind in np.unique(named)
    }
    return {
        "cases": len(cases),
        "accuracy": float(is_solved.mean()),
        "chance": float(np.mean([1 / (1 + len(case.wrong)) for case in cases])),
        "mean_of_kinds": float(np.mean([one["accuracy"] for one in kinds.values()])),
        "kinds": kinds,
    }


def compositional_workdir(
    workdir: Path,
    path: Path,
    image_root: Path | None = None,
    embed_dim: int | None = None,
    checkpoint: str = NEWEST,
) -> str:
    """Evaluates a checkpoint of a run on the cases at `path`, writes
    WORKDIR/eval/compositional/NAME.json and returns a table.

    Raises:
        DataError: a file or image cannot be read, or a case lacks something.
    """
    tasks = read_tasks(path, image_root)
    cfg, params, mesh, step = load_model(workdir, checkpoint, embed_dim)
    embedder = Embedder(cfg, params, mesh)
    found = {name: accuracies(cases, solved(embedder, cases)) for name, cases in tasks.items()}
    model = of_model(cfg, params, step)
    if not distributed.is_first():
        return ""
    name = path.resolve().stem if embed_dim is None else f"{path.resolve().stem}@{embed_dim}"
    text = format_tasks(found)
    with writing(text):
        file = workdir / "eval" / "compositional" / f"{name}.json"
        write_json(file, model | {"data": str(path), "tasks": found})
    return text


def format_tasks(found: Mapping[str, dict]) -> str:
    """A row per task, and one for each of its kinds, if there are several and not too many."""
    rows: list[list] = []
    for task, one in found.items():
        rows.append([task, "", *(one[key] for key in COLUMNS)])
        if 1 < len(one["kinds"]) <= MOST_KINDS:
            rows += [["", kind, x["cases"], x["accuracy"], ""] for kind, x in one["kinds"].items()]
        if len(one["kinds"]) > 1:
            mean = f"mean of {len(one['kinds'])} kinds"
            rows.append(["", mean, one["cases"], one["mean_of_kinds"], ""])
    if len(found) > 1:
        cases, *means = (np.array([x[key] for x in found.values()]) for key in COLUMNS)
        rows.append(["mean of tasks", "", int(cases.sum()), *(float(x.mean()) for x in means)])
    return text_table(["task", "kind", *COLUMNS], rows)
