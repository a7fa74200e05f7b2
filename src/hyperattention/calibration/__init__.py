"""Calibration: a method for each layer and head, chosen by measured error and measured time, and kept as a plan."""
