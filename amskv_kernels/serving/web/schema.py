"""What goes in and out of the endpoint: OpenAI's images API, and what next-scale models have besides."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from amskv_kernels.serving.requests import MOST_SEED

MOST_IMAGES = 10  # of one request, as in OpenAI's API
LONGEST_PROMPT = 1000  # characters; a class's name
LONGEST_TAG = 256
MOST_SCALES = 64  # of any schedule; the model's own number is checked besides


class ImageRequest(BaseModel):
    """One or more images of a class."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT, description="a class's number or name")]
    model: Annotated[str | None, Field(max_length=LONGEST_TAG)] = None
    n: Annotated[int | None, Field(ge=1, le=MOST_IMAGES)] = None
    size: Annotated[str | None, Field(max_length=LONGEST_TAG, description="the model's own, or auto")] = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto"] | None = None
    user: Annotated[str | None, Field(max_length=LONGEST_TAG, description="kept nowhere")] = None
    stream: Annotated[bool | None, Field(description="server-sent events")] = None
    partial_images: Annotated[
        int | None, Field(ge=0, lt=MOST_SCALES, description="previews of each image of a stream, at most scales − 1")
    ] = None  # fmt: skip
    seed: Annotated[
        int | None, Field(ge=0, le=MOST_SEED, description="of the first image; those after it count up")
    ] = None  # fmt: skip
    guidance: Annotated[
        float | None, Field(ge=-100, le=100, allow_inf_nan=False, description="0 takes half the pages")
    ] = None  # fmt: skip
    top_k: Annotated[int | None, Field(ge=0, description="0 for no limit")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False, description="0 for no limit")] = None


class Image(BaseModel):
    """A PNG and the seed that draws it again."""

    b64_json: str
    seed: int


class InputTokens(BaseModel):
    """A class is one token."""

    image_tokens: int = 0
    text_tokens: int = 1


class Usage(BaseModel):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, images: int, tokens: int) -> Usage:
        """Of images of so many tokens each."""
        return cls(
            input_tokens=images, input_tokens_details=InputTokens(text_tokens=images), output_tokens=images * tokens,
            total_tokens=images * (tokens + 1),
        )  # fmt: skip


class Images(BaseModel):
    """What a request without a stream gets."""

    created: int
    data: list[Image]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    size: str
    usage: Usage


class Picture(BaseModel):
    """What every event of a stream has."""

    b64_json: str
    created_at: int
    size: str
    seed: int
    index: int  # of the image in its request
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"


class PartialImage(Picture):
    """The image so far."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int
    step: int  # scales done


class CompletedImage(Picture):
    """The image."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every refusal."""

    error: ErrorDetail


class Model(BaseModel):
    """The model served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "amskv_kernels"


class Models(BaseModel):
    """All there are."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """That requests are taken."""

    status: Literal["ok"] = "ok"
