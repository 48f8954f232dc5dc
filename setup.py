"""All but the packages stands in setup.cfg: configs/ is installed with them, as gcl_jax/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["gcl_jax*"]), "gcl_jax.configs", "gcl_jax.configs.marqo_gs"],
    package_dir={"gcl_jax.configs": "configs"},
)
