"""Which of a generator's denoising steps are meant; free of torch, so that a parameter is checked at once."""

from diffseg.errors import DiffsegError


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
