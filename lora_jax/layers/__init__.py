"""One weight."""
