"""Tracking URIs may hold a password; what people and files are told does not."""

import re


def without_credentials(text: str) -> str:
    """A URI, or a text (also JSON) with URIs in it, without what stands between `://` and `@`."""
    return re.sub(r'(?<=:)//[^/\s"]*@', "//", text)
