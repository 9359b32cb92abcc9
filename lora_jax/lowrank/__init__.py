"""Arithmetic of low-rank updates: products with the factors, merges and DoRA's norms."""
