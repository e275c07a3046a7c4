"""What moves a network: plain torch or DeepSpeed, behind the same verbs."""
