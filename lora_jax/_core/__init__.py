"""Building blocks that every other folder uses."""
