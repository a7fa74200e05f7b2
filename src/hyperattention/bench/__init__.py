"""Measurements: time, memory and error side by side, as the command line and the committed figures take them."""
