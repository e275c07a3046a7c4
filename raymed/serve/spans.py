"""OpenTelemetry: spans of requests and their stages, where somebody has configured a tracer provider, such as
`opentelemetry-instrument python jobs/serve_models.py`. Elsewhere they cost a look.

No text of an exception, no path and no query stands in a span: any of them may name a patient.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    propagate: Any = None
    trace: Any = None

_NOTHING: AbstractContextManager[Any] = nullcontext()


def span(name: str, **attributes: Any) -> AbstractContextManager[Any]:
    """A stage of what is being answered."""
    tracer = _tracer()
    if tracer is None:
        return _NOTHING
    return tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    )


def server_span(scope: Mapping[str, Any]) -> AbstractContextManager[Callable[[str, int], None]]:
    """A request, below the span that its headers name. Gives done(route, status), to be told how it ended."""
    tracer = _tracer()
    return nullcontext(lambda *_: None) if tracer is None else _server_span(tracer, scope)


@contextmanager
def _server_span(tracer: Any, scope: Mapping[str, Any]) -> Iterator[Callable[[str, int], None]]:
    carried = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    with tracer.start_as_current_span(
        scope["method"],
        context=propagate.extract({name: carried[name] for name in ("traceparent", "tracestate") if name in carried}),
        kind=trace.SpanKind.SERVER,
        attributes={"http.request.method": scope["method"], "raymed.request_id": scope["request_id"]},
        record_exception=False,
        set_status_on_exception=False,
    ) as current:

        def done(route: str, status: int) -> None:
            current.update_name(f"{scope['method']} {route}".strip())
            current.set_attributes({"http.route": route, "http.response.status_code": status})
            if status >= 500:
                current.set_status(trace.StatusCode.ERROR)

        yield done


def _tracer() -> Any:
    """None where nobody has configured a provider."""
    if trace is None:
        return None
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return provider.get_tracer("raymed.serve")
