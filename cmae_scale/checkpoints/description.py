"""What a state.json holds, checked before any of it is used: people and disks change files."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

STATE_FORMAT = 2
Count = Annotated[int, Field(ge=0)]
ShareName = Annotated[str, Field(pattern=r"^rank_[0-9]{5,}\.safetensors$")]


class _Part(BaseModel):
    """A part of a state.json: what is read of it has these names and types."""

    model_config = ConfigDict(strict=True)


class _Metadata(_Part):
    kind: dict[str, Any]
    ranks: int
    zero_stage: int
    precision: str
    run: dict[str, Any]
    attention: dict[str, str] = {}


class _Counters(_Part):
    global_steps: Count
    global_samples: Count
    skipped_steps: Count
    lr: list[float]
    scheduler: dict[str, Any] | None
    scaler: dict[str, int | float | None]  # of bf16, which needs none, nothing is known
    grad_scaler: dict[str, Any] | None


class _File(_Part):
    bytes: Count
    sha256: str


class _Description(_Part):
    step: Count
    stamp: _Metadata
    counters: _Counters
    extra: dict[str, Any]
    files: Annotated[dict[ShareName, _File], Field(min_length=1)]


def check_description(description: Any, *, step: int) -> None:
    """Raise ValueError unless the content of a state.json has all that is read of it, and is of `step`.

    Of another format only that is asked of it which `CheckpointMetadata.compare` needs to say so.
    """
    try:
        if description["stamp"]["format"] == STATE_FORMAT:
            _Description.model_validate(description)
        if description["step"] != step:
            raise ValueError(f"it says step {description['step']}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (LookupError, TypeError) as error:
        raise ValueError(f"no step or no format: {error}") from None
