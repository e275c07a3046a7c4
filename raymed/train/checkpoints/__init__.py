"""Checkpoints that outlive their world size, engine and ZeRO stage, on the disk and in a bucket."""
