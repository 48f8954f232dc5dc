"""Opening a run: which of its checkpoints is read."""

import jax
import numpy as np
import pytest
from conftest import make_cpu_mesh

from gcl_jax import config
from gcl_jax.checkpoints import state
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.errors import DataError, UserError
from gcl_jax.models import clip
from gcl_jax.optim import make_optimizer
from gcl_jax.runs import load_model, parameters_digest

NDCG = "in_domain/NDCG@10"


@pytest.fixture
def workdir(tiny_config, tmp_path):
    """Checkpoints 1 to 3, of which 2 is the best; all of logit_scale is its step."""
    cfg, mesh = tiny_config, make_cpu_mesh(8, 1)
    cfg.checkpoint.best = NDCG
    config.save(cfg, tmp_path / "config.json")
    tx = make_optimizer(cfg.optim, 4, clip.abstract_model(cfg.model)[1])
    trained = state.init_state(cfg, tx, mesh)
    with Checkpointer(tmp_path, cfg.checkpoint, config=cfg) as checkpointer:
        for step, ndcg in enumerate((0.1, 0.3, 0.2), 1):
            trained.params["logit_scale"] = jax.device_put(
                np.float32(step), trained.params["logit_scale"].sharding
            )
            checkpointer.save(step, trained, {}, {NDCG: ndcg})
    return tmp_path


def test_the_newest_the_best_or_a_step_is_read(workdir):
    seen = set()
    for checkpoint, expected in (("newest", 3), ("best", 2), ("1", 1)):
        _, params, _, step = load_model(workdir, checkpoint)
        assert (step, float(params["logit_scale"])) == (expected, expected)
        seen.add(parameters_digest(params))
    assert len(seen) == 3
    with pytest.raises(DataError, match="has no checkpoint of step 7; it has 1, 2, 3"):
        load_model(workdir, "7")
    with pytest.raises(UserError, match="--checkpoint=last must be newest, best or a step"):
        load_model(workdir, "last")
