"""The command line: one command a file; `main.main` is `r2`."""
