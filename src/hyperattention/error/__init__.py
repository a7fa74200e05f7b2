"""The error of an output relative to exact attention: exact rows, intervals, reports."""
