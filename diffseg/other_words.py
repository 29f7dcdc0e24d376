"""Attention to words that the prompt does not contain: where in the image would the generator see them?

While an ordinary call draws an image, its latents are evaluated once more in each recorded step, with the conditioning
of another prompt, and the attention to that prompt's words is recorded:

    tokens = [key_positions(pipeline, "a photo of a horse", [(13, 18)])]
    with OtherWords(pipeline, ["a photo of a horse"], tokens, height, width, sampling_steps) as others:
        images = draw(pipeline, [prompt], [seed], None, height, width, sampling_steps)
    maps = others.maps()

The result of the second evaluation is not used, so the image is bit-identical. With the image's own prompt as the other
prompt the maps are those of `AttentionRecorder`, within rounding. The runtime is one evaluation without guidance for
each recorded step and other prompt. Our choice: to read the other prompt's keys with the queries of the ordinary
evaluation is cheaper, but needs code for each family.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffseg.attention import AttentionRecorder
from diffseg.errors import DiffsegError
from diffseg.families import denoiser_of
from diffseg.generator import draw

# arguments of a denoiser that belong to the image and its step; all others follow from the prompt and the image size
IMAGE_ARGUMENTS = ("sample", "hidden_states", "x", "timestep", "t", "timestep_cond", "guidance")


class OtherWords(AttentionRecorder):
    """Record the attention to words of other prompts, one for each image of the call that runs inside the `with`.

    prompts: the other prompts. tokens: the keys of their words, as `AttentionRecorder` takes them. height and width (in
    pixels) and sampling_steps: those of the call. recording: the further arguments of `AttentionRecorder`. Several of
    these, for several prompts an image, and an `AttentionRecorder` may be active in one call.

    Raises a DiffsegError where `AttentionRecorder` does, and when prompts and tokens differ in number.
    """

    def __init__(
        self,
        pipeline,
        prompts: Sequence[str],
        tokens: Sequence[Sequence[Sequence[int]]],
        height: int,
        width: int,
        sampling_steps: int,
        **recording,
    ):
        super().__init__(pipeline, tokens, **recording)
        if len(prompts) != len(tokens):
            raise DiffsegError(
                f"there are {len(prompts)} other prompts and words of {len(tokens)} images; give one prompt for each"
            )
        self.conditioning = conditioning(pipeline, prompts, height, width, sampling_steps)
        self.is_wanted = False  # the evaluation that runs shall be repeated

    def __enter__(self) -> "OtherWords":
        super().__enter__()
        self.hooks.append(denoiser_of(self.pipeline).register_forward_hook(self.evaluate_again, with_kwargs=True))
        return self

    def before_evaluation(self, denoiser, args: tuple, kwargs: dict) -> None:
        super().before_evaluation(denoiser, args, kwargs)
        self.is_wanted, self.recording = self.recording, False

    def evaluate_again(self, denoiser, args: tuple, kwargs: dict, output) -> None:
        if not self.is_wanted:
            return
        given = arguments_of(denoiser, args, kwargs)
        mine = {name: self.ours(given[name]) for name in IMAGE_ARGUMENTS if name in given}
        self.recording = True
        denoiser.forward(**self.conditioning | mine)  # past the denoiser's hooks: for other recorders nothing happens
        self.recording = False

    def ours(self, value: Any) -> Any:
        """Return the prompts' part of a batch, which with guidance holds the negative prompts too."""
        if value is None or isinstance(value, torch.Tensor) and value.ndim == 0:
            return value
        return value[: len(self.words)] if self.family.prompts_first else value[-len(self.words) :]


class Stopped(Exception):
    """Ends a call of the pipeline before its first evaluation."""


def conditioning(pipeline, prompts: Sequence[str], height: int, width: int, sampling_steps: int) -> dict[str, Any]:
    """Return the arguments, by name, of the denoiser's first evaluation without guidance, which is not made.

    The pipeline itself encodes the prompts, so this needs no facts of the family.
    """
    found = {}

    def stop(denoiser, args: tuple, kwargs: dict) -> None:
        found.update(arguments_of(denoiser, args, kwargs))
        raise Stopped

    # before the hooks of recorders that are active
    hook = denoiser_of(pipeline).register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        draw(pipeline, prompts, range(len(prompts)), None, height, width, sampling_steps, guidance_scale=1.0)
    except Stopped:
        pass
    finally:
        hook.remove()
    return found


def arguments_of(denoiser: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
