"""What each command may be asked: frozen configs, one field an option. No torch and no Typer is imported here."""
