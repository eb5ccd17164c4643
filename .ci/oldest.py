"""The oldest versions that pyproject.toml allows, as constraints for pip: NAME==VERSION, one a line.

python .ci/oldest.py [--but NAME ...] > oldest.txt
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
left_out = sys.argv[2:] if sys.argv[1:2] == ["--but"] else []
for wanted in [
    *project["dependencies"],
    *(one for extra in project["optional-dependencies"].values() for one in extra),
]:
    found = re.fullmatch(r"([\w-]+)>=([\d.]+)", wanted)
    if found and found[1] not in left_out:
        print("{}=={}".format(*found.groups()))
