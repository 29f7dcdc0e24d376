"""The direction between the package's rooms, as the contracts in pyproject.toml tell it."""

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import diffseg

PROJECT = Path(diffseg.__file__).parents[1] / "pyproject.toml"


def test_no_module_imports_against_the_direction():
    assert lint_imports(config_filename=str(PROJECT), no_cache=True) == EXIT_STATUS_SUCCESS
