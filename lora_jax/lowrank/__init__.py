"""Arithmetic of low-rank updates."""
