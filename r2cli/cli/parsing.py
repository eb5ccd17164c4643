"""What commands need of the parser."""

from typing import Any

import typer

# What the parser raises for a wrong command line, whichever module of typer's defines it.
UsageError: Any = typer.BadParameter.__mro__[1]
