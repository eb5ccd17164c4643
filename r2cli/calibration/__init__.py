"""Calibration: the ranges of activations, from images that pass through the network."""
