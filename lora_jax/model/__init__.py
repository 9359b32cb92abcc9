"""Whole trees of parameters."""
