"""Right against hard captions, in the forms of SugarCrepe, ARO and VALSE."""

import json
import sys

import numpy as np
import pytest
from conftest import png
from test_search import HostileSource, untrained_run

from gcl_jax.data.transforms import decode_image
from gcl_jax.embed.embedder import FieldEmbeddings
from gcl_jax.errors import DataError
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.evaluate.compositional import accuracies, format_tasks, read_tasks, solved

BOX = {"bbox_x": 2, "bbox_y": 4, "bbox_w": 9, "bbox_h": 7}
SUGAR_CREPE = {
    "0": {"filename": "a.png", "caption": "red on blue", "negative_caption": "blue on red"},
    "7": {"filename": "b.png", "caption": "a dog", "negative_caption": "a cat"},
}
ARO = [
    {"image_id": 1, "image_path": "a.png", **BOX, "relation_name": "on"},
    {"image_id": 1, "image_path": "a.png", **BOX, "attributes": ["old", "red"]},
]
ARO = [one | {"true_caption": "x on y", "false_caption": "y on x"} for one in ARO]
VALSE = {
    name: {
        "dataset": "visual7w",
        "image_file": "c.png",
        "caption": "There are no dogs.",
        "foil": "There are dogs.",
        "mturk": {"foil": 0, "caption": votes, "other": 3 - votes},
    }
    for name, votes in {"existence_0": 3, "existence_1": 1, "existence_2": 2}.items()
}
OWN = [{"image": "a.png", "caption": "c", "negative_caption": ["d", "e"], "kind": "object"}]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "cases"
    (root / "visual7w").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "visual7w/c.png")):
        (root / name).write_bytes(png(np.random.default_rng(i)))
    for name, cases in {"replace_obj": SUGAR_CREPE, "relation": ARO, "existence": VALSE}.items():
        (root / f"{name}.json").write_text(json.dumps(cases))
    (root / "own.jsonl").write_text("".join(json.dumps(case) + "\n" for case in OWN))
    return root


def test_order_tasks_are_read_without_what_shuffling_left_as_it_was(folder, capsys):
    right, wrong = "a red dog", ["dog red a", "a  red dog", "red a dog", "a dog red"]
    cases = [[right, *wrong], [right, right], [right, "dog a red"]]
    (file := folder / "coco_order.json").write_text(
        json.dumps([{"image": "a.png", "caption_options": options} for options in cases])
    )
    (found,) = read_tasks(file).values()
    assert [(case.right, case.wrong) for case in found] == [
        (right, ("dog red a", "red a dog", "a dog red")),
        (right, ("dog a red",)),
    ]
    told = "2 wrong captions are the right one word for word: left out, and with them 1 of 3 cases"
    assert told in capsys.readouterr().err
    file.write_text(json.dumps([{"image": "a.png", "caption": "a b", "foil": "a b "}]))
    with pytest.raises(DataError, match="has no case that can be solved"):
        read_tasks(file)


def test_the_three_forms_are_read(folder):
    tasks = read_tasks(folder)
    assert list(tasks) == ["existence", "own", "relation", "replace_obj"]
    assert [case.right for case in tasks["replace_obj"]] == ["red on blue", "a dog"]
    assert tasks["replace_obj"][1].wrong == ("a cat",)
    assert tasks["replace_obj"][1].image == folder / "b.png"
    assert [case.box for case in tasks["relation"]] == [(2, 4, 11, 11)] * 2
    assert [case.kind for case in tasks["relation"]] == ["on", "old_red"]
    assert [case.image for case in tasks["existence"]] == [folder / "visual7w/c.png"] * 2
    assert tasks["own"][0].wrong == ("d", "e")
    assert tasks["own"][0].kind == "object"
    assert list(read_tasks(folder / "own.jsonl", folder)) == ["own"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read as JSON"),
        ("", "odd.json cannot be read as JSON: it is empty"),
        ("3", "holds no list of cases"),
        ('[{"image": "a.png", "caption_options": ["a"]}]', "must list the right caption and then"),
        ("[]", "has no case"),
        ("[3]", "case 0: no object, but 3"),
        ('[{"caption": "a", "foil": "b"}]', "case 0: no image or filename or .*caption, foil"),
        ('{"x": {"image": "a.png", "caption": "a"}}', "case x: no negative_caption or"),
        ('[{"image": "n.png", "caption": "a", "foil": "b"}]', "n.png: no such file; set --image_r"),
        ('[{"image": "a.png", "caption": "a", "foil": [""]}]', "must be texts"),
        ('[{"image": "a.png", "caption": "a", "foil": "b", "bbox_x": 1}]', "four whole numbers"),
    ],
)
def test_cases_that_are_refused(folder, text, message):
    (file := folder / "odd.json").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_tasks(file)
    assert "\n" not in str(error.value)


class FakeEmbedder:
    """Knows each image by its size, and each text by a number in it."""

    def embed(self, side, records, fields, indices, **_):
        (field,) = fields
        vectors = [self.of(records[i][field]) for i in indices.tolist()]
        return FieldEmbeddings({field: np.float32(vectors)}, {field: np.ones(len(vectors), bool)})

    def of(self, value):
        if isinstance(value, str):
            angle = float(value)
            return [np.cos(angle), np.sin(angle)]
        boxed = not isinstance(value, bytes)
        size = value.size if boxed else decode_image(value).size
        return [0.0, 1.0] if size == (9, 7) else [1.0, 0.0]


def test_a_case_is_solved_if_the_right_caption_is_nearest(folder):
    cases = [
        {"image": "a.png", "caption": "0.1", "foil": "0.2", "kind": "near"},
        {"image": "a.png", "caption": "0.2", "foil": ["0.3", "0.1"], "kind": "near"},
        {"image": "a.png", "caption": "0.2", "foil": "0.20", "kind": "tie"},
        {"image": "a.png", "caption": "1.5", "foil": "0.1", **BOX, "kind": "box"},
        {"image": "b.png", "caption": "1.5", "foil": "0.1", "kind": "box"},
    ]
    (file := folder / "angles.json").write_text(json.dumps(cases))
    (found,) = read_tasks(file).values()
    is_solved = solved(FakeEmbedder(), found)
    assert is_solved.tolist() == [True, False, False, True, False]
    result = accuracies(found, is_solved)
    assert (result["cases"], result["accuracy"]) == (5, 0.4)
    assert result["chance"] == pytest.approx((4 / 2 + 1 / 3) / 5)
    assert result["mean_of_kinds"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    lines = format_tasks({"angles": result, "others": result}).splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["angles", "5", "0.4000", "0.4667"],
        ["box", "2", "0.5000"],
    ]
    assert lines[-1].split() == ["mean", "of", "tasks", "10", "0.4000", "0.4667"]


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    workdir = untrained_run(HostileSource(), tmp_path)
    command = ["evaluate", f"--workdir={workdir}", f"--compositional={folder}"]
    monkeypatch.setattr(sys, "argv", command)
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((workdir / "eval/compositional/cases.json").read_text())
    assert lines[-1].split()[:4] == ["mean", "of", "tasks", "7"]
    assert report["tasks"]["existence"]["cases"] == 2
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "a.png)', field 'image': unreadable image" in capsys.readouterr().err.splitlines()[-1]
    for more in ("--recall", "--groups"):
        monkeypatch.setattr(sys, "argv", [*command, more])
        with pytest.raises(SystemExit):
            evaluate.main()
        assert "compositional" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(sys, "argv", [*command[:2], f"--image_root={folder}"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "--image_root is an option of --compositional" in capsys.readouterr().err
