"""Cross-attention of a Stable Diffusion while it draws: where in the picture is each word of the prompt?

A layer of cross-attention answers, for every position of the picture, how much of each prompt token it reads:

    A = softmax(Q K^T / sqrt(d))        Q from the picture (h w x d), K from the prompt (77 x d)

The column of a word's token, reshaped to h x w, is a map of that word. `AttentionRecorder` averages these
maps over heads, layers and denoising steps while an unchanged pipeline call runs:

    with AttentionRecorder(pipeline, tokens, resolutions=(16,)) as recorder:
        images = pipeline(prompts, ...).images
    maps = recorder.maps()              # one float32 tensor, words x h x w, for each prompt

The picture is computed by the processors that were there before, so it is the same, bit for bit, with and
without the recorder; the probabilities are computed a second time beside it, only where they are asked for.
The same pass also gives the self-attention (what each position of the picture reads of the others), for the
refiner of that name.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from diffseg.errors import DiffsegError
from diffseg.word_maps import WordMaps, average


def token_positions(tokenizer, prompt: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return, for each character span of `prompt`, the positions of its tokens in the padded CLIP sequence.

    A compound ("potted plant") or a word that is split has several positions; of a word that occurs twice,
    the span says which. SDXL's two tokenizers split alike, so the first one's positions serve both.
    Raises a DiffsegError when a span holds no word, or a word is unknown to the tokenizer, or reaches beyond
    the longest sequence that the text encoder reads (77 tokens, the start and end marks among them).
    """
    encoded = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    offsets, ids, longest = encoded["offset_mapping"], encoded["input_ids"], tokenizer.model_max_length
    positions = []
    for start, stop in spans:
        word = prompt[start:stop]
        found = [k for k, (left, right) in enumerate(offsets) if max(left, start) < min(right, stop)]
        if not found or not word.strip():
            raise DiffsegError(f"the span {start}:{stop} holds no word of {prompt!r}; correct the span")
        if found[-1] > longest - 2:  # the last position is the end mark's
            raise DiffsegError(
                f"the word {word!r} is cut off: the generator reads {longest} tokens of a prompt, start "
                f"and end marks among them; shorten {prompt!r}"
            )
        # CLIP uses one token for the end and for the unknown; inside a word it can only mean the latter
        if any(ids[k] == tokenizer.unk_token_id for k in found):
            raise DiffsegError(
                f"the generator's tokenizer does not know the word {word!r}; use another word or generator"
            )
        positions.append(found)
    return positions


def parse_steps(text: str, count: int) -> range:
    """Return the denoising steps that `text` names: "all", "middle", one index, or "first-last" (from 0)."""
    try:
        if text == "all":
            return range(count)
        if text == "middle":  # the paper's choice: step 50 of 100
            return range(count // 2, count // 2 + 1)
        first, dash, last = text.partition("-")
        steps = range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise DiffsegError(f'attention_steps is {text!r}; write "all", "middle", "7" or "5-15"') from None
    if not steps or steps[-1] >= count:
        raise DiffsegError(f"attention_steps {text!r} is outside the {count} denoising steps (0 to {count - 1})")
    return steps


class AttentionRecorder:
    """Record the attention of chosen words in one text-to-image call of a UNet pipeline (SD 1.x, 2.x, XL).

    pipeline: the pipeline; its attention processors are restored on leaving, also after an exception.
    tokens: for each picture of the call, for each of its words, the positions of the word's tokens
        (`token_positions`); a word's map is the mean over its tokens.
    resolutions: map sizes to record, each the shorter side in positions; 16 is 16 x 16, or 16 x 32 at 1:2.
        None for all that the generator has.
    steps: denoising steps to record (`parse_steps`), from 0; None for all.
    self_resolution: a map size whose self-attention is recorded too; None for none.
    separately: keep the words' maps of each step apart (`word_maps`), in place of one sum over the steps.

    Unless they are kept separately, memory does not grow with the number of steps: for each layer a running sum in
    float32 of the words' maps (words x h x w a picture), and for all layers together one of the self-attention
    ((h w)^2 a picture: 0.3 MB at 16 x 16, 4 MB at 32 x 32). A picture's maps do not depend on its batch: within 1e-4
    of their largest value in float32,
    and within the rounding of the pictures themselves in half precision.
    """

    def __init__(
        self,
        pipeline,
        tokens: Sequence[Sequence[Sequence[int]]],
        resolutions: Sequence[int] | None = (16,),
        steps: Sequence[int] | None = None,
        self_resolution: int | None = None,
        separately: bool = False,
    ):
        self.pipeline, self.steps, self.separately = pipeline, steps, separately
        self.resolutions = None if resolutions is None else sorted(set(resolutions))
        self.self_resolution = self_resolution
        self.words = [len(words) for words in tokens]
        if self.resolutions == [] or not self.words or 0 in self.words:
            raise DiffsegError("there is nothing to record; give a resolution, and a word for each picture")
        # picture x token x word: multiplying by it averages the tokens of each word
        self.weights = torch.zeros(len(tokens), pipeline.tokenizer.model_max_length, max(self.words))
        for b, words in enumerate(tokens):
            for w, positions in enumerate(words):
                self.weights[b, list(positions), w] = 1 / len(positions)
        # by ("cross" or "self", resolution, layer or "", step or -1 for all together)
        self.sums: dict[tuple[str, int, str, int], torch.Tensor] = {}
        self.counts: Counter[tuple[str, int, str, int]] = Counter()
        self.evaluations = 0  # of the UNet
        self.evaluated: set[int] = set()  # steps
        self.met: dict[str, set[int]] = {"cross": set(), "self": set()}  # resolutions that the generator has
        self.recording = False

    def __enter__(self) -> "AttentionRecorder":
        unet = self.pipeline.unet
        self.processors = dict(unet.attn_processors)
        kinds = ("attn2.processor", "attn1.processor") if self.self_resolution else ("attn2.processor",)
        recording = {
            name: RecordingProcessor(processor, self, name.removesuffix(".processor"))
            if name.endswith(kinds)
            else processor
            for name, processor in self.processors.items()
        }
        unet.set_attn_processor(recording)
        self.hook = unet.register_forward_pre_hook(self.before_evaluation, with_kwargs=True)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.hook.remove()
        self.pipeline.unet.set_attn_processor(dict(self.processors))

    def before_evaluation(self, unet, args: tuple, kwargs: dict) -> None:
        """Note the latents' size and the step.

        Some schedulers evaluate the UNet more often than once a step: Heun twice in every step but the last,
        PNDM twice in the first. Their `timesteps` list every evaluation, so this division finds its step.
        """
        scheduler = self.pipeline.scheduler
        if self.evaluations == len(scheduler.timesteps):
            raise DiffsegError("a recorder serves one call of the pipeline; make another for the next call")
        step = self.evaluations * scheduler.num_inference_steps // len(scheduler.timesteps)
        self.evaluations += 1
        self.evaluated.add(step)
        self.step = step
        self.recording = self.steps is None or step in self.steps
        self.latent_size = (args[0] if args else kwargs["sample"]).shape[-2:]

    def map_size(self, positions: int) -> tuple[int, int]:
        """Return (h, w) of a layer with that many positions: the latents' size, halved again and again."""
        height, width = self.latent_size
        while height * width > positions:
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    @torch.no_grad()
    def record(self, layer: str, attn, hidden_states: torch.Tensor, context: torch.Tensor | None) -> None:
        """Add one layer's probabilities to the running sums; `context` is None for self-attention."""
        kind, size = "self" if context is None else "cross", self.map_size(hidden_states.shape[1])
        resolution = min(size)
        self.met[kind].add(resolution)
        wanted = self.resolutions if kind == "cross" else [self.self_resolution]
        if wanted is not None and resolution not in wanted:
            return
        pictures, parts = len(self.words), 2 if self.pipeline.do_classifier_free_guidance else 1
        if len(hidden_states) != pictures * parts:
            raise DiffsegError(
                f"the recorder has the words of {pictures} pictures and the call draws "
                f"{len(hidden_states) // parts}; give it the words of every picture of the call"
            )
        # with guidance the batch is [negative prompts; prompts]: the last part is ours in both cases
        hidden_states = hidden_states[-pictures:]
        context = hidden_states if context is None else context[-pictures:]
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key = attn.to_k(context).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        with torch.autocast(query.device.type, enabled=False):
            query, key = query.float() * attn.scale, key.float().transpose(-1, -2)
            if kind == "cross":
                self.weights = self.weights.to(query.device)
                probabilities = (query @ key).softmax(dim=-1).mean(dim=1)  # picture x position x token
                found = (probabilities @ self.weights).transpose(1, 2).unflatten(-1, size)
            else:  # one head at a time: all heads together would take 8 (h w)^2 a picture and more
                found = sum((query[:, h] @ key[:, h]).softmax(dim=-1) for h in range(attn.heads))
                found = (found / attn.heads).unflatten(-1, size).unflatten(1, size)
            part = (layer, self.step if self.separately else -1) if kind == "cross" else ("", -1)
            place = (kind, resolution, *part)
            self.sums[place] = self.sums[place] + found if place in self.sums else found
            self.counts[place] += 1

    def maps(self, resolutions: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Return one float32 tensor (words x h x w, probabilities 0..1) for each picture, on the CPU.

        resolutions: which of the recorded ones to average; None for all. h x w is the largest of them; each has
        the same weight, however many layers it has. Raises a DiffsegError when a step or a resolution that was
        asked for did not occur.
        """
        recorded = self.resolutions or sorted(self.met["cross"])
        mean = average([self.mean("cross", resolution) for resolution in sorted(set(resolutions or recorded))]).cpu()
        return [mean[b, :words] for b, words in enumerate(self.words)]

    def word_maps(self) -> list[WordMaps]:
        """Return what is kept of each picture: its words' maps of every layer and, where recorded so, of every step."""
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
        stacked = {layer: torch.stack(maps) for layer, maps in layers.items()}  # step x picture x word x h x w
        return [
            WordMaps({layer: maps[:, b, :words] for layer, maps in stacked.items()}, steps, attentions[b])
            for b, words in enumerate(self.words)
        ]

    def self_attention(self) -> list[torch.Tensor]:
        """Return one float32 tensor h x w x h x w for each picture, on the CPU: what [y, x] reads of [v, u].

        The mean over heads, layers and recorded steps at `self_resolution`; what a position reads sums to 1.
        Raises a DiffsegError when a step or the resolution did not occur, or none was asked for.
        """
        if not self.self_resolution:
            raise DiffsegError("no self-attention was asked for; give the recorder a self_resolution")
        return list(self.mean("self", self.self_resolution).cpu())

    def mean(self, kind: str, resolution: int) -> torch.Tensor:
        if not self.evaluations:
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
                f"no {kind}-attention was recorded at resolution {resolution}: at this picture size the "
                f"generator has it at {sorted(self.met[kind])}; choose attention_resolutions among them"
            )
        return sum(self.sums[place] for place in places) / sum(self.counts[place] for place in places)


class RecordingProcessor:
    """The attention processor that was there before, with a look at its inputs."""

    def __init__(self, processor: Callable, recorder: AttentionRecorder, layer: str):
        self.processor, self.recorder, self.layer = processor, recorder, layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **rest):
        if self.recorder.recording:
            self.recorder.record(self.layer, attn, hidden_states, encoder_hidden_states)
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, **rest)
