"""Every command answers --help, and what it cannot do, before jax is loaded: that takes seconds."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from processes import ENVIRONMENT, ROOT

from gcl_jax import config, errors, validation
from gcl_jax.train import flags

COMMANDS = (
    "compare",
    "data",
    "embed",
    "evaluate",
    "mine",
    "plan",
    "port",
    "prepare",
    "report",
    "search",
    "serve",
    "train",
)
# {command: its flags} of version 0.1, and its options.
FIRST_VERSION = json.loads((Path(__file__).parent / "commands_0_1.json").read_text())
FIRST_OPTIONS = FIRST_VERSION.pop("config")
RUN = """
import runpy, sys
sys.argv[0] = "gcl_jax." + sys.argv[1]
command = sys.argv.pop(1)
try:
    runpy.run_module("gcl_jax." + command, run_name="__main__", alter_sys=True)
finally:
    if "jax" in sys.modules:
        print("jax was loaded")
"""
MISSING_RUN = [
    ("embed", "--workdir=gone"),
    ("evaluate", "--workdir=gone"),
    ("evaluate", "--workdir=gone", "--recall"),
    ("evaluate", "--workdir=gone", "--classify=."),
    ("mine", "--workdir=gone", "--out=mined"),
    ("port", "export", "--workdir=gone", "--format=safetensors", "--out=exported"),
    ("report", "--workdir=gone"),
    ("search", "--workdir=gone", "cat"),
    ("search", "--workdir=gone", "--serve"),
]


def run(folder, *args):
    command = [sys.executable, "-c", RUN, *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("command", dict.fromkeys([*COMMANDS, *FIRST_VERSION]))
def test_help_does_not_wait_for_jax(command, tmp_path):
    """And every flag of the first version is still one."""
    done = run(tmp_path, *command.split(), "--help")
    assert f"gcl_jax.{command.split()[0]}" in done.stdout
    assert "jax was loaded" not in done.stdout
    assert "Traceback" not in done.stderr
    offered = set(re.findall(r"--([a-z][a-z_]*)", done.stdout))
    assert set(FIRST_VERSION.get(command, ())) <= offered


@pytest.mark.parametrize("command", ["data", "port", "prepare", "train"])
def test_ctrl_c_while_a_command_is_loaded_is_one_line(command, tmp_path):
    (tmp_path / "argparse.py").write_text("raise KeyboardInterrupt")  # the first of all imports
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    arguments = [sys.executable, "-m", f"gcl_jax.{command}"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("args", MISSING_RUN, ids=" ".join)
def test_a_missing_run_is_told_before_jax_is_loaded(args, tmp_path):
    done = run(tmp_path, *args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "gone" in done.stderr
    assert done.stderr.count("\n") == 1


ADDRESS = "foo://bucket/x"
# Every argument that names a file or a folder, and what else the command needs.
PATHS = {
    "compare": ["--store=", "--store=emoji --config=", "--store=emoji --out="],
    "data inspect": [ADDRESS, "emoji --html="],
    "data verify": [ADDRESS],
    "embed": ["--workdir=", "--workdir=x --out=", "--workdir=x --store="],
    "evaluate": [
        *["--workdir=", "--qrels=", "--compare x ", "--qrels=x --run=", "--qrels=x --out="],
        *["--workdir=x --classify=", "--workdir=x --classnames=", "--workdir=x --templates="],
        *["--workdir=x --probe=", "--workdir=x --compositional=", "--workdir=x --image_root="],
    ],
    "mine": ["--workdir=x --out=", "--out=x --workdir="],
    "plan": ["--config=configs/emoji_tiny.py --topology=cpu:2 --json="],
    "port export": ["--format=run --out=x --workdir=", "--format=run --workdir=x --out="],
    "port import": ["x --workdir="],
    "prepare": ["--out="]
    + [f"--out=x --{name}=" for name in ("data", "image_root", "pairs", "documents", "captions")],
    "report": ["--workdir="],
    "search": ["cat --workdir=", "cat --workdir=x --images="],
    "train": ["--config=configs/emoji_tiny.py --workdir=", "--workdir=x --config="]
    + [
        f"--config=configs/emoji_tiny.py --workdir=x --config.{one.key}="
        for one in config.described()
        if one.option.path and one.key != "data.stores"
    ]
    + [f"--config=configs/emoji_tiny.py --workdir=x --config.data.stores.{ADDRESS}=1"],
}


def test_addresses_are_refused_by_every_argument_that_names_a_path(tmp_path):
    """At once, in one line, with what to do instead."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = []
    for command, ends in PATHS.items():
        for end in ends:
            module, *words = f"{command} {end}".split()
            address = "" if ADDRESS in end else ADDRESS
            words = [*words[:-1], words[-1] + address] if end[-1] != " " else [*words, address]
            lines.append([f"gcl_jax.{module}", *words])
    with pytest.raises(AssertionError) as refused:
        commands.parse(tmp_path, lines, whole=True)
    said = f"{ADDRESS}: addresses of this kind (foo://) are not read or written; give a path"
    assert str(refused.value).count(said) == len(lines)
    assert "Traceback" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".txt"] == ["configs"]
    for source in (ROOT / "gcl_jax").glob("*/__main__.py"):
        assert "type=Path" not in source.read_text(), source


def test_no_command_takes_the_beginning_of_a_flag_for_it(capsys):
    """Every parser of a command is this one, and so are those of its subcommands."""
    for source in (ROOT / "gcl_jax").rglob("*.py"):
        assert "argparse.ArgumentParser(" not in source.read_text(), source
    parser = errors.ArgumentParser()
    part = parser.add_subparsers().add_parser("part")
    for one, words in (parser, ["--work=x"]), (part, ["part", "--work=x"]):
        one.add_argument("--workdir")
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        said = capsys.readouterr().err
        assert said.startswith("error: unrecognized arguments: --work=x (")
        assert said.count("\n") == 1, "without the usage"


@pytest.mark.parametrize("key", FIRST_OPTIONS)
def test_every_option_of_the_first_version_can_still_be_set(key):
    cfg = config.TrainConfig()
    value = functools.reduce(getattr, key.split("."), cfg)
    is_dict = isinstance(value, dict)
    flags.override(cfg, f"{key}.a" if is_dict else key, "0.5" if is_dict else str(value))
    assert functools.reduce(getattr, key.split("."), cfg) == ({"a": 0.5} if is_dict else value)


def test_the_commands_are_listed_and_their_own_doors():
    done = subprocess.run(
        [sys.executable, "-m", "gcl_jax"], capture_output=True, text=True, check=True
    )
    listed = re.findall(r"^  ([a-z]+) ", done.stdout, re.MULTILINE)
    assert sorted(listed) == sorted([*COMMANDS, "config"])
    for args, message in (["frobnicate"], "is no command"), (["config", "optim.z"], "no key"):
        done = subprocess.run(
            [sys.executable, "-m", "gcl_jax", *args], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_config_lists_key_type_default_choices_and_meaning():
    done = subprocess.run(
        [sys.executable, "-m", "gcl_jax", "config", "model.remat"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("model.remat = 'dots'\n")
    text = " ".join(done.stdout.split())
    assert "to save memory" in text
    assert "a text; one of none, full, dots" in text


def test_every_option_says_what_it_means():
    for one in config.described():
        assert len(one.option.meaning) > 5, one.key
        validation.check(one.key, one.default, one)
