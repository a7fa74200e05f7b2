"""Stages that locate keys: picks that are certain, with log-weight 0."""
