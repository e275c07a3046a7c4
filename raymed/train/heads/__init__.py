"""Linear heads on the features of a frozen encoder: many of them trained as one program."""
