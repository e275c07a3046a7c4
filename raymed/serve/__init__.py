"""Every trained model behind one HTTP endpoint."""
