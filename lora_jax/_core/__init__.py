"""What every other folder builds on."""
