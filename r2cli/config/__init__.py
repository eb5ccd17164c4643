"""The options of the commands: frozen configs with one field per option. Neither torch nor Typer is imported here."""
