"""Recipes: many commands in one file, run in order or side by side, and the tables of their results."""
