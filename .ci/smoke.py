"""Every shipped recipe, small: each kind of its steps once, on two training steps.

    python .ci/smoke.py FOLDER PART PARTS

Recipes that this part of several has run in one process, so that torch is imported, and each network's graph is read,
once for all of them. The log of a recipe is shown where it fails.
"""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from time import perf_counter

from r2cli.cli.main import invoke

folder, part, parts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
recipes = [recipe["name"] for recipe in invoke(["recipe", "ls", "--json"])["recipes"]]
failed = []
for name in recipes[part::parts]:
    log, started = io.StringIO(), perf_counter()
    try:
        with redirect_stdout(log), redirect_stderr(log):
            invoke(["run", name, "--smoke", "--json", "--work-dir", str(folder / name)])
        print(f"smoke: {name} in {perf_counter() - started:.0f} s", flush=True)
    except Exception as error:  # any of them is told, and the others go on
        failed.append(name)
        print(f"smoke: {name} failed: {error}\n{log.getvalue()}", file=sys.stderr, flush=True)
sys.exit(1 if failed else 0)
