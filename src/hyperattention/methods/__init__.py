"""Attention methods: the base class, lists of stages, exact attention, and the default method."""
