"""launch/sky.yaml as SkyPilot itself reads it; in an environment of its own: `make test-sky`."""

import copy
import importlib.util
from pathlib import Path

import pytest
import yaml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="needs make test-sky"),
]

TASK = yaml.safe_load((Path(__file__).parents[1] / "launch/sky.yaml").read_text())
GIVEN = {"BUCKET": "mine", "STORE": "/bucket/a", "WORKDIR": "/bucket/runs/a", "CONFIG": "c.py"}


def read(given, **changes):
    import sky

    return sky.Task.from_yaml_config(copy.deepcopy(TASK) | changes, env_overrides=[*given.items()])


def test_the_task_is_what_it_says():
    task = read(GIVEN)
    (resources,) = task.resources
    assert task.num_nodes == 2
    assert resources.accelerators == {"H100": 8}
    assert resources.use_spot
    recovery = resources.job_recovery
    assert recovery["recover_on_exit_codes"] == [143, 85]
    assert recovery["max_restarts_on_errors"] == 3
    assert task.envs == TASK["envs"] | GIVEN
    (mount,) = task.storage_mounts.values()
    assert (mount.name, mount.mode.value) == ("mine", "MOUNT")


@pytest.mark.parametrize("name", GIVEN)
def test_what_must_be_given_is_asked_for(name):
    given = {key: value for key, value in GIVEN.items() if key != name}
    with pytest.raises(ValueError, match=name):
        read(given)


@pytest.mark.parametrize(
    "changes", [{"node": 2}, {"resources": {"job_recovery": {"recover_on_exit_codes": ["x"]}}}]
)
def test_a_planted_error_is_found(changes):
    with pytest.raises(Exception, match=r"(?i)invalid"):
        read(GIVEN, **changes)
