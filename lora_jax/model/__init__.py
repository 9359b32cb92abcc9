"""Adapters of whole models: init, merge, unmerge, count, decompose and quantize."""
