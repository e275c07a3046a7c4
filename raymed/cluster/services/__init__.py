"""The programs that a cluster on one machine is made of, a module each: how one is started, and how it is asked.

Each `ask` says in a few words how a part is, and raises Silent, with the reason, where it does not answer as it should.
What it asks lies on this machine, so no proxy is in between.
"""

from typing import Any

SECONDS = 10.0
"""Within which a part that is well answers, also on a machine with much to do."""


class Silent(Exception):
    """A part does not answer, or refuses."""


def get(url: str, **how: Any) -> Any:
    """The JSON (or, where it is none, the text) at a URL. Raises Silent for anything but success."""
    import httpx

    try:
        answer = httpx.get(url, timeout=SECONDS, trust_env=False, **how)
    except httpx.HTTPError as error:
        raise Silent(f"no answer at {url} ({type(error).__name__})") from None
    if not answer.is_success:
        raise Silent(f"{url} answers {answer.status_code}: {answer.text[:200]}")
    return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text
