"""Selections: which keys each tile reads. Stages decide; they never compute attention."""
