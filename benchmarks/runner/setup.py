"""What the setups of all experiments share."""

from pydantic import BaseModel, ConfigDict


class Arguments(BaseModel):
    """A setup: unknown arguments are refused."""

    model_config = ConfigDict(extra="forbid")
