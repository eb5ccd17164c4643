"""`python -m r2cli` is `r2`."""

from r2cli.cli.main import main

main()
