"""The one training loop, the engines that move its networks, and the places where it runs."""
