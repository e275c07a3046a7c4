"""The uses of a recipe beyond one training: sweeps over hyper-parameters, and comparisons of methods."""
