"""The scripts of launch/: linted, valid, and run as far as a machine without a cluster can."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from processes import ENVIRONMENT, PATIENCE_SECONDS, ROOT, logged

LAUNCH = ROOT / "launch"

SRUN = f"""#!{sys.executable}
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
environment = os.environ | {{
    "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
}}
tasks = [
    subprocess.Popen(
        words, env=environment | {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}}
    )
    for rank in range(2)
]
sys.exit(max(task.wait() for task in tasks))
"""


def program(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_scripts_pass_shellcheck():
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / ".ci/run"]
    subprocess.run([tool("shellcheck"), *scripts], check=True)


def test_dockerfiles_pass_hadolint():
    subprocess.run([tool("hadolint"), *LAUNCH.glob("Dockerfile.*")], check=True)


def tool(name):
    """The program beside this interpreter, or on the path."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, f"{name} belongs to the [test] extra"
    return found


def unknown_keys(given, understood, path=""):
    """Dotted names of what `given` says and `understood` has lost."""
    if isinstance(given, dict):
        for key, value in given.items():
            if key not in understood:
                yield f"{path}.{key}"
            else:
                yield from unknown_keys(value, understood[key], f"{path}.{key}")
    elif isinstance(given, list):
        for i, (value, other) in enumerate(zip(given, understood, strict=True)):
            yield from unknown_keys(value, other, f"{path}[{i}]")
    elif given != understood:
        yield path


def jobsets():
    return list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text()))


@pytest.mark.parametrize("manifest", jobsets(), ids=lambda manifest: manifest["metadata"]["name"])
def test_jobsets_fit_their_schema(manifest):
    """That of JobSet's own OpenAPI definition, down to the containers."""
    understood = JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    assert list(unknown_keys(manifest, understood)) == []
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    spec["completionmode"] = spec["template"]["spec"]["containers"][0]["command_"] = "planted"
    understood = JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    lost = list(unknown_keys(manifest, understood))
    assert [path.rpartition(".")[2] for path in lost] == ["command_", "completionmode"]


@pytest.mark.parametrize("manifest", jobsets(), ids=lambda manifest: manifest["metadata"]["name"])
def test_jobsets_add_up(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    (container,) = spec["template"]["spec"]["containers"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (count,) = container["resources"]["limits"].values()
    selector = spec["template"]["spec"]["nodeSelector"]
    if topology := selector.get("cloud.google.com/gke-tpu-topology"):
        rows, columns = map(int, topology.split("x"))
        assert rows * columns == spec["parallelism"] * count
    else:
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        name = manifest["metadata"]["name"]
        assert env["JAX_NUM_PROCESSES"] == str(spec["parallelism"])
        host, port = env["JAX_COORDINATOR_ADDRESS"].split(":")
        assert host == f"{name}-{job['name']}-0-0.{name}"
        assert {"containerPort": int(port)} in container["ports"]


def test_sky_starts_every_node_as_one_process(tmp_path):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    python = tmp_path / ".venv/bin"
    python.mkdir(parents=True)
    program(python, "python", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    given = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2"}
    environment = os.environ | task["envs"] | given | {"SKYPILOT_NODE_RANK": "1"}
    printed = subprocess.run(
        ["bash", "-euc", task["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True
    ).stdout.splitlines()
    assert task["num_nodes"] == 2
    assert printed == [
        "-m",
        "gcl_jax.train",
        "--config=configs/emoji_tiny.py",
        "--workdir=/runs/demo",
        "--coordinator=10.0.0.7:8482",
        "--num_processes=2",
        "--process_id=1",
    ]


def slurm(tmp_path, srun, *flags):
    """The batch script, run by bash with stubs of `srun` and `scontrol`; what was requeued."""
    program(tmp_path, "srun", srun)
    program(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    environment = ENVIRONMENT | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),  # jax makes a port of it
    }
    result = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    log = tmp_path / "scontrol.log"
    return result, log.read_text() if log.exists() else ""


def test_slurm_script_trains_with_two_tasks(config_file, tmp_path):
    workdir = tmp_path / "run"
    flags = ["--config.optim.steps=2", "--config.eval.every=0", "--config.checkpoint.every=2"]
    result, requeued = slurm(
        tmp_path, SRUN, f"--config={config_file}", f"--workdir={workdir}", *flags
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("starting from random parameters") == 1
    assert [row["step"] for row in logged(workdir)] == [1, 2]
    assert (workdir / "checkpoints/2").is_dir()
    assert requeued == ""


@pytest.mark.parametrize(("code", "again"), [(143, True), (85, True), (2, False), (1, False)])
def test_slurm_script_requeues_what_was_saved_on_sigterm_or_hung(tmp_path, code, again):
    result, requeued = slurm(tmp_path, f"#!/bin/sh\nexit {code}\n")
    assert result.returncode == code
    assert requeued == (f"requeue {os.getpid()}\n" if again else "")


GCLOUD = """#!/usr/bin/env bash
here=$(dirname "$0")
printf '%q ' "$@" | sed 's/\\\\n.*//' >> "$here/calls"
echo >> "$here/calls"
case "$4" in
  describe) head -n 1 "$here/states"; sed -i 1d "$here/states" ;;
  ssh) if [[ "$*" == *gcl_jax.train* ]]; then
    code=$(head -n 1 "$here/codes"); sed -i 1d "$here/codes"; exit "$code"
  fi ;;
esac
"""


def tpu_vm(tmp_path, states, codes, *words):
    """(exit code, [command of each call of a stub gcloud], all calls)."""
    program(tmp_path, "gcloud", GCLOUD)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "NAME": "slice",
        "ZONE": "us-west4-a",
        "ACCELERATOR": "v5litepod-16",
        "RUNTIME": "v2-alpha-tpuv5-lite",
        "SPOT": "1",
        "PAUSE": "0",
    }
    result = subprocess.run(
        [LAUNCH / "tpu_vm.sh", *words], env=environment, capture_output=True, text=True, timeout=60
    )
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    calls = [call for call in calls if call.startswith("compute")]
    return result.returncode, [call.split()[3] for call in calls], calls


def test_tpu_script_comes_back_after_a_preemption(tmp_path):
    """Not there; queued; active; preempted in training; active again; trained."""
    states = ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "ACTIVE"]
    code, commands, calls = tpu_vm(tmp_path, states, [255, 0], "train", "--workdir=/mnt/a b")
    assert code == 0
    create, install, run = ["create", "describe"], ["scp", "ssh"], ["ssh"]
    assert commands == [
        *["describe", *create, "describe", *install, *run],
        *["describe", "delete", *create, *install, *run],
    ]
    assert "--accelerator-type=v5litepod-16" in calls[1]
    assert "--spot" in calls[1]
    assert all("slice" in call and "--zone=us-west4-a" in call for call in calls)
    assert all("--worker=all" in call for call in calls if call.split()[3] in ("scp", "ssh"))


def test_tpu_script_stops_at_a_wrong_configuration(tmp_path):
    code, commands, _ = tpu_vm(tmp_path, ["ACTIVE"], [2], "train", "--workdir=/mnt/a")
    assert code == 2
    assert commands == ["describe", "scp", "ssh", "ssh"]


def test_tpu_script_does_not_fail_for_ever(tmp_path):
    states = ["ACTIVE"] * 5 + ["SUSPENDED"] + ["ACTIVE"] * 20
    code, commands, _ = tpu_vm(tmp_path, states, [1] * 30, "train", "--workdir=/mnt/a")
    assert code == 1
    # Four failures, a preemption, ten failures; twice the installation's own.
    assert commands.count("ssh") == 4 + 1 + 10 + 2


def test_tpu_script_gives_up_a_request_that_failed(tmp_path):
    code, commands, _ = tpu_vm(tmp_path, ["FAILED"], [], "create")
    assert code == 1
    assert commands == ["create", "describe"]


def test_local_ends_all_when_one_fails():
    script = "import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit(7)\n"
    script += "time.sleep(100)"
    command = [sys.executable, str(LAUNCH / "local.py"), "--processes=2", "--devices=1", "--"]
    result = subprocess.run(
        [*command, sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 7
    assert "process 1 ended with 7; ending all" in result.stderr


def test_local_passes_sigterm_on(tmp_path):
    """And reports the code with which the processes end for it."""
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"open(f'{tmp_path}/' + os.environ['JAX_PROCESS_ID'], 'w').close()\n"
        "time.sleep(100)"
    )
    command = [sys.executable, str(LAUNCH / "local.py"), "--processes=2", "--devices=1", "--"]
    run = subprocess.Popen([*command, sys.executable, "-c", script])
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 143
