"""`r2`, and `python -m r2cli`: an interrupt before the command line is there to tell of it is told here."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    try:
        from r2cli.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("r2: interrupted; no file is left half written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
