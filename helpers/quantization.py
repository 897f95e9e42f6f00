"""Block-wise quantization written out: tables of levels, and rounding to them."""

from __future__ import annotations

import torch


def make_levels(bits: int, kind: str) -> torch.Tensor:
    """The levels between -1 and 1 that a block, divided by its largest magnitude, is rounded to.

    Args:
        bits: bits per code, at least 2; there are 2**bits codes.
        kind: "normal quantiles" puts equally many weights of a normal distribution at each level,
            with an exact zero; with 4 bits this is NF4. "evenly spaced" leaves out one of the
            codes, so that zero is a level (2**bits - 1 levels).

    Returns:
        A sorted float tensor with one entry per level.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
    """
    half = 2 ** (bits - 1)
    if kind == "evenly spaced":
        return torch.arange(1 - half, half) / (half - 1)  # linspace would miss zero by rounding
    offset = 0.9677083  # so that no quantile is infinite; the constant of bitsandbytes
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(offset, 0.5, half + 1)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, half)[:-1])
    values = torch.cat([above, torch.zeros(1), below]).sort().values
    return values / values.abs().max()


def quantize_dequantize(
    values: torch.Tensor, levels: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Round a flat tensor to levels times the largest magnitude of each block (absmax scaling).

    Args:
        values: (n,) floats.
        levels: sorted levels between -1 and 1, from `make_levels`.
        block_size: values that share one scale; the last block may be shorter.

    Returns:
        (n,) floats: the values as a model with quantized weights would compute with them.
    """
    missing = -len(values) % block_size
    blocks = torch.nn.functional.pad(values, (0, missing)).view(-1, block_size)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    edges = (levels[1:] + levels[:-1]) / 2
    rounded = levels[torch.bucketize(blocks / scale, edges)] * scale
    return rounded.flatten()[: len(values)]
