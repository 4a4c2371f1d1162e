"""Everything is declared in pyproject.toml; this file is for what only code can say about a build."""

from setuptools import setup

setup()
