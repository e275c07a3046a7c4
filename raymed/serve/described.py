"""What the JSON of requests and answers is made of."""

from pydantic import BaseModel, ConfigDict


class Described(BaseModel):
    """A part of a request or an answer. The text below a field stands in /openapi.json."""

    model_config = ConfigDict(use_attribute_docstrings=True)
