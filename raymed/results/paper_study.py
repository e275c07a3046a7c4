"""study.toml: what only the authors of a paper know, in their own words."""

import tomllib
from dataclasses import fields
from pathlib import Path

from raymed.config import UserError, check_choice
from raymed.report.paper import Study
from raymed.storage import write_atomic

_HEAD = """\
# What only people know, for the methods section. Leave a field empty and it stays a blank, marked TO FILL, of which
# methods.md says what belongs there. Then run the same command again.

"""


def read_study(path: Path) -> Study:
    """The words in the file; it is made, with empty fields, where there is none.

    Raises UserError for a file that is no TOML, a field that is not known or that is no text.
    """
    names = [field.name for field in fields(Study)]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _HEAD + "".join(f'{name} = ""\n' for name in names))
    try:
        stated = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {error}. Every line is NAME = "TEXT"') from error
    for name, text in stated.items():
        check_choice(f"{path}: field", name, names)
        if not isinstance(text, str):
            raise UserError(f"{path}: {name} must be text in quotes, got {text!r}")
    return Study(**{name: text.strip() or None for name, text in stated.items()})
