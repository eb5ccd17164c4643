"""`r2`, and `python -m r2cli`."""

import sys
from typing import NoReturn

from r2cli.cli import interrupt


def main() -> NoReturn:
    interrupt.ends_at_once()
    try:
        from r2cli.cli.main import main as run

        run()
    except KeyboardInterrupt:  # where a signal cannot be handled
        print(f"r2: {interrupt.TOLD}", file=sys.stderr)
        sys.exit(interrupt.CODE)


if __name__ == "__main__":
    main()
