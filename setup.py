"""Takes ds_configs/, launch/ and the pinned requirements into the wheel, where `bst_base.shipped` finds them; all else
is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("ds_configs", "launch")


class BuildWithShippedFiles(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return  # the program runs from the checkout, which has them
        for folder in SHIPPED:
            target = Path(self.build_lib) / "bst_base" / "shipped" / folder
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target)
        shutil.copy("requirements.txt", Path(self.build_lib) / "bst_base" / "shipped")


setup(cmdclass={"build_py": BuildWithShippedFiles})
