"""What pyproject.toml cannot say: the wheel carries the notebooks and parameter files, which `diffseg init` writes."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithNotebooks(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "diffseg" / "working_copy"
            shutil.rmtree(target, ignore_errors=True)
            (target / "results").mkdir(parents=True)
            ignored = shutil.ignore_patterns(".*", "__pycache__")
            shutil.copytree("notebooks", target / "notebooks", ignore=ignored)
            shutil.copy("results/published.csv", target / "results")


setup(cmdclass={"build_py": BuildWithNotebooks})
