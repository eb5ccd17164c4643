"""Palettes: weights become indices into small tables of centroids, by k-means or by training."""
