"""The scripts of launch/: linted, valid, and run as far as a machine without a cluster can."""

import configparser
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import commands
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from processes import ENVIRONMENT, PATIENCE_SECONDS, ROOT, logged

from gcl_jax.plan.topology import GPUS, TPUS

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


@pytest.mark.parametrize("manifest", jobsets(), ids=lambda manifest: manifest["metadata"]["name"])
@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (2, False, "FailJobSet"),
        (2, True, "FailJobSet"),
        (143, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, False, None),
        (22, False, None),
        (74, False, None),
        (85, False, None),
        (134, False, None),
    ],
)
def test_jobsets_restart_by_exit_code(manifest, code, disrupted, action):
    """As Kubernetes words the failure of a pod, and JobSet matches its rules; None: the default,
    a restart that counts."""
    (job,) = manifest["spec"]["replicatedJobs"]
    spec, failure = job["template"]["spec"], ("BackoffLimitExceeded", "")
    (container,) = spec["template"]["spec"]["containers"]
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        end = f"matching {rule['action']} rule at index {index}"
        if exits := rule.get("onExitCodes"):
            assert (exits["operator"], exits["containerName"]) == ("In", container["name"])
            if code in exits["values"]:
                text = f"Container train for pod default/a-2 failed with exit code {code} {end}"
                failure = "PodFailurePolicy", text
                break
        elif disrupted:
            (condition,) = rule["onPodConditions"]
            assert condition == {"type": "DisruptionTarget", "status": "True"}
            text = f"Pod default/a-2 has condition DisruptionTarget {end}"
            failure = "PodFailurePolicy", text
            break
    reason, message = failure
    policy = manifest["spec"]["failurePolicy"]
    found = [
        rule["action"]
        for rule in policy["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(re.search(x, message) for x in rule.get("onJobFailureMessagePatterns", [""]))
    ]
    assert (found or [None])[0] == action
    assert policy["maxRestarts"] <= 10


@pytest.mark.parametrize("manifest", jobsets(), ids=lambda manifest: manifest["metadata"]["name"])
def test_jobsets_mount_the_bucket_that_one_variable_names(manifest):
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    csi = pod["volumes"][0]["csi"]["volumeAttributes"]
    assert csi["bucketName"] == "${BUCKET}"
    assert "rename-dir-limit=200000" in csi["mountOptions"].split(",")
    (container,) = pod["containers"]
    assert container["volumeMounts"][0]["mountPath"] == "/bucket"
    assert container["args"][2:] == ["--config.data.store=${STORE}", "--workdir=${WORKDIR}"]


@pytest.mark.parametrize("file", ["Dockerfile.cuda", "Dockerfile.tpu", "sky.yaml", "tpu_vm.sh"])
def test_one_variable_says_which_extras_are_installed(file):
    """E5, XLM-R and SigLIP have tokenizers of transformers, the extra [text]."""
    text = (LAUNCH / file).read_text()
    (default,) = re.findall(r"EXTRAS(?:: |=|:-)([a-z0-9,]+)", text)
    assert default == f"{'tpu' if 'tpu' in file else 'cuda'},text,gcp"
    assert re.search(r"--editable .*\.\[\$\{?EXTRAS", text)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert {*default.split(",")} <= {*setup["options.extras_require"]}


# A program that the commands of docs/pods.md call: notes its words, and what comes in by stdin.
RECORDER = f"""#!{sys.executable}
import os, json, pathlib, sys
name, *words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
given = sys.stdin.read() if name == "kubectl" and words[-1] == "-" else ""
with open(os.path.dirname(sys.argv[0]) + "/called.jsonl", "a") as file:
    file.write(json.dumps([name, words, given]) + "\\n")
if name == "sbatch":
    os.environ |= {{"SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_JOB_ID": "1"}}
    os.execvp("bash", ["bash", *words])
"""


def test_commands_of_the_page_run_as_printed(tmp_path):
    """Every command of docs/pods.md that is for a cloud, under stubs; the trainings that they start
    are those of one run on one store, and have the flags that they are given."""
    page = (ROOT / "docs/pods.md").read_text()
    blocks = re.findall(r"^```bash needs=[^\n]*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if not block.startswith(("python ", "make "))]
    assert len(blocks) == 6
    for name in ("docker", "kubectl", "xpk", "sbatch", "srun", "sky"):
        program(tmp_path, name, RECORDER)
    cloud = Cloud(tmp_path)
    gcloud = (tmp_path / "gcloud").read_text()
    recorder = program(tmp_path, "gcloud-storage", RECORDER)
    storage = f'[[ $1 != storage ]] || exec {recorder} "$@"\n'
    program(tmp_path, "gcloud", gcloud.replace("words=", f"{storage}words=", 1))
    environment = cloud.environment | {"PYTHON": "python"}
    for name in ("NAME", "ZONE", "ACCELERATOR", "RUNTIME", "BUCKET", "STORE", "WORKDIR"):
        del environment[name]  # the page sets them
    for block in blocks:
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], env=environment, cwd=ROOT, check=True
        )

    called = [json.loads(line) for line in cloud.lines("called.jsonl")]
    trainings = [shlex.split((tmp_path / "last.run").read_text())]
    for name, words, given in called:
        if name == "srun":
            trainings.append(words)
        elif name == "xpk" and words[0] == "workload":
            (command,) = [word for word in words if word.startswith("--command=")]
            trainings.append(command.replace("$NNODES", "4").replace("$NODE_RANK", "0").split())
        elif name == "sky":
            assert words[:3] == ["jobs", "launch", "launch/sky.yaml"]
            given = dict(word.split("=", 1) for word in words[4::2])
            assert words[3::2] == ["--env"] * len(given)
            task = yaml.safe_load((ROOT / words[2]).read_text())
            assert given.keys() <= task["envs"].keys()
            sky = "python -m gcl_jax.train --config={CONFIG} --workdir={WORKDIR} "
            trainings.append(f"{sky}--config.data.store={{STORE}}".format(**given).split())
        elif name == "kubectl" and given:
            assert words == ["apply", "-l", "accelerator=tpu", "-f", "-"]
            for manifest in yaml.safe_load_all(given):
                job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
                assert job["containers"][0]["image"].endswith("/gcl_jax:tpu")
                assert job["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
                trainings.append(job["containers"][0]["args"])
    trainings = [words[-words[::-1].index("gcl_jax.train") - 1 :] for words in trainings]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    here = [
        [re.sub("=/(bucket|shared)/", f"={tmp_path}/", x) for x in words] for words in trainings
    ]
    commands.parse(tmp_path, here)
    for place, count in {"/bucket": 6, "/shared": 1}.items():
        flags = {"--config=configs/marqo_gs/vit_b32.py", f"--workdir={place}/runs/b32"}
        flags |= {f"--config.data.store={place}/stores/marqo_gs_full_10m"}
        assert [flags < set(words) for words in trainings].count(True) == count
    assert len(trainings) == 7
    assert cloud.lines("state")[0].startswith("NONE"), "the page deletes its slice"
    (copied,) = [words for name, words, _ in called if words[:2] == ["storage", "cp"]]
    assert copied[-1] == "gs://my-bucket/stores/"


def test_the_page_names_every_chip_that_can_be_planned_for():
    """And what it calls a slice has as many chips, or TensorCores, two a chip, as its topology."""
    page = (ROOT / "docs/pods.md").read_text().partition("## Names of chips")[2]
    for name in (*TPUS, *(name.upper() for name in GPUS)):
        assert re.search(rf"^\| {name}\b", page, re.MULTILINE), name
    slices = re.findall(r"^\| \w+[^|]*\| `\w+-(\d+)` is ([\dx]+): (\w+)", page, re.MULTILINE)
    assert len(slices) == len(TPUS) - 1, "v7x has no such names"
    for count, topology, counted in slices:
        chips = math.prod(map(int, topology.split("x")))
        assert int(count) == chips * {"chips": 1, "TensorCores": 2}[counted]


def test_sky_starts_every_node_as_one_process(tmp_path):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    python = tmp_path / ".venv/bin"
    python.mkdir(parents=True)
    program(python, "python", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    given = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2"}
    given |= {"FLAGS": "--config.seed=1 --config.log_every=2", "CONFIG": "configs/emoji_tiny.py"}
    given |= {"BUCKET": "bucket", "STORE": "gs://b/a store", "WORKDIR": "/bucket/runs/demo"}
    assert {name for name, value in task["envs"].items() if value is None} == {
        *("BUCKET", "STORE", "WORKDIR", "CONFIG")
    }
    environment = os.environ | task["envs"] | given | {"SKYPILOT_NODE_RANK": "1"}
    printed = subprocess.run(
        ["bash", "-euc", task["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True
    ).stdout.splitlines()
    assert task["num_nodes"] == 2
    assert printed == [
        "-m",
        "gcl_jax.train",
        "--config=configs/emoji_tiny.py",
        "--config.data.store=gs://b/a store",
        "--workdir=/bucket/runs/demo",
        "--config.seed=1",
        "--config.log_every=2",
        "--coordinator=10.0.0.7:8482",
        "--num_processes=2",
        "--process_id=1",
    ]


def slurm(tmp_path, srun, *flags, **variables):
    """The batch script, run by bash with stubs of `srun` and `scontrol`; what was requeued."""
    program(tmp_path, "srun", srun)
    program(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    environment = ENVIRONMENT | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),  # jax makes a port of it
        "STORE": "store",
        "WORKDIR": "runs/a",
        **variables,
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


def test_slurm_script_trains_with_two_tasks(config_file, tiny_store, tmp_path):
    workdir, store = tmp_path / "a run", str(tiny_store.directory)
    flags = ["--config.optim.steps=2", "--config.eval.every=0", "--config.checkpoint.every=2"]
    result, requeued = slurm(
        tmp_path, SRUN, f"--config={config_file}", *flags, STORE=store, WORKDIR=str(workdir)
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("starting from random parameters") == 1
    assert [row["step"] for row in logged(workdir)] == [1, 2]
    assert (workdir / "checkpoints/2").is_dir()
    assert requeued == ""


HOUR = {"SECONDS": "3600"}  # what bash counts on from


@pytest.mark.parametrize(
    ("code", "variables", "again"),
    [
        (143, {}, True),
        (85, {}, True),
        (85, {"SLURM_RESTART_COUNT": "10"}, False),
        (74, {}, True),
        (74, {"SLURM_RESTART_COUNT": "10"}, False),
        (85, {"SLURM_RESTART_COUNT": "10"} | HOUR, True),
        (137, HOUR, True),
        (137, {}, False),
        (1, {}, False),
        (1, HOUR, True),
        (2, {}, False),
        (2, HOUR, False),
        (0, HOUR, False),
    ],
)
def test_slurm_script_requeues_what_goes_on(tmp_path, code, variables, again):
    result, requeued = slurm(tmp_path, f"#!/bin/sh\nexit {code}\n", **variables)
    assert result.returncode == code
    assert requeued == (f"requeue {os.getpid()}\n" if again else "")


# A cloud of one slice; the file `state` has the states of the request and of its VMs. The file
# script.KIND scripts the calls of that kind, a line each: "fail TEXT" (nothing happens), "lost" (it
# happens, and is not heard of), "silent", "is REQUEST [NODE]" (first the states become these),
# "hang"; before it the exit code of a training. `violations` notes what must never be.
GCLOUD = r"""#!/usr/bin/env bash
cd "$(dirname "$0")"
words="${*@Q}"
echo "${words//$'\\n'/ }" >> calls
[[ $1 != alpha ]] || shift
case $3-$4 in
  queued-resources-describe) kind=describe; [[ $* != *yaml* ]] || kind=reason ;;
  *-scp | queued-resources-[!s]*) kind=$4 ;;
  tpu-vm-describe) kind=node ;;
  *) kind=setup
    [[ $* != *'kill "$pid"'* ]] || kind=stop
    [[ $* != *'-m gcl_jax.train'* ]] || kind=run ;;
esac
echo "$kind" >> kinds
printf '%s' "${!#}" > last.$kind
script=()
[[ ! -e script.$kind ]] || mapfile -t script < script.$kind
read -r what more <<< "${script[0]:-}"
printf '%s\n' "${script[@]:1}" > script.$kind
code=0
[[ $what != [0-9]* ]] || { code=$what; read -r what more <<< "$more"; }
read -r request node < state
case $what in
  fail) echo "ERROR: $more" >&2; exit 1 ;;
  silent) exit 0 ;;
  is) read -r request node <<< "$more" ;;
esac
case $kind in
  create)
    [[ $request == NONE || $what == is ]] || echo "create beside $request" >> violations
    [[ $what == is ]] || { request=ACTIVE; node=READY; } ;;
  delete)
    [[ $request/$node/$DELETE != ACTIVE/READY/ ]] || echo "delete of a healthy slice" >> violations
    request=NONE ;;
  describe | node)
    if [[ $request == NONE || $kind/$node == node/GONE ]]; then
      echo "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found." >&2
      exit 1
    elif [[ $kind == node ]]; then
      echo "${node:-READY}"
    else
      by=""
      [[ $request != */USER ]] || by=USER
      printf '%s\t%s\n' "${request%/*}" "$by"
    fi ;;
  run)
    if [[ $what == hang ]]; then
      touch training
      while [[ ! -e stopped ]]; do sleep 0.05; done
    fi ;;
  stop) touch stopped ;;
esac
echo "$request $node" > state
[[ $what != lost ]] || { echo "ERROR: UNAVAILABLE: deadline exceeded" >&2; exit 1; }
exit "$code"
"""


def heard():
    """In the child: signals that a background job ignores, bash could not trap."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


class Cloud:
    """launch/tpu_vm.sh under a stub gcloud; what must never be is checked after every call."""

    def __init__(self, folder, state="NONE", **scripts):
        self.folder = folder
        program(folder, "gcloud", GCLOUD)
        program(folder, "git", "#!/bin/sh\n")  # there is nothing to change in the meantime
        (folder / "state").write_text(f"{state}\n")
        for kind, script in scripts.items():
            (folder / f"script.{kind}").write_text(script.replace("; ", "\n") + "\n")
        self.environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "NAME": "slice",
            "ZONE": "us-west4-a",
            "ACCELERATOR": "v5litepod-16",
            "RUNTIME": "v2-alpha-tpuv5-lite",
            "BUCKET": "bucket",
            "STORE": "/bucket/store",
            "WORKDIR": "/bucket/a b",
            "PAUSE": "0",
            "DELETE": "",
        }

    def start(self, *words, **environment):
        return subprocess.Popen(
            [LAUNCH / "tpu_vm.sh", *words],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heard,
        )

    def end(self, script):
        self.out, self.said = script.communicate(timeout=PATIENCE_SECONDS)
        self.code = script.returncode
        assert self.lines("violations") == []
        told = "billed while it is there" in self.said
        left = not re.match("NONE|.*/USER", self.lines("state")[0])
        assert told == left or (told and "does not tell" in self.said), self.said
        return self

    def call(self, *words, **environment):
        return self.end(self.start(*words, **environment))

    def lines(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def kinds(self):
        """The calls, without the questions."""
        asked = ("describe", "node", "reason")
        return " ".join(kind for kind in self.lines("kinds") if kind not in asked)


INSTALL = "scp setup"
TRAIN = f"create {INSTALL} run"
# What the cloud does; what the script must have done; its exit code; a word of what it says.
FAILURES = {
    "nothing": ({}, TRAIN, 0, ""),
    "a status call fails once": ({"describe": "fail UNAVAILABLE"}, TRAIN, 0, "asking again"),
    "a status call says nothing": ({"describe": "silent"}, TRAIN, 0, "asking again"),
    "a status call fails after a failure": (
        {"run": "1; 0", "describe": "; ; fail INTERNAL"},
        f"{TRAIN} {INSTALL} run",
        0,
        "asking again",
    ),
    "the status stays unknown": (
        {"state": "ACTIVE", "run": "1", "describe": "; " + "fail UNAVAILABLE; " * 70},
        f"{INSTALL} run",
        1,
        "a state that gcloud does not tell",
    ),
    "no permission": ({"describe": "fail PERMISSION_DENIED"}, "", 1, "PERMISSION_DENIED"),
    "a permission lost and found": (
        {"run": "1; 0", "describe": "; ; fail gcloud auth login; fail PERMISSION_DENIED"},
        f"{TRAIN} {INSTALL} run",
        0,
        "asking again",
    ),
    "a request is made and not heard of": ({"create": "lost"}, TRAIN, 0, ""),
    "a request is refused once": ({"create": "fail INTERNAL"}, f"create {TRAIN}", 0, ""),
    "a request is refused": ({"create": "fail QUOTA; " * 3}, "create " * 3, 1, "in vain"),
    "waiting": (
        {
            "create": "is WAITING_FOR_RESOURCES",
            "describe": "; ; is PROVISIONING; is ACTIVE CREATING; is ACTIVE READY",
        },
        TRAIN,
        0,
        "PROVISIONING\nslice: CREATING\nslice: ACTIVE",
    ),
    "a request fails": (
        {"create": "is FAILED; is FAILED; is FAILED"},
        "create delete " * 3,
        1,
        "in vain",
    ),
    "suspended while waiting": (
        {"create": "is WAITING_FOR_RESOURCES", "describe": "; ; is SUSPENDED"},
        f"create delete {TRAIN}",
        0,
        "SUSPENDED",
    ),
    "suspended in training": (
        {"run": "255 is SUSPENDED; 0"},
        f"{TRAIN} delete {TRAIN}",
        0,
        "SUSPENDED",
    ),
    "on its way down": (
        {"run": "255 is SUSPENDING; 0", "describe": "; ; ; ; is SUSPENDED"},
        f"{TRAIN} delete {TRAIN}",
        0,
        "SUSPENDING",
    ),
    "its VMs are gone, its request is not": (
        {"run": "255 is ACTIVE GONE; 0"},
        f"{TRAIN} delete {TRAIN}",
        0,
        "TERMINATED",
    ),
    "its VMs are preempted, its request is not": (
        {"run": "255 is ACTIVE PREEMPTED; 0"},
        f"{TRAIN} delete {TRAIN}",
        0,
        "PREEMPTED",
    ),
    "a VM is repaired": (
        {"run": "255 is ACTIVE REPAIRING; 0", "describe": "; ; ; ; is ACTIVE READY"},
        f"{TRAIN} {INSTALL} run",
        0,
        "REPAIRING",
    ),
    "somebody deletes it": ({"run": "255 is NONE"}, TRAIN, 255, "somebody else has deleted"),
    "somebody deletes its VMs": (
        {"run": "255 is SUSPENDED/USER"},
        TRAIN,
        255,
        "somebody else has deleted",
    ),
    "a copy fails": ({"scp": "fail ssh"}, f"create scp {INSTALL} run", 0, "going on"),
    "an installation fails": ({"setup": "fail pip"}, f"create {INSTALL} {INSTALL} run", 0, ""),
    "the connection breaks": ({"run": "255; 0"}, f"{TRAIN} {INSTALL} run", 0, "going on"),
    "a deletion fails once": (
        {"run": "255 is SUSPENDED; 0", "delete": "fail INTERNAL"},
        f"{TRAIN} delete delete {TRAIN}",
        0,
        "could not delete",
    ),
    "a deletion is not heard of": (
        {"run": "255 is SUSPENDED; 0", "delete": "lost"},
        f"{TRAIN} delete {TRAIN}",
        0,
        "",
    ),
    "no deletion": (
        {"run": "255 is SUSPENDED", "delete": "fail INTERNAL; " * 9},
        f"{TRAIN}{' delete' * 5}",
        1,
        "could not delete",
    ),
    "a wrong configuration": ({"run": "2"}, TRAIN, 2, ""),
    "ten failures": (
        {"run": "1; " * 20},
        f"{TRAIN}{f' {INSTALL} run' * 9}",
        1,
        "ten failures in a row",
    ),
    "failures, a preemption, failures": (
        {"run": "1; " * 4 + "1 is SUSPENDED; " + "1; " * 20},
        f"{TRAIN}{f' {INSTALL} run' * 4} delete {TRAIN}{f' {INSTALL} run' * 9}",
        1,
        "ten failures in a row",
    ),
    "maintenance, often": ({"run": "143; " * 15 + "0"}, f"{TRAIN}{f' {INSTALL} run' * 15}", 0, ""),
}


@pytest.mark.parametrize("name", FAILURES)
def test_tpu_script_survives(tmp_path, name):
    """No slice is lost while it is healthy, none is left without a word, none asked for twice."""
    script, kinds, code, word = FAILURES[name]
    cloud = Cloud(tmp_path, **script).call("train")
    assert cloud.code == code, cloud.said
    assert cloud.kinds == kinds.strip()
    assert word in cloud.said


def test_tpu_script_gives_the_slice_back_if_asked(tmp_path):
    cloud = Cloud(tmp_path, run="2").call("train", DELETE="1")
    assert (cloud.code, cloud.kinds) == (2, f"{TRAIN} delete")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_tpu_script_ends_the_training_when_it_is_told_to_stop(tmp_path, signum):
    cloud = Cloud(tmp_path, run="hang")
    script = cloud.start("train")
    wait_for(tmp_path / "training")
    script.send_signal(signum)
    assert cloud.end(script).code == 130
    assert cloud.kinds == f"{TRAIN} stop"


def test_tpu_script_leaves_nothing_untold_when_interrupted_while_it_waits(tmp_path):
    cloud = Cloud(tmp_path, create="is WAITING_FOR_RESOURCES")
    script = cloud.start("train", PAUSE="0.1")
    wait_for(tmp_path / "script.create")
    time.sleep(0.5)
    script.send_signal(signal.SIGINT)
    assert cloud.end(script).code == 130
    assert "launch/tpu_vm.sh delete" in cloud.said


def wait_for(path):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, []),
        ({"CAPACITY": "spot"}, ["--spot"]),
        ({"CAPACITY": "reserved"}, ["--reserved"]),
        ({"CAPACITY": "flex-start"}, ["--provisioning-model=flex-start", "--max-run-duration=24h"]),
        ({"CREATE_FLAGS": "--network=mine --tags=a"}, ["--network=mine", "--tags=a"]),
    ],
)
def test_tpu_script_asks_for_the_capacity(tmp_path, variables, flags):
    cloud = Cloud(tmp_path).call("create", **variables)
    (call,) = [shlex.split(line) for line in cloud.lines("calls") if "'create'" in line]
    track = ["alpha"] if variables.get("CAPACITY") == "flex-start" else []
    given = ["--node-id=slice", "--zone=us-west4-a", "--accelerator-type=v5litepod-16"]
    given += ["--runtime-version=v2-alpha-tpuv5-lite", *flags]
    assert call == [*track, "compute", "tpus", "queued-resources", "create", "slice", *given]


def test_tpu_script_takes_several_slices_for_one(tmp_path):
    """All are asked for, looked at, installed and trained on together: one that is lost is all."""
    cloud = Cloud(tmp_path, run="255 is ACTIVE PREEMPTED; 0").call("train", SLICES="2")
    assert (cloud.code, cloud.kinds) == (0, f"{TRAIN} delete {TRAIN}")
    calls = [shlex.split(line)[2:] for line in cloud.lines("calls")]
    made = next(call for call in calls if call[1] == "create")
    assert {"--node-count=2", "--node-prefix=slice"} < {*made}
    assert not any(word.startswith("--node-id") for word in made)
    looked_at = [call[2] for call in calls if call[:2] == ["tpu-vm", "describe"]]
    assert looked_at == [f"slice-{i}" for i in (0, 1, 0, 0, 0, 1)]
    told = [call for call in calls if call[1] in ("ssh", "scp")]
    assert len(told) == 3 + 3
    for call in told:
        assert call[0] == "queued-resources"
        assert {"--worker=all", "--node=all"} < {*call}


@pytest.mark.parametrize(
    "variables", [{"CAPACITY": "cheap"}, {"SPOT": "1"}, {"BUCKET": ""}, {"SLICES": "two"}]
)
def test_tpu_script_refuses_before_anything_is_billed(tmp_path, variables):
    cloud = Cloud(tmp_path).call("train", **variables)
    assert (cloud.code, cloud.kinds) == (2, "")
    assert "error: " in cloud.said


def test_tpu_script_needs_no_mount_for_paths_in_buckets(tmp_path):
    paths = {"STORE": "gs://a/store", "WORKDIR": "gs://a/run"}
    cloud = Cloud(tmp_path).call("train", BUCKET="", EXTRAS="tpu,x", **paths)
    assert (cloud.code, cloud.kinds) == (0, TRAIN)
    setup = (tmp_path / "last.setup").read_text()
    assert "gcsfuse" not in setup
    assert r"--editable .\[tpu\,x\]" in setup
    assert (
        "--config.data.store=gs://a/store --workdir=gs://a/run"
        in (tmp_path / "last.run").read_text()
    )
    assert Cloud(tmp_path).call("train", STORE="").code == 1
    assert "STORE: names the store" in Cloud(tmp_path).call("train", STORE="").said


def test_tpu_script_ships_the_commit_and_names_what_is_not_in_it(tmp_path):
    checkout, stub = tmp_path / "checkout", tmp_path / "stub"
    (checkout / "launch").mkdir(parents=True)
    stub.mkdir()
    shutil.copy(LAUNCH / "tpu_vm.sh", checkout / "launch")
    (checkout / "model.py").write_text("committed")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=first"]):
        subprocess.run([*git, *words], check=True)
    (checkout / "model.py").write_text("changed")
    cloud = Cloud(stub, "ACTIVE")
    (stub / "git").unlink()
    stub_text = (stub / "gcloud").read_text()
    copied = '[[ $kind != scp ]] || cp "$5" archive.tar.gz\nscript=()'
    program(stub, "gcloud", stub_text.replace("script=()", copied, 1))
    script = subprocess.run(
        [checkout / "launch/tpu_vm.sh", "install"],
        env=cloud.environment,
        capture_output=True,
        text=True,
    )
    assert script.returncode == 0, script.stderr
    assert "first\nNOT in it, because not committed:\n M model.py\n" in script.stderr
    with tarfile.open(stub / "archive.tar.gz") as tar:
        assert tar.extractfile("model.py").read() == b"committed"
    setup = (stub / "last.setup").read_text()
    assert "gcsfuse --implicit-dirs --rename-dir-limit=200000 bucket /bucket" in setup
    assert subprocess.run(["bash", "-n", "-c", setup.removeprefix("--command=")]).returncode == 0


def test_a_training_that_was_left_running_saves_before_the_next_starts(tmp_path):
    """What the script runs on a host, run here: gcloud repeats a call whose connection broke."""
    Cloud(tmp_path, "ACTIVE").call("run", "--config.seed=1")
    command = (tmp_path / "last.run").read_text().removeprefix("--command=")
    (tmp_path / "gcl_jax/.venv/bin").mkdir(parents=True)
    program(
        tmp_path / "gcl_jax/.venv/bin",
        "python",
        f"#!/usr/bin/env bash\ntrap 'sleep 0.3; echo saved >> {tmp_path}/log; exit 143' TERM\n"
        f'echo "$@" >> {tmp_path}/log\n[[ -e {tmp_path}/last ]] || while sleep 0.05; do :; done\n',
    )
    start = lambda: subprocess.Popen(["bash", "-c", command], cwd=tmp_path)
    first = start()
    wait_for(tmp_path / "log")
    (tmp_path / "last").touch()
    second = start()
    assert first.wait(timeout=PATIENCE_SECONDS) == 143
    assert second.wait(timeout=PATIENCE_SECONDS) == 0
    started = "-m gcl_jax.train --config.data.store=/bucket/store --workdir=/bucket/a b"
    started += " --config.seed=1"
    assert (tmp_path / "log").read_text().splitlines() == [started, "saved", started]


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
