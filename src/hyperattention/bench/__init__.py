"""Measurements of time, memory and error, for the command line and for the committed figures."""
