"""The graph of a network: how it is read, its structure, and changes that keep its function."""
