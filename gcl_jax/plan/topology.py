"""Devices that are not here, for which programs can be compiled all the same."""

import contextlib
import importlib.util
import os
import re
from typing import Any, NamedTuple

from gcl_jax.errors import ConfigError, first_line
from gcl_jax.models.flops import CHIPS, Chip

# {name: (what the compiler calls it, jax's device kind, the most dimensions of a slice, options of
# its description)}. A v4 is one device, as in use; a v7x is two.
TPUS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "v4": ("v4", "TPU v4", 3, {"chip_config_name": "megacore"}),
    "v5e": ("v5e", "TPU v5e", 2, {}),
    "v5p": ("v5p", "TPU v5p", 3, {}),
    "v6e": ("v6e", "TPU v6e", 2, {}),
    "v7x": ("tpu7x", "TPU7x", 3, {}),
}
# {name: what the NVIDIA compiler asks of a device}, as the driver says of an SXM4-80GB, of SXM5
# with HBM3 and HBM3e, and of a B200 (so have XLA's own target configurations it).
_ASKED = ("memory", "cores", "fpus", "shared", "l2", "clock", "capability")
GPUS = {
    "a100": (85100068864, 108, 64, 167936, 41943040, 1.41, 8),
    "h100": (84929347584, 132, 128, 233472, 52428800, 1.98, 9),
    "h200": (151397597184, 132, 128, 233472, 52428800, 1.98, 9),
    "b200": (191514411008, 148, 128, 233472, 132644864, 1.965, 10),
}
GPUS_PER_HOST = 8
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
FORMS = (
    "v5e:16x16, v6e:16x16, v4:4x4x4, v5p:8x8x8, v7x:4x4x4 (chips along each axis), v5e:16x16*4 "
    "(of 4 slices), a100:8, h100:8, h200:8, b200:8, cpu:8 (devices)"
)

# For the TPU compiler, a quarter of its time: what it sends and computes is the same, what it holds
# within some percent; but it copies more, and hides no communication. Compared for ViT-B-32 on
# v5e:4x4, data 4 x fsdp 4. It crashes on plain data parallelism.
QUICK = {"exec_time_optimization_effort": -1.0}

# XLA's GpuTargetConfigProto, in its text format.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {capability} minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


class Topology(NamedTuple):
    """platform: "tpu", "gpu" or "cpu". devices: what a mesh is made of. memory: bytes that a
    program may fill of each. chip: None for CPUs. compiler_options: for `Lowered.compile`."""

    name: str
    platform: str
    devices: list[Any]
    memory: float
    chip: Chip | None
    compiler_options: dict[str, Any]


def open_topology(name: str) -> Topology:
    """The topology called `name`, one of `FORMS`.

    Call it before jax has made any array: fake CPU devices can only be asked for until then.

    Raises:
        ConfigError: no such topology; or its compiler is not installed.
    """
    kind, _, whole = name.partition(":")
    layout, times, slices = whole.partition("*")
    sizes = [int(n) for n in re.findall(r"\d+", layout)]
    known = kind in TPUS or ((kind in GPUS or kind == "cpu") and not times)
    if not known or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*(\*[1-9]\d*)?", whole):
        raise ConfigError(f"--topology={name} is unknown; give one like {FORMS}")
    if kind in TPUS:
        return _tpu(name, kind, sizes, int(slices or 1))
    if len(sizes) > 1:
        raise ConfigError(f"--topology={name}: give the number of devices, like {kind}:8")
    return _cpu(name, sizes[0]) if kind == "cpu" else _gpu(name, kind, sizes[0])


def why_not(message: str) -> str:
    """A compiler's figures of a program that does not fit, in one line."""
    line = message.partition("RESOURCE_EXHAUSTED:")[2].strip().splitlines()[0]
    alone = re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", line)
    if alone:
        return f"temporaries alone need {alone[1]} of {alone[2]} GiB"
    whole = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", line)
    return f"needs {whole[1]} of {whole[2]} GiB" if whole else line[:200]


def _cpu(name: str, count: int) -> Topology:
    import jax

    # If the backend runs already, it has as many as it was told then.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"--topology={name}: jax runs already, with {len(devices)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before it starts"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    return Topology(name, "cpu", devices[:count], memory, None, {})


def _tpu(name: str, kind: str, sizes: list[int], slices: int) -> Topology:
    called, device_kind, dimensions, options = TPUS[kind]
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name} needs the TPU compiler: pip install 'jax[tpu]' (no TPU needed)"
        )
    if len(sizes) > dimensions:
        raise ConfigError(f"--topology={name}: {kind} has {dimensions} axes, like {FORMS}")
    # Nobody drives a chip here: other processes may have loaded libtpu too, and there is no
    # metadata server to ask.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies

    try:
        layout = f"{called}:{'x'.join(map(str, sizes))}"
        options = {"num_slices": slices, **options} if slices > 1 else options
        described = topologies.get_topology_desc(layout, platform="tpu", **options)
    except Exception as error:
        reason = first_line(error)
        raise ConfigError(f"--topology={name}: the TPU compiler refuses it: {reason}") from None
    chip = CHIPS[device_kind]
    devices = list(described.devices)
    return Topology(name, "tpu", devices, chip.memory, chip, {})


def _gpu(name: str, kind: str, count: int) -> Topology:
    if not any(importlib.util.find_spec(plugin) for plugin in CUDA_PLUGINS):
        raise ConfigError(
            f"--topology={name} needs the CUDA compiler: pip install 'jax[cuda13]' (no GPU needed)"
        )
    hosts, rest = divmod(count, GPUS_PER_HOST)
    if hosts and rest:
        raise ConfigError(f"--topology={name}: hosts have {GPUS_PER_HOST} GPUs; give a multiple")
    from jax.experimental import topologies

    layout = f"1x{hosts or 1}x{GPUS_PER_HOST if hosts else rest}"
    chip, asked = CHIPS[kind.upper()], dict(zip(_ASKED, GPUS[kind], strict=True))
    target = _TARGET.format(
        name=kind.upper(), bandwidth=int(chip.hbm), optin=int(asked["shared"]) - 1024, **asked
    )
    described = topologies.get_topology_desc(
        kind, platform="cuda", target_config=target, topology=layout
    )
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))  # jax's default
    # To choose among kernels the compiler would time them on the device: cuBLAS needs no choice.
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    return Topology(name, "gpu", list(described.devices), chip.memory * share, chip, options)
