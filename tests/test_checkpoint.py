"""A checkpoint gives back the same bits on any mesh, or one line that says why not."""

import json
import resource
import shutil

import jax
import numpy as np
import optax
import pytest
from conftest import make_tiny_config
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gcl_jax import sharding
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.checkpoints.saved import COMPLETE, Saved, delete, sealed
from gcl_jax.checkpoints.state import TrainState, abstract_state, averaged_params
from gcl_jax.config import CheckpointConfig, MeshConfig
from gcl_jax.errors import ConfigError, DataError, StorageError
from gcl_jax.models.clip import abstract_model
from gcl_jax.optim import make_optimizer
from gcl_jax.paths import remote
from gcl_jax.train.setup import require_metric
from gcl_jax.validation import validate


def small(cfg, keep=1):
    """Small arrays, all of them sharded where a mesh has an fsdp axis."""
    cfg.model.text.vocab_size = 64
    cfg.checkpoint = CheckpointConfig(keep=keep)
    return cfg


@pytest.fixture
def cfg(tiny_config, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2)
    return small(tiny_config)


def abstract(cfg, mesh=None):
    tx = make_optimizer(cfg.optim, 10, abstract_model(cfg.model)[1])
    return abstract_state(cfg, tx, sharding.make_mesh(mesh or MeshConfig(), 8))


def random_state(cfg, seed):
    """A state of random bits of its dtypes, on 8 x 1 devices."""
    rng = np.random.default_rng(seed)
    bits = lambda x: rng.normal(size=x.shape, scale=100).astype(x.dtype)
    return jax.tree.map(lambda x: jax.device_put(bits(x), x.sharding), abstract(cfg))


def save(workdir, cfg, *steps):
    with Checkpointer(workdir, cfg.checkpoint, config=cfg) as checkpointer:
        for step in steps:
            checkpointer.save(step, random_state(cfg, step), {"position": 8 * step})


def little_state(seed, width=8):
    """Of few arrays: placed, with moments and averages, in several dtypes."""
    rng = np.random.default_rng(seed)
    eight = NamedSharding(sharding.make_mesh(MeshConfig(), 8), PartitionSpec("data"))
    draw = lambda dtype: (100 * rng.normal(size=(64, width))).astype(dtype)
    everywhere = NamedSharding(eight.mesh, PartitionSpec())
    state = TrainState(
        np.int32(seed),
        {"w": draw(np.float32), "layer": {"w": draw("bfloat16")}},
        (optax.ScaleByAdamState(np.int32(7), {"w": draw("bfloat16")}, {"w": draw(np.float32)}),),
        {"w": draw(np.float32)},
    )
    return jax.tree.map(lambda x: jax.device_put(x, eight if x.ndim else everywhere), state)


def shapes(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def kept(workdir):
    """What lies in the folder of checkpoints."""
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A run that saved at steps 3 and 9 and keeps both; to be copied."""
    workdir = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 2)
        save(workdir, small(make_tiny_config(), keep=2), 3, 9)
    return workdir


@pytest.fixture
def little(tmp_path):
    """A run of `little_state`, saved at steps 3 and 9, that keeps all."""
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        for step in (3, 9):
            checkpointer.save(step, little_state(step), {"position": 8 * step})
    return tmp_path


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1), MeshConfig(4, 2)], ids=["8x1", "4x2"])
def test_the_newest_checkpoint_comes_back_bit_for_bit_on_any_mesh(cfg, workdir, mesh):
    target, saved = abstract(cfg, mesh), random_state(cfg, 9)
    with Checkpointer(workdir, cfg.checkpoint) as checkpointer:
        assert checkpointer.latest_step() == 9
        _, state, position = checkpointer.restore(target)
        params = checkpointer.restore_params(target.params)
    assert position == {"position": 72}
    jax.tree.map(np.testing.assert_array_equal, state, saved)
    jax.tree.map(np.testing.assert_array_equal, params, saved.params)
    placement = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    assert placement(state) == placement(target)
    assert placement(params) == placement(target.params)


def assert_refused(workdir, cfg, message):
    """Both ways of restoring answer with one line."""
    target = abstract(cfg)
    with Checkpointer(workdir, cfg.checkpoint) as checkpointer:
        for restore, what in (
            (checkpointer.restore, target),
            (checkpointer.restore_params, target.params),
        ):
            with pytest.raises(DataError, match=message) as refusal:
                restore(what)
            assert "\n" not in str(refusal.value)


def test_without_a_checkpoint_there_is_nothing_to_restore(cfg, tmp_path):
    with Checkpointer(tmp_path, cfg.checkpoint) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.restore(abstract(cfg)) is None
        with pytest.raises(DataError, match="no complete checkpoint"):
            checkpointer.restore_params(abstract(cfg).params)


@pytest.mark.parametrize(("part", "key"), [("vision", "layers"), ("text", "width")])
def test_a_changed_model_is_a_data_error(cfg, workdir, part, key):
    section = getattr(cfg.model, part)
    setattr(section, key, 2 * getattr(section, key))
    assert_refused(workdir, cfg, r"checkpoints/9 does not fit this configuration.*shape")
    assert kept(workdir) == ["3", "9"]


def test_another_dtype_is_refused_by_a_run_and_converted_for_reading(cfg, workdir):
    target, saved = abstract(cfg), random_state(cfg, 9)
    half = lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=x.sharding)
    target = TrainState(target.step, jax.tree.map(half, target.params), target.opt_state)
    with Checkpointer(workdir, cfg.checkpoint) as checkpointer:
        with pytest.raises(DataError, match=r"params\.logit_scale is float32, not bfloat16"):
            checkpointer.restore(target)
        params = checkpointer.restore_params(target.params)
    expected = jax.tree.map(lambda x: x.astype("bfloat16"), saved.params)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_missing_and_surplus_parameters_are_all_named(cfg, workdir):
    target = abstract(cfg).params
    target["logit_bias"] = target.pop("logit_scale")
    target["text"]["extra"] = target["text"].pop("token_embedding")
    with (
        Checkpointer(workdir, cfg.checkpoint) as checkpointer,
        pytest.raises(DataError, match="fit this configuration") as refusal,
    ):
        checkpointer.restore_params(target)
    for problem in (
        "no logit_bias",
        "surplus logit_scale",
        "no text.extra",
        "surplus text.token_embedding",
    ):
        assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1), MeshConfig(4, 2)], ids=["8x1", "4x2"])
def test_moving_averages_come_back_and_replace_the_parameters(cfg, tmp_path, mesh):
    """Of the text tower alone: the image tower is frozen and has none."""
    cfg.optim.ema_decay, cfg.optim.freeze = 0.9, ("visual",)
    saved, target = random_state(cfg, 1), abstract(cfg, mesh)
    with Checkpointer(tmp_path, cfg.checkpoint) as checkpointer:
        checkpointer.save(1, saved, {})
        _, state, _ = checkpointer.restore(target)
        params = checkpointer.restore_params(target.params)
    jax.tree.map(np.testing.assert_array_equal, state, saved)
    placement = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    assert placement(state) == placement(target)
    assert placement(params) == placement(target.params)
    jax.tree.map(np.testing.assert_array_equal, params["visual"], saved.params["visual"])
    jax.tree.map(np.testing.assert_array_equal, params["text"], saved.ema["text"])
    jax.tree.map(np.testing.assert_array_equal, params, averaged_params(saved))


def test_a_checkpoint_without_moving_averages_is_refused_by_a_run_that_keeps_them(cfg, workdir):
    cfg.optim.ema_decay = 0.9
    with (
        Checkpointer(workdir, cfg.checkpoint) as checkpointer,
        pytest.raises(DataError, match="does not fit this configuration") as refusal,
    ):
        checkpointer.restore(abstract(cfg))
    assert "\n" not in str(refusal.value)


def test_state_of_any_dtype_goes_to_one_device_to_4x2_and_back(tmp_path):
    """Parameters, moments and averages, whose bits are the same after each journey."""
    state = moved = little_state(7)
    eight = NamedSharding(sharding.make_mesh(MeshConfig(), 8), PartitionSpec("data"))
    four = NamedSharding(sharding.make_mesh(MeshConfig(4, 2), 8), PartitionSpec("fsdp", "data"))
    one = SingleDeviceSharding(jax.devices()[3])
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        for step, place in enumerate((one, four, eight), start=1):
            scalar = place if place is one else NamedSharding(place.mesh, PartitionSpec())
            placed = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place if x.ndim else scalar)
                for x in jax.tree.leaves(state)
            ]
            target = jax.tree.unflatten(jax.tree.structure(state), placed)
            checkpointer.save(step, moved, {})
            moved = checkpointer.restore(target).state
            jax.tree.map(np.testing.assert_array_equal, moved, state)
            placement = lambda tree: [(x.sharding, x.dtype) for x in jax.tree.leaves(tree)]
            assert placement(moved) == placement(target)


def data_files(folder):
    """Those with arrays; not all that orbax writes is ever read."""
    return [path for path in folder.glob("state/**/d/*") if path.is_file()]


def truncate(folder):
    for file in data_files(folder):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bits(folder):
    for file in data_files(folder):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)


def change_position(folder):
    file = folder / "about" / "metadata"
    file.write_text(file.read_text().replace('"position": 72', '"position": 73'))


DAMAGES = {
    "truncated": (truncate, "state"),
    "flipped bits": (flip_bits, "state"),
    "deleted files": (lambda folder: [file.unlink() for file in data_files(folder)], "state"),
    "no arrays": (lambda folder: shutil.rmtree(folder / "state"), "state"),
    "no description": (lambda folder: shutil.rmtree(folder / "about"), "metadata is missing"),
    "garbage": (lambda folder: (folder / "about/metadata").write_text("{"), "not what was written"),
    "another position": (change_position, "not what was written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(little, capsys, damage):
    harm, problem = DAMAGES[damage]
    newest, old = little / "checkpoints" / "9", little_state(3)
    target = shapes(old)
    harm(newest)
    before = kept(little)
    with Checkpointer(little, CheckpointConfig(), read_only=True) as checkpointer:
        params = checkpointer.restore_params(target.params)
        assert checkpointer.latest_step() == 3
    jax.tree.map(np.testing.assert_array_equal, params, averaged_params(old))
    assert kept(little) == before
    with Checkpointer(little, CheckpointConfig()) as checkpointer:
        step, state, data = checkpointer.restore(target)
        assert (step, data, checkpointer.latest_step()) == (3, {"position": 24}, 3)
        checkpointer.save(9, little_state(99), {"position": 72})
        again = checkpointer.restore(target)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"warning: {newest} is damaged and passed over: ")
        assert problem in line
        assert len(line) < 1000
    jax.tree.map(np.testing.assert_array_equal, state, old)
    assert again.step == 9
    jax.tree.map(np.testing.assert_array_equal, again.state, little_state(99))
    assert [path.name for path in little.glob("checkpoints/damaged/*/*")] == ["9"]


def test_when_all_are_damaged_they_are_named_and_stay(little):
    (little / "checkpoints/9/about/metadata").write_text("{")
    shutil.rmtree(little / "checkpoints/3/state")
    target = shapes(little_state(3))
    message = r"no checkpoint in \S+checkpoints is undamaged: 9: about/metadata .*; 3: state: "
    with Checkpointer(little, CheckpointConfig()) as checkpointer:
        for restore, what in (
            (checkpointer.restore, target),
            (checkpointer.restore_params, target.params),
        ):
            with pytest.raises(DataError, match=message) as refusal:
                restore(what)
            assert "\n" not in str(refusal.value)
    assert kept(little) == ["3", "9"]


def test_a_checkpoint_of_another_configuration_is_not_damaged(little):
    """Also behind one that is."""
    (little / "checkpoints/9/about/metadata").write_text("{")
    wider = shapes(little_state(3, width=16))
    with (
        Checkpointer(little, CheckpointConfig()) as checkpointer,
        pytest.raises(DataError, match=r"checkpoints/3 does not fit this configuration.*shape"),
    ):
        checkpointer.restore(wider)
    assert kept(little) == ["3", "9"]


def test_one_step_may_be_asked_for(little):
    (little / "checkpoints/9/about/metadata").write_text("{")
    state = little_state(3)
    target = shapes(state.params)
    with Checkpointer(little, CheckpointConfig(), read_only=True) as checkpointer:
        params = checkpointer.restore_params(target, step=3)
        with pytest.raises(DataError, match="has no checkpoint of step 4; it has 3, 9"):
            checkpointer.restore_params(target, step=4)
        with pytest.raises(DataError, match=r"checkpoints/9 is damaged"):
            checkpointer.restore_params(target, step=9)
    jax.tree.map(np.testing.assert_array_equal, params, averaged_params(state))


def test_a_checkpoint_tells_its_configuration(cfg, workdir):
    saved = Saved(workdir / "checkpoints" / "9")
    assert saved.config["model"]["embed_dim"] == cfg.model.embed_dim
    assert saved.data == {"position": 72}


def test_the_last_the_best_and_every_kth_stay(cfg, tmp_path):
    """Through a restart, too; steps without the metric, or with NaN, are never the best."""
    state = TrainState(np.int32(0), {"x": np.zeros(3, np.float32)}, ())
    scores = {2: 0.5, 4: 0.9, 5: None, 6: 0.1, 8: 0.7, 9: None, 10: float("nan"), 12: 0.2, 13: None}
    cfg.checkpoint = CheckpointConfig(keep=2, keep_every=6, best="s/m", keep_best=2)
    for steps in ((2, 4, 5, 6), (8, 9, 10, 12, 13)):
        with Checkpointer(tmp_path, cfg.checkpoint) as checkpointer:
            for step in steps:
                metrics = {} if scores[step] is None else {"s/m": scores[step], "s/other": 1.0}
                checkpointer.save(step, state, {}, metrics)
    assert sorted(map(int, kept(tmp_path))) == [4, 6, 8, 12, 13]
    with Checkpointer(tmp_path, cfg.checkpoint, read_only=True) as checkpointer:
        assert checkpointer.best_step() == 4
        assert checkpointer.latest_step() == 13
    cfg.checkpoint.best = "s/unknown"
    with (
        Checkpointer(tmp_path, cfg.checkpoint, read_only=True) as checkpointer,
        pytest.raises(DataError, match=r"config.checkpoint.best='s/unknown'"),
    ):
        checkpointer.best_step()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep_every": 300}, "keep_every=300 is no multiple of checkpoint.every=200"),
        ({"keep_every": -1}, "keep_every=-1 must be 0 or more"),
        ({"keep_best": 0}, "keep_best=0 must be 1 or more"),
        ({"best": "in_domain/NDCG@10", "every": 7}, "eval.every=400 must be a multiple"),
    ],
)
def test_impossible_retention_is_refused(cfg, keys, message):
    cfg.eval.every, cfg.checkpoint = 400, CheckpointConfig(**keys)
    with pytest.raises(ConfigError, match=message):
        validate(cfg)


def test_an_unknown_metric_is_refused_with_those_that_there_are(cfg):
    cfg.eval.splits = ("in_domain", "zero_shot")
    cfg.checkpoint.best = "zero_shot/NDCG@10"
    require_metric(cfg)
    cfg.checkpoint.best = "NDCG@10"
    with pytest.raises(
        ConfigError, match=r"'NDCG@10' must be one of in_domain/NDCG@10, .*zero_shot"
    ):
        require_metric(cfg)


@pytest.fixture
def small_files():
    """Files end at 8 KiB: like a full disk, but for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("noticed", ["at the next step", "at the next save", "at the end"])
def test_a_save_that_fails_says_so_in_one_line(little, small_files, capfd, noticed):
    def run():
        with Checkpointer(little, CheckpointConfig()) as checkpointer:
            checkpointer.save(12, little_state(12, width=128), {})
            while noticed == "at the next step":
                checkpointer.check_for_errors()
            if noticed == "at the next save":
                checkpointer.save(15, little_state(15), {})

    with pytest.raises(
        StorageError, match=r"cannot save a checkpoint in .*: File too large;"
    ) as error:
        run()
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 74, "not a mistake of the configuration"
    assert capfd.readouterr().err == ""
    with Checkpointer(little, CheckpointConfig()) as checkpointer:
        assert checkpointer.latest_step() == 9
        state = checkpointer.restore(shapes(little_state(9))).state
    jax.tree.map(np.testing.assert_array_equal, state, little_state(9))
    assert [name for name in kept(little) if name.isdecimal()] == ["3", "9"]


def test_what_kills_left_is_no_checkpoint(little):
    """A save, and a deletion, that ended in their midst, now and when folders were renamed. What
    others keep there stays."""
    folder = little / "checkpoints"
    for name in ("12.orbax-checkpoint-tmp", "deleted/1", "11", "12", "13"):
        shutil.copytree(folder / "9", folder / name)
    (folder / "11" / COMPLETE).unlink()
    (folder / "12" / COMPLETE).unlink()
    shutil.rmtree(folder / "12/about")
    shutil.rmtree(folder / "13")
    (folder / "13").mkdir()
    (folder / "500").mkdir()
    (folder / "500/model.safetensors").touch()
    (folder / "600").touch()
    with Checkpointer(little, CheckpointConfig(), read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 9
        checkpointer.restore_params(shapes(little_state(9).params))
    assert checkpointer.step == 9
    with Checkpointer(little, CheckpointConfig(keep=1)) as checkpointer:
        assert checkpointer.latest_step() == 9
        checkpointer.save(12, little_state(12), {})
    assert kept(little) == ["12", "500", "600"]


def test_a_deletion_ends_a_checkpoint_with_its_first_file(little, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        delete(remote(little / "checkpoints/9"))
    with Checkpointer(little, CheckpointConfig(), read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 3


def test_checkpoints_without_the_mark_count_if_they_were_complete_by_their_name(little):
    """As those that orbax 0.12.0 wrote, and renamed."""
    about = little / "checkpoints/9/about/metadata"
    values = json.loads(about.read_text())
    for name in ("format", "sha256"):
        del values[name]
    about.write_text(json.dumps(sealed(values)))
    (little / "checkpoints/9" / COMPLETE).unlink()
    with Checkpointer(little, CheckpointConfig(keep=1)) as checkpointer:
        assert checkpointer.restore(shapes(little_state(9))).step == 9
        checkpointer.save(12, little_state(12), {})
    assert kept(little) == ["12"]
