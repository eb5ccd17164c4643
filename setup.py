"""All else is in pyproject.toml; this puts recipes/ into the package as r2cli/recipes, which that file cannot say."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["r2cli*"]), "r2cli.recipes", "r2cli.recipes.cpu"],
    package_dir={"r2cli.recipes": "recipes"},
)
