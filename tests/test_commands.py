"""Every command answers --help, and what it cannot do, before jax is loaded: that takes seconds."""

import subprocess
import sys

import pytest

COMMANDS = (
    "data",
    "embed",
    "evaluate",
    "mine",
    "plan",
    "port",
    "prepare",
    "report",
    "search",
    "train",
)
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait_for_jax(command, tmp_path):
    done = run(tmp_path, command, "--help")
    assert f"gcl_jax.{command}" in done.stdout
    assert "jax was loaded" not in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", MISSING_RUN, ids=" ".join)
def test_a_missing_run_is_told_before_jax_is_loaded(args, tmp_path):
    done = run(tmp_path, *args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "gone" in done.stderr
    assert done.stderr.count("\n") == 1
