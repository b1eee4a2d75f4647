"""Base class of experiment setups."""

from pydantic import BaseModel, ConfigDict


class Arguments(BaseModel):
    """Setup that rejects unknown arguments."""

    model_config = ConfigDict(extra="forbid")
