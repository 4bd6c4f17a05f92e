"""Build entry point. Everything is declared in pyproject.toml; compiled kernels are added here when csrc/ has them."""

from setuptools import setup

setup()
