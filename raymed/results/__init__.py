"""What trained models can do: figures, page, and the model that leaves."""
