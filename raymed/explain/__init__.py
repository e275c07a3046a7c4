"""Explanations of one prediction, and how far they agree with what is known."""

from raymed.explain.gradcam import grad_cam, laterality_hit_rate

__all__ = ["grad_cam", "laterality_hit_rate"]
