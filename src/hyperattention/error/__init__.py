"""How far an output is from exact attention: exact rows, intervals, reports."""
