"""launch/slurm.sbatch on SLURM itself: two nodes that are this machine (Debian: slurmctld, slurmd,
slurm-client and munge), with a stub of the interpreter."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")
PATH = f"{os.environ['PATH']}:/usr/sbin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(shutil.which(name, path=PATH) for name in PROGRAMS) or os.geteuid() != 0,
        reason=f"needs {', '.join(PROGRAMS)}, and root",
    ),
]

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] Boards=1 \
SocketsPerBoard=1 CoresPerSocket=96 ThreadsPerCore=1 CPUs=96 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES
"""

# Notes what it was called with; ends with the code in the file `code`, if there is one, else with
# 143 when it is told to stop.
PYTHON = """\
#!/usr/bin/env bash
cd {folder}
trap 'echo "$SLURM_PROCID" >> stopped; exit 143' TERM
echo "$SLURMD_NODENAME $SLURM_NTASKS $SLURM_CPUS_PER_TASK ${{SLURM_RESTART_COUNT:-0}} $*" >> started
[[ ! -e code ]] || exit "$(cat code)"
while sleep 0.2; do :; done
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A folder with the files of a cluster that runs; commands find it by the environment."""
    folder = tmp_path_factory.mktemp("slurm")
    ports = []
    for _ in range(20):
        with socket.create_server(("localhost", 0)) as server:
            ports.append(server.getsockname()[1])
    first = next(port for port in ports if port + 1 not in ports and port - 1 not in ports)
    port = next(port for port in ports if abs(port - first) > 1)
    values = {"folder": folder, "host": socket.gethostname().partition(".")[0]}
    values |= {"user": getpass.getuser(), "port": port, "first": first, "second": first + 1}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
    for i in range(8):
        (folder / f"gpu{i}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "python").write_text(PYTHON.format(folder=folder))
    (folder / "python").chmod(0o755)
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    patch = pytest.MonkeyPatch()
    for name, value in {
        "PATH": PATH,
        "SLURM_CONF": folder / "slurm.conf",
        "PYTHON": folder / "python",
        "STORE": "/shared/a store",
        "WORKDIR": "/shared/run",
    }.items():
        patch.setenv(name, str(value))
    folder.chmod(0o755)
    key, there = folder / "munge.key", folder / "munge.socket"
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={there}"]
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
    daemons = [subprocess.Popen([*munge, *files])]
    daemons.append(subprocess.Popen(["slurmctld", "-D"]))
    daemons += [subprocess.Popen(["slurmd", "-D", "-N", name]) for name in ("n1", "n2")]
    try:
        wait_until(lambda: said("sinfo", "--noheader", "--format=%t %D") == "idle 2\n")
        yield folder
    finally:
        subprocess.run(["scancel", f"--user={getpass.getuser()}", "--signal=KILL", "--full"])
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(timeout=60)
        patch.undo()


def said(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout


def wait_until(happens):
    deadline = time.monotonic() + 150
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def submit(folder, *flags):
    """The script, as it is; what it notes belongs to this job alone."""
    for name in ("started", "stopped"):
        (folder / name).unlink(missing_ok=True)
    script = [*flags, "launch/slurm.sbatch", "--config=a.py"]
    command = ["sbatch", "--parsable", f"--output={folder}/%j.log", *script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout[:-1]


def state(job):
    return re.findall(r"JobState=(\w+)|Restarts=(\d+)", said("scontrol", "show", "job", job))


def lines(folder, name):
    return (folder / name).read_text().splitlines() if (folder / name).exists() else []


@pytest.mark.parametrize(
    ("code", "end", "restarts"),
    [
        (0, "COMPLETED", "0"),
        (1, "FAILED", "0"),
        (2, "FAILED", "0"),
        (74, "PENDING", "1"),
        (85, "PENDING", "1"),
        (143, "PENDING", "1"),
    ],
)
def test_the_exit_code_says_whether_the_job_queues_again(cluster, code, end, restarts):
    (cluster / "code").write_text(str(code))
    job = submit(cluster, "--ntasks-per-node=1")
    wait_until(lambda: state(job) == [(end, ""), ("", restarts)])
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: said("squeue", "--noheader") == "")


def test_all_tasks_are_told_to_stop_before_the_time_is_up(cluster):
    """SIGTERM five minutes before, here of six, and the job queues again; with what the script asks
    for: 16 tasks of 12 cores on two nodes."""
    (cluster / "code").unlink(missing_ok=True)
    job = submit(cluster, "--time=6")
    wait_until(lambda: len(lines(cluster, "started")) == 16)
    given = "-m gcl_jax.train --config.data.store=/shared/a store --workdir=/shared/run"
    started = sorted(lines(cluster, "started"))
    assert started == [f"n{1 + i // 8} 16 12 0 {given} --config=a.py" for i in range(16)]
    wait_until(lambda: state(job) == [("PENDING", ""), ("", "1")])
    assert lines(cluster, "stopped")
    subprocess.run(["scancel", job], check=True)
