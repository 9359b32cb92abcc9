"""Reading and writing files of arrays."""
