"""Methods of fine-tuning, side by side: what each adds to a model, and at which learning rates.

Experiment `methods` and notebook 11 compare them, on models of the Llama architecture in fp32.
`helpers.profiles.METHODS` is something else: the ways of the command, LoRA, QLoRA and full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_kv_prefix_from_past_key_values,
)
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel

from helpers import CourseError
from helpers.logs import quiet
from helpers.profiles import LLAMA_LINEAR
from helpers.workarounds import apply_workarounds

RANK = 16
VERA_RANK = 256  # of matrices that are shared by all layers and not trained
VIRTUAL_TOKENS = 20
LORA_PLUS_RATIO = 16.0  # B's learning rate over A's, as in the article (arXiv 2402.12354)
LAST_LAYERS = 6  # one in so many layers, from the end


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        label: its usual name.
        description: what is trained, and what this is for, in two sentences.
        rates: three learning rates around its best one on the course's task, lowest first.
        config: makes PEFT's configuration; None where the model's own weights are trained.
        merges: its update can be merged into the weights, so that serving costs nothing extra.
    """

    label: str
    description: str
    rates: tuple[float, float, float]
    config: Callable[[], PeftConfig] | None = None
    merges: bool = True


def _lora(**settings: object) -> Callable[[], LoraConfig]:
    """LoRA of the course's rank in all linear layers, its update scaled by 2, unless told."""
    defaults = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(LLAMA_LINEAR)}
    return lambda: LoraConfig(task_type=TaskType.CAUSAL_LM, **defaults | settings)


_METHODS = (
    Method(
        "LoRA",
        "Beside each frozen matrix, the product of two thin ones is learned. "
        "It starts at zero, and after training it can be added to the matrix.",
        (3e-4, 1e-3, 3e-3),
        _lora(),
    ),
    Method(
        "LoRA of rank 1",
        "LoRA as small as it can be, for queries and values alone. "
        "On the course's model it trains exactly as many numbers as IA3.",
        (1e-3, 3e-3, 1e-2),
        _lora(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
    ),
    Method(
        "rsLoRA",
        "LoRA with its update scaled by alpha over the square root of the rank. "
        "Higher ranks then do not learn more slowly.",
        (1e-4, 3e-4, 1e-3),
        _lora(use_rslora=True),
    ),
    Method(
        "LoRA+",
        "LoRA with a higher learning rate for B, which starts at zero, than for A. "
        f"Here B's is {LORA_PLUS_RATIO:.0f} times A's; the rates named are A's.",
        (1e-4, 3e-4, 1e-3),
        _lora(),
    ),
    Method(
        "DoRA",
        "LoRA changes the direction of each row of the matrix, and a vector its length. "
        "That comes closer to what full fine-tuning does, and costs time.",
        (3e-4, 1e-3, 3e-3),
        _lora(use_dora=True),
    ),
    Method(
        "PiSSA",
        "LoRA that starts from the largest singular values and vectors of each matrix. "
        "The rest of the matrix is frozen.",
        (1e-4, 3e-4, 1e-3),
        _lora(init_lora_weights="pissa", lora_alpha=RANK),
    ),
    Method(
        "OLoRA",
        "LoRA that starts from orthogonal vectors, the QR decomposition of each matrix. "
        "The rest of the matrix is frozen.",
        (1e-4, 3e-4, 1e-3),
        _lora(init_lora_weights="olora", lora_alpha=RANK),
    ),
    Method(
        "VeRA",
        "All layers share two random matrices that are not trained. "
        "Each layer learns two vectors that scale them.",
        (1e-2, 3e-2, 1e-1),
        lambda: VeraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=VERA_RANK,
            target_modules=list(LLAMA_LINEAR),
            save_projection=False,  # the seed is enough to draw the matrices again
        ),
    ),
    Method(
        "IA3",
        "Keys, values and the inner activations of each MLP are multiplied by learned vectors. "
        "They start at one.",
        (1e-2, 3e-2, 1e-1),
        lambda: IA3Config(
            task_type=TaskType.CAUSAL_LM,
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    ),
    Method(
        "prompt tuning",
        f"The embeddings of {VIRTUAL_TOKENS} virtual tokens in front of every text are learned. "
        "They start as those of random words, and every request has to carry them.",
        (1e-2, 3e-2, 1e-1),
        lambda: PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=VIRTUAL_TOKENS,
            prompt_tuning_init="SAMPLE_VOCAB",
        ),
        merges=False,
    ),
    Method(
        "prefix tuning",
        f"Keys and values of {VIRTUAL_TOKENS} virtual tokens are learned, for every layer. "
        "They start as those of random words, and fill part of the KV cache of every request.",
        (1e-2, 3e-2, 1e-1),
        lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL_TOKENS),
        merges=False,
    ),
    Method(
        "LayerNorm tuning",
        "Only the scales of the normalization layers are trained. "
        "They are vectors that the model has already.",
        (3e-3, 1e-2, 3e-2),
        lambda: LNTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            target_modules=["input_layernorm", "post_attention_layernorm", "norm"],
        ),
    ),
    Method(
        "last layers",
        f"All weights of the last of every {LAST_LAYERS} layers are trained, without an adapter. "
        "The backward pass ends where the frozen layers begin, which saves time.",
        (1e-4, 3e-4, 1e-3),
    ),
    Method(
        "full",
        "Every weight is trained. It takes the most memory, and the result is a whole model.",
        (3e-5, 1e-4, 3e-4),
    ),
)
METHODS = {method.label: method for method in _METHODS}


def prepare(model: PreTrainedModel, label: str) -> PreTrainedModel | PeftModel:
    """Make a loaded model ready to be trained by a method. It is changed in place.

    The adapter is made on the CPU, from torch's own random numbers and by its own decompositions:
    after `transformers.set_seed` a run on a GPU starts from the same numbers as one on a CPU.

    Args:
        model: from `helpers.models.load_model`, of the Llama architecture, in fp32.
        label: one of `METHODS`.

    Raises:
        CourseError: there is no such method, or the model is not in fp32.
    """
    if label not in METHODS:
        raise CourseError(f"There is no method {label!r}. Choose one of {', '.join(METHODS)}.")
    if model.dtype != torch.float32 or getattr(model, "is_quantized", False):
        raise CourseError(
            "The methods are compared in fp32, and this model is in another format. Load it by "
            'load_model(profile, "fp32").'
        )
    config = METHODS[label].config
    if config is not None:
        device = model.device
        with quiet():
            model = apply_workarounds(get_peft_model(model.cpu(), config()))
            if label == "prefix tuning":
                _start_prefix_from_words(model)
            return model.to(device)
    model.requires_grad_(label == "full")
    if label == "last layers":
        layers = model.model.layers
        layers[-max(1, len(layers) // LAST_LAYERS) :].requires_grad_(True)
    return apply_workarounds(model)


def _start_prefix_from_words(model: PeftModel) -> None:
    """Fill the prefix with keys and values of random tokens.

    PEFT offers normal random numbers, from which the loss starts above 10, and zeros, from which
    all virtual tokens stay the same for ever: each gets the gradient of the others.
    """
    base = model.get_base_model()
    ids = torch.randint(0, base.config.vocab_size, (1, VIRTUAL_TOKENS))
    with torch.no_grad():
        cache = base(input_ids=ids, use_cache=True).cache
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


def optimizer(
    model: PreTrainedModel | PeftModel, label: str, learning_rate: float
) -> torch.optim.Optimizer | None:
    """The optimizer for `Trainer(optimizers=(optimizer, None))`; None where its own will do.

    Args:
        model: from `prepare`, on the device where it is trained.
    """
    if label != "LoRA+":
        return None
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=learning_rate, loraplus_lr_ratio=LORA_PLUS_RATIO
    )


def saved_bytes(model: PreTrainedModel | PeftModel) -> int:
    """Size of what has to be kept beside the base model: the adapter, or the changed weights."""
    if isinstance(model, PeftModel):
        kept = list(get_peft_model_state_dict(model).values())
    else:
        kept = [weight for weight in model.parameters() if weight.requires_grad]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)
