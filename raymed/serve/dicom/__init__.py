"""DICOM in, DICOM out: what a model says of a study as objects of that study, and the node that a PACS talks to."""

import logging

logging.getLogger("highdicom").setLevel(logging.CRITICAL + 1)  # it names objects, and patients whose names look odd
