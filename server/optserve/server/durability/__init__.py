"""What outlives the process: checkpoints; the journal's implementations."""
