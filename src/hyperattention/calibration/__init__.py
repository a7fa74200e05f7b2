"""Calibration: choose a method for each layer and head by measured error and time, and save the choice as a plan."""
