"""Arithmetic of adapters: combine, resize, scale, extract."""
