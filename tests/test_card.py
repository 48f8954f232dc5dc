"""benchmarks/card.py: whatever becomes of a part, its figures are kept and the next one goes on."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest

from benchmarks import card, figures

ABOUT = {"device": "card", "jax": "0.11", "open_clip_torch": "4.2"}
GOOD = "save({'speed': 1}); print('measured')"
HANGS = "save({'speed': 2}); time.sleep(60)"
DIES = "save({'speed': 3}); print('before'); raise ValueError('no memory')"
SILENT = "sys.exit(3)"


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """One of each kind of part, as programs of their own."""
    monkeypatch.setattr(card, "about", lambda: ABOUT)
    monkeypatch.setattr(card, "commit", lambda: "c1")
    parts = {}
    for name, code in {"good": GOOD, "hangs": HANGS, "dies": DIES, "silent": SILENT}.items():
        parts[name] = str(tmp_path / f"{name}.py")
        save = "save = lambda x: open(sys.argv[-1][6:], 'w').write(json.dumps(x)); "
        Path(parts[name]).write_text(f"import json, sys, time; {save}{code}")
    made = {name: card.Stage(20, {name: parts[name]}, {name: parts["good"]}) for name in parts}
    monkeypatch.setattr(card, "STAGES", made)
    return made


def test_a_part_that_hangs_or_dies_is_told_of_and_the_next_goes_on(
    stages, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "card.json"
    limits = {"hangs": 2.0, "dies": 20.0, "silent": 20.0, "good": 20.0}
    failed = card.run(limits, out, small=False, again=False)
    assert failed == [
        "hangs, hangs: ended after 2 s",
        "dies, dies: exit code 1: ValueError: no memory",
        "silent, silent: exit code 3: it said nothing",
    ]
    rows = json.loads(out.read_text())
    assert list(rows) == ["hangs, hangs", "dies, dies", "silent, silent", "good, good"]
    assert [row["figures"].get("speed") for row in rows.values()] == [2, 3, None, 1]
    assert rows["good, good"]["error"] == ""
    assert {row["commit"] for row in rows.values()} == {"c1"}
    said = capsys.readouterr().out
    monkeypatch.setattr(figures, "HERE", tmp_path)
    assert "| hangs, hangs | ended after 2 s |" in figures.card()
    assert "measured" in said
    assert "before" in said


def test_what_is_there_is_left_out(stages, tmp_path, monkeypatch, capsys):
    """For the same commit, device and size; what failed is tried again, what had no time is not
    forgotten."""
    out, good = tmp_path / "card.json", {"good": 20.0}

    def runs(again=False, small=False, limit=20.0):
        card.run({"good": limit}, out, small=small, again=again)
        return "there already" not in capsys.readouterr().out

    assert runs()
    assert not runs()
    assert runs(again=True)
    assert runs(small=True)
    assert not runs(small=True)
    monkeypatch.setattr(card, "commit", lambda: "c2")
    assert runs()
    monkeypatch.setattr(
        card, "about", lambda: ABOUT | {"device": "x", "open_clip_torch": "not installed"}
    )
    assert card.run({"good": 0.0}, out, False, False) == ["good, good: no time left for it"]
    assert "open_clip is not installed" in capsys.readouterr().out
    assert json.loads(out.read_text())["good, good"]["device"] == "card"
    stages["good"] = dataclasses.replace(stages["good"], parts=stages["dies"].parts)
    for _ in range(2):
        assert len(card.run({"good": 20.0}, out, False, True)) == len(good)


def test_stages_are_read_from_the_command_line():
    assert card.parse_stages("check:60,loss") == {"check": 60.0, "loss": 120.0}
    for text in ("chekc:60", "check:soon", ""):
        with pytest.raises(
            argparse.ArgumentTypeError,
            match="is not STAGE or STAGE:SECONDS; stages are check, loss",
        ):
            card.parse_stages(text)
    seven = card.__doc__.split("--stages=")[1].split()[0]
    assert sum(card.parse_stages(seven).values()) <= 7 * 60 - 5


@pytest.mark.slow
def test_every_stage_runs_small(tmp_path):
    """Without a rival, whose start takes longer than all of it; that it is missing is said."""
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    out = tmp_path / "card.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        limits = ",".join(f"{stage}:900" for stage in card.STAGES)
        patch.setattr(sys, "argv", ["card", "--small", f"--stages={limits}", f"--out={out}"])
        card.main()
        patch.setattr(figures, "HERE", tmp_path)
        drawn = figures.card()
    rows = json.loads(out.read_text())
    names = [f"{stage}, {part}" for stage, x in card.STAGES.items() for part in x.small]
    assert list(rows) == names
    assert all(f"| {name.partition(', ')[2]}: " in drawn for name in names)
    assert all(row["figures"] and not row["error"] for row in rows.values())
