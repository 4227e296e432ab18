"""Packages outside the package's folder; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["selfemo_jax", "selfemo_jax.*"]),
        "selfemo_jax.configs",
        "selfemo_jax.tools",
        "selfemo_jax.tools.torch_side",
        "selfemo_jax.tools.tunix_side",
    ],
    package_dir={"selfemo_jax.configs": "configs", "selfemo_jax.tools": "tools"},
)
