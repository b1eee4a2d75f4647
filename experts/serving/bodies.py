"""What requests say, and OpenAPI's description of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from experts.serving.control import CAPS, NEVER
from experts.serving.payload import IMAGES, JSON, LARGEST, NPY, as_integer
from experts.serving.served import Texts
from experts.serving.server import Server

EVENTS = "text/event-stream"
WHOLE = BeforeValidator(as_integer)


class Asked(BaseModel):
    """What a request says beside its `inputs`; `request_class` is one of the server's classes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    deadline_ms: Annotated[float, Field(gt=0, le=1e3 * NEVER)] | None = None
    request_class: str | None = None


class ToWrite(BaseModel):
    """How a text is written; `k` is the number of experts of a token."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    tokens: Annotated[int, Field(ge=1), WHOLE] = 100
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    seed: Annotated[int, Field(ge=0, lt=2**53), WHOLE] | None = None
    k: Annotated[int, Field(ge=1), WHOLE] | None = None
    stream: bool = False


class Completion(BaseModel):
    """The same in OpenAI's form, as far as this server knows it; other fields are ignored."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    prompt: str
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**53), WHOLE] | None = None
    n: Annotated[Literal[1], WHOLE] | None = None
    stream: bool | None = None

    def to_write(self) -> ToWrite:
        """With OpenAI's defaults."""
        return ToWrite(
            prompt=self.prompt, tokens=self.max_tokens or 16, seed=self.seed, stream=bool(self.stream),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
        )  # fmt: skip


_SENTENCE = {JSON: {"schema": {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}}}
_ERRORS = {
    400: "no JSON", 401: "no API key", 403: "not from here", 404: "another kind of model", 408: "the body was too slow",
    409: "the old model goes on", 413: "too large", 415: "another media type", 422: "not what the model takes",
    429: "too many requests; Retry-After says when to come again", 503: "not ready", 504: "the deadline passed",
}  # fmt: skip
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "content": _SENTENCE} for code, text in _ERRORS.items()
}


def body_of(contents: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's description of a body, by media type."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": each} for kind, each in contents.items()}}}


def inputs_schema(server: Server) -> dict[str, Any]:
    """The schema of `/predict`'s bodies."""
    served, size = server.served, server.served.shape[0]
    text = isinstance(served, Texts)
    number = {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}
    row: dict[str, Any] = {"type": "array", "items": number, "minItems": size, "maxItems": size}
    if isinstance(served, Texts):
        token = {"type": "integer", "minimum": 0, "maximum": served.model.settings.vocabulary - 1}
        row = {"anyOf": [{"type": "string"}, row | {"items": token, "minItems": 1}]}
    rows = {"type": "array", "minItems": 1, "maxItems": CAPS[-1], "items": row}
    own = Asked.model_json_schema()
    own["properties"]["request_class"] = {"enum": [*(each.name for each in server.limits.classes), None]}
    schema = own | {"title": "Inputs", "properties": {"inputs": rows} | own["properties"], "required": ["inputs"]}
    raw = {"type": "string", "format": "binary"}
    return {JSON: schema} | ({} if text else dict.fromkeys((*IMAGES, NPY[0]), raw))


def text_schema(server: Server, form: type[BaseModel]) -> dict[str, Any]:
    """The schema of bodies that ask for a text, with what the model sets."""
    schema = form.model_json_schema()
    if isinstance(server.served, Texts):
        settings = server.served.model.settings
        for name, most in (("tokens", settings.context - 1), ("max_tokens", settings.context - 1), ("k", settings.k)):
            field = schema["properties"].get(name, {})
            for each in field.get("anyOf", [field]):
                if each.get("type") == "integer":
                    each["maximum"] = most
    return {JSON: schema}
