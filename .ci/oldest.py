"""The oldest versions that pyproject.toml allows, as constraints for pip: NAME==VERSION, one a line.

python .ci/oldest.py > oldest.txt
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for wanted in [
    *project["dependencies"],
    *(one for extra in project["optional-dependencies"].values() for one in extra),
]:
    found = re.fullmatch(r"([\w-]+)>=([\d.]+)", wanted)
    if found:
        print("{}=={}".format(*found.groups()))
