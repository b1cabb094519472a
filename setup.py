"""The package's build. What it is called, needs and installs stands in pyproject.toml; compiled parts belong here."""

from setuptools import setup

setup()
