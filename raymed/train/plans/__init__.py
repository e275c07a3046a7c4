"""What a training will take, told before it starts: memory, time, traffic, arithmetic."""
