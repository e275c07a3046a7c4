"""A job's run: its frame, its record, its budget, its repetition, its results."""
