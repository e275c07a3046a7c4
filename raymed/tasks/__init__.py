"""What is learned: one file a system, readable from top to bottom alone."""
