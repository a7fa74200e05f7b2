"""Stages that choose keys with certainty, with log-weight 0."""
