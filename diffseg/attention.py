"""Cross-attention of a generator while it draws: where in the image is each word of the prompt?

A layer of cross-attention answers, for every position of the image, how much of each prompt token it reads:

    A = softmax(Q K^T / sqrt(d))        Q from the image (h w x d), K from the prompt (tokens x d)

The column of a word's token, reshaped to h x w, is a map of that word. In the joint attention of newer generators
K holds the image's positions too. `AttentionRecorder` averages these maps over heads, layers and denoising steps
while an unchanged pipeline call runs:

    with AttentionRecorder(pipeline, tokens, resolutions=(16,)) as recorder:
        images = pipeline(prompts, ...).images
    maps = recorder.maps()              # one float32 tensor, words x h x w, for each prompt

Nothing in the generator is exchanged. Hooks say which attention layer runs. While it runs, `Look` sees the query and
the key that the layer hands to PyTorch's attention function, after all that a family does to them (norms, rotary
positions, LoRA, masks). The probabilities are computed a second time beside it, only where they are asked for, so the
image is the same, bit for bit, with and without the recorder. The same pass also gives the self-attention (what each
position of the image reads of the others), for the refiner of that name.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from diffusers import SCMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffseg.errors import DiffsegError
from diffseg.families import denoiser_of, family_of, image_grid, key_ranges, layer_names
from diffseg.word_maps import WordMaps, average

SOFTMAXES = ("joint", "text")
# probabilities that are computed at once: on a CPU 4 MB in float32, which its caches hold; on a GPU 64 MB, as it waits
# for the start of each kernel
AT_ONCE, AT_ONCE_ON_GPU = 2**20, 2**24


class AttentionRecorder:
    """Record the attention of chosen words in one text-to-image call of a pipeline that `diffseg.families` knows.

    pipeline: the pipeline; it is as before on leaving, also after an exception.
    tokens: for each image of the call, for each of its words, the keys of the word's tokens (`diffseg.tokens`); a
        word's map is the mean over its tokens in each text encoder, then over the encoders.
    resolutions: map sizes to record, each the shorter side in positions; 16 is 16 x 16, or 16 x 32 at 1:2.
        None for all that the generator has.
    steps: denoising steps to record (`parse_steps`), from 0; None for all.
    self_resolution: a map size whose self-attention is recorded too; None for none.
    separately: keep the words' maps of each step apart (`word_maps`), in place of one sum over the steps.
    softmax: in joint attention, over all keys ("joint") or over the text's alone ("text"). Cross-attention has only
        the text's.

    Unless they are kept separately, memory does not grow with the number of steps: for each layer a running sum in
    float32 of the words' maps (words x h x w an image), and for all layers together one of the self-attention
    ((h w)^2 an image: 0.3 MB at 16 x 16, 4 MB at 32 x 32, 67 MB at 64 x 64). An image's maps do not depend on its
    batch: within 1e-4 of their largest value in float32, and within the rounding of the images themselves in half
    precision.
    """

    def __init__(
        self,
        pipeline,
        tokens: Sequence[Sequence[Sequence[int]]],
        resolutions: Sequence[int] | None = (16,),
        steps: Sequence[int] | None = None,
        self_resolution: int | None = None,
        separately: bool = False,
        softmax: str = "joint",
    ):
        if softmax not in SOFTMAXES:
            raise DiffsegError(f'attention_softmax is {softmax!r}; write "joint" or "text"')
        self.pipeline, self.steps, self.separately, self.softmax = pipeline, steps, separately, softmax
        self.family = family_of(pipeline)
        self.resolutions = None if resolutions is None else sorted(set(resolutions))
        self.self_resolution = self_resolution
        self.words = [len(words) for words in tokens]
        if self.resolutions == [] or not self.words or 0 in self.words:
            raise DiffsegError("there is nothing to record; give a resolution, and a word for each image")
        # image x key x word: multiplying by it averages the tokens of each word
        encoders = key_ranges(pipeline).values()
        self.weights = torch.zeros(len(tokens), max(keys.stop for keys in encoders), max(self.words))
        for b, words in enumerate(tokens):
            for w, positions in enumerate(words):
                parts = [part for keys in encoders if (part := [k for k in positions if k in keys])]
                for part in parts:
                    self.weights[b, part, w] = 1 / len(part) / len(parts)
        # by ("cross" or "self", resolution, layer or "", step or -1 for all together)
        self.sums: dict[tuple[str, int, str, int], torch.Tensor] = {}
        self.counts: Counter[tuple[str, int, str, int]] = Counter()
        self.scheduler_steps = 0  # calls of scheduler.step
        self.is_fresh = True  # the denoiser was not evaluated since the last of them
        self.evaluated: set[int] = set()  # steps
        self.met: dict[str, set[int]] = {"cross": set(), "self": set()}  # resolutions that the generator has
        self.recording = False
        self.grid: tuple[int, int] | None = None  # of the denoiser's input
        self.look, self.layer = Look(self), None

    # ------------------------------------------------------------------------------- following the call

    def __enter__(self) -> "AttentionRecorder":
        denoiser = denoiser_of(self.pipeline)
        self.hooks = [
            denoiser.register_forward_pre_hook(self.before_evaluation, with_kwargs=True),
            # before all that evaluates the denoiser once more (`diffseg.other_words`)
            denoiser.register_forward_hook(self.after_evaluation, prepend=True),
        ]
        words = dict.fromkeys(layer_names(self.pipeline), ("cross", "self") if self.family.joint else ("cross",))
        for name, module in denoiser.named_modules():
            if kinds := words.get(name, ("self",) if self.self_resolution and name.endswith("attn1") else ()):
                begin, end = functools.partial(self.begin_layer, name, kinds), functools.partial(self.end_layer, name)
                self.hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                # the recorder that came last leaves first, as its mode lies above the others'
                self.hooks.append(module.register_forward_hook(end, with_kwargs=True, prepend=True))
        self.scheduler = self.pipeline.scheduler
        self.replaced = vars(self.scheduler).get("step")  # another recorder's, around this one
        self.scheduler.step = self.counted(self.scheduler.step)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.replaced is None:
            del self.scheduler.step  # the class's own is there again
        else:
            self.scheduler.step = self.replaced
        self.stop_looking()  # after an exception inside a layer

    def counted(self, step: Callable) -> Callable:
        @functools.wraps(step)  # pipelines read its signature
        def counting(model_output, *args, **kwargs):
            if len(model_output) != len(self.words):
                self.sums.clear()
                raise DiffsegError(
                    f"the recorder has the words of {len(self.words)} images and the call draws "
                    f"{len(model_output)}; give it the words of every image of the call"
                )
            self.scheduler_steps, self.is_fresh = self.scheduler_steps + 1, True
            return step(model_output, *args, **kwargs)

        return counting

    def before_evaluation(self, denoiser, args: tuple, kwargs: dict) -> None:
        """Note the step and the image's grid.

        Some schedulers evaluate the denoiser more often than once a step: Heun twice in every step but the last,
        PNDM twice in the first. Their `timesteps` list every evaluation, so this division finds its step. Guidance may
        evaluate it more often than the scheduler steps (Flux with a negative prompt, SD 3 with skipped layers); the
        first of such evaluations is the prompt's.
        """
        scheduler = self.scheduler
        # SCM's list ends with the noise-free end itself
        evaluations = len(scheduler.timesteps) - isinstance(scheduler, SCMScheduler)
        if self.scheduler_steps >= evaluations:
            raise DiffsegError("a recorder serves one call of the pipeline; make another for the next call")
        self.step = self.scheduler_steps * scheduler.num_inference_steps // evaluations
        self.evaluated.add(self.step)
        self.recording = self.is_fresh and (self.steps is None or self.step in self.steps)
        self.is_fresh = False
        if self.grid is None:
            self.grid = image_grid(denoiser, args, kwargs)

    def after_evaluation(self, denoiser, args: tuple, output) -> None:
        self.recording = False

    def begin_layer(self, name: str, kinds: Sequence[str], attn, args: tuple, kwargs: dict) -> None:
        """Look at what follows, if it is asked for."""
        if not self.recording:
            return
        states = args[0] if args else kwargs["hidden_states"]
        size = self.grid if self.family.joint else self.map_size(states.shape[1])
        wanted = {"cross": self.resolutions, "self": [self.self_resolution] if self.self_resolution else []}
        for kind in kinds:
            self.met[kind].add(min(size))
        kinds = [kind for kind in kinds if wanted[kind] is None or min(size) in wanted[kind]]
        if kinds:
            self.layer, self.has_shown = (name, size, kinds), False
            self.look.__enter__()

    def end_layer(self, name: str, attn, args: tuple, kwargs: dict, output) -> None:
        if self.layer is None:
            return
        if not self.has_shown and type(attn.processor) in (SlicedAttnProcessor, AttnProcessor):
            AttnProcessor2_0()(attn, *args, **kwargs)  # they multiply by themselves; let the usual one show the same
        if not self.has_shown:
            raise DiffsegError(
                f"the layer {name} shows no attention map to the recorder ({type(attn.processor).__name__}); "
                "use PyTorch's own attention, without xformers or another attention backend"
            )
        self.stop_looking()

    def stop_looking(self) -> None:
        if self.layer is not None:
            self.layer = None
            self.look.__exit__(None, None, None)

    def map_size(self, positions: int) -> tuple[int, int]:
        """Return (h, w) of a layer with that many positions: in a UNet the latents' size, halved again and again."""
        height, width = self.grid
        while height * width > positions:
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    # ------------------------------------------------------------------------------------ what is recorded

    @torch.no_grad()
    def record(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest) -> None:
        """Add one layer's probabilities to the running sums; the arguments are those of PyTorch's attention.

        query and key: batch x heads x sequence x channels. attn_mask: what is added to Q K^T, or False where nothing
        may be read; it broadcasts to batch x heads x queries x keys.
        """
        if self.has_shown:  # a second one is an IP-Adapter's, and reads an image
            return
        self.has_shown = True
        layer, size, kinds = self.layer
        pictures, positions = len(self.words), size[0] * size[1]
        if len(query) < pictures:
            return  # the scheduler's step will say what is wrong
        # with guidance there are two batches in one; without it the part that is ours is the whole
        ours = slice(pictures) if self.family.prompts_first else slice(-pictures, None)
        query, key = query[ours], key[ours]
        # where the image and the text stand in a joint sequence, and how many keys lie before and behind the text
        image, text, around = slice(None), slice(None), (0, 0)
        if self.family.joint == "image":
            filled = positions + -positions % self.family.filled
            image, text, around = slice(positions), slice(filled, None), (filled, 0)
        elif self.family.joint == "text":
            image, text, around = slice(-positions, None), slice(-positions), (0, positions)
        for kind in kinds:
            keys = image if kind == "self" else text if self.softmax == "text" else slice(None)
            mask = None
            if attn_mask is not None:
                mask = attn_mask.expand(-1, query.shape[1], -1, -1)[ours, :, :, keys]
                mask = mask[:, :, image] if mask.shape[2] > 1 else mask
            if kind == "self":
                found = attend(query[:, :, image], key[:, :, keys], mask, scale)
                found, place = found.unflatten(-1, size).unflatten(1, size), ("", -1)
            else:
                weights = self.weights_of(key[0, 0, text].shape[0], key.device)
                if self.softmax == "joint":  # what is read of the image itself counts for no word
                    weights = F.pad(weights, (0, 0, *around))
                found = attend(query[:, :, image], key[:, :, keys], mask, scale, weights)
                found, place = found.transpose(1, 2).unflatten(-1, size), (layer, self.step if self.separately else -1)
            place = (kind, min(size), *place)
            self.sums[place] = self.sums[place] + found if place in self.sums else found
            self.counts[place] += 1

    def weights_of(self, count: int, device: torch.device) -> torch.Tensor:
        """Return the words' weights of a text with that many keys, image x key x word."""
        self.weights = self.weights.to(device)
        if count < self.weights.shape[1] and self.weights[:, count:].any():
            raise DiffsegError(f"a word is cut off: the call reads {count} tokens of a prompt; shorten the prompt")
        return F.pad(self.weights[:, :count], (0, 0, 0, max(0, count - self.weights.shape[1])))

    def maps(self, resolutions: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Return one float32 tensor (words x h x w, probabilities 0..1) for each image, on the CPU.

        resolutions: which of the recorded ones to average; None for all. h x w is the largest of them; each has
        the same weight, however many layers it has. Raises a DiffsegError when a step or a resolution that was
        asked for did not occur.
        """
        recorded = self.resolutions or sorted(self.met["cross"])
        mean = average([self.mean("cross", resolution) for resolution in sorted(set(resolutions or recorded))]).cpu()
        return [mean[b, :words] for b, words in enumerate(self.words)]

    def word_maps(self) -> list[WordMaps]:
        """Return what is kept of each image: its words' maps of every layer and, where recorded so, of every step."""
        steps = [[step] for step in sorted(self.evaluated & set(self.steps or self.evaluated))]
        if not self.separately:
            steps = [[step for [step] in steps]]
        for resolution in self.resolutions or ():
            self.mean("cross", resolution)  # raises for what did not occur
        attentions = self.self_attention() if self.self_resolution else [None] * len(self.words)
        layers: dict[str, list[torch.Tensor]] = {}
        for place in sorted(self.sums, key=lambda place: (place[2], place[3])):
            if place[0] == "cross":
                layers.setdefault(place[2], []).append((self.sums[place] / self.counts[place]).cpu())
        stacked = {layer: torch.stack(maps) for layer, maps in layers.items()}  # step x image x word x h x w
        return [
            WordMaps({layer: maps[:, b, :words] for layer, maps in stacked.items()}, steps, attentions[b])
            for b, words in enumerate(self.words)
        ]

    def self_attention(self) -> list[torch.Tensor]:
        """Return one float32 tensor h x w x h x w for each image, on the CPU: what [y, x] reads of [v, u].

        The mean over heads, layers and recorded steps at `self_resolution`; what a position reads sums to 1.
        Raises a DiffsegError when a step or the resolution did not occur, or none was asked for.
        """
        if not self.self_resolution:
            raise DiffsegError("no self-attention was asked for; give the recorder a self_resolution")
        return list(self.mean("self", self.self_resolution).cpu())

    def mean(self, kind: str, resolution: int) -> torch.Tensor:
        if not self.evaluated:
            raise DiffsegError("no attention was recorded: call the recorder's pipeline inside its `with`")
        absent = sorted(set(self.steps or ()) - self.evaluated)
        if absent:
            raise DiffsegError(
                f"step {absent[0]} (from 0) was asked for and the pipeline made {len(self.evaluated)} steps; "
                "choose attention_steps among them"
            )
        places = [place for place in self.sums if place[:2] == (kind, resolution)]
        if not places:
            raise DiffsegError(
                f"no {kind}-attention was recorded at resolution {resolution}: at this image size the "
                f"generator has it at {sorted(self.met[kind])}; choose attention_resolutions among them"
            )
        return sum(self.sums[place] for place in places) / sum(self.counts[place] for place in places)


class Look(TorchFunctionMode):
    """While it is active, a recorder sees what is handed to PyTorch's attention function."""

    def __init__(self, recorder: AttentionRecorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.recorder.record(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(Q K^T scale + mask), the mean over heads, float32 batch x query x key.

    weights: batch x key x word; the result is multiplied by it, to batch x query x word. A few heads and queries at a
    time: all 24 heads of a large transformer at once would take gigabytes.
    """
    heads, queries = query.shape[1:3]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    at_once = AT_ONCE if query.device.type == "cpu" else AT_ONCE_ON_GPU
    rows = max(1, at_once // (len(query) * key.shape[2]))  # queries, of all heads together
    some = max(1, rows // queries)  # heads
    words = key.shape[2] if weights is None else weights.shape[2]
    total = torch.zeros(len(query), queries, words, dtype=torch.float32, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for head in range(0, heads, some):
            part = slice(head, head + some)
            keys = key[:, part].float().transpose(-1, -2)
            for start in range(0, queries, rows):
                these = slice(start, start + rows)
                scores = (query[:, part, these].float() * scale) @ keys
                if mask is not None:
                    masked = mask[:, part, these if mask.shape[2] > 1 else slice(None)]
                    if mask.dtype == torch.bool:
                        scores = scores.masked_fill(~masked, float("-inf"))
                    else:
                        scores = scores + masked.float()
                found = scores.softmax(dim=-1)
                found = found.sum(dim=1) if found.shape[1] > 1 else found[:, 0]  # a sum of one would copy it
                total[:, these] += found if weights is None else found @ weights
    return total / heads
