"""The model's settings: the section `model` of a recipe.

This module imports no torch, so a recipe can be read without it. The classes of mixers and kernels are listed in
`layers.MIXERS` and `ssm.kernels.KERNELS`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import Discriminator, Field, Tag, model_validator

from bst_base.settings import Config
from bst_dist.model.conflicts import conflict
from bst_dist.model.parametrisation import ParametrisationConfig, StandardConfig


def _ordered_steps(settings: Any) -> Any:
    if settings.dt_min > settings.dt_max:
        raise ValueError(f"dt_min ({settings.dt_min}) must be at most dt_max ({settings.dt_max})")
    return settings


class AttentionConfig(Config):
    """Self-attention inside the sliding window."""

    position: Literal["t5", "rope"] = "t5"
    """Relative position: T5's learned bias per distance, or rotary embedding, which fused kernels support."""
    buckets: int = Field(32, ge=2, le=4096)
    """T5: learned biases per head."""
    max_distance: int = Field(128, ge=2, le=2**20)
    """T5: from this distance on, all tokens share the last bucket."""
    rope_base: float = Field(10_000.0, gt=1, le=1e12, allow_inf_nan=False)
    """RoPE: base of the wavelengths."""
    kv_heads: int | None = Field(None, ge=1, le=2**16)
    """Key and value heads for grouped-query attention (arXiv 2305.13245); must divide the heads. null: as many as
    heads. Fewer heads make the cache and the messages of sequence-parallel ranks smaller. Cross-attention keeps all."""
    include_self: bool = True
    """Whether a token attends to itself. false: only to the W tokens before it, as in meliad."""

    @model_validator(mode="after")
    def _check(self) -> AttentionConfig:
        if self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"max_distance ({self.max_distance}) must be more than half the buckets ({self.buckets}): half of the "
                "buckets hold one distance each, the others reach from there to max_distance"
            )
        return self

    def unread(self) -> list[str]:
        """Return the fields that differ from their defaults, but are of the other `position`."""
        return self.changed(*(("rope_base",) if self.position == "t5" else ("buckets", "max_distance")))


class ContextConfig(Config):
    """How SSM outputs become context states."""

    variant: Literal["SH", "MH", "MF"] = "SH"
    """Single-head, multi-head or multi-filter."""
    states: int = Field(32, ge=1, le=65536)
    """MF: number of filters S, which is also the number of context states per block."""
    ssm_width: int | None = Field(None, ge=1, le=2**20)
    """SSM channels Ds; null: a quarter of the model's width, or an eighth for MF."""
    attend: Literal["current", "previous"] = "current"
    """SH and MH: attend to the current block's states, causally, or to all of the previous block's (another reading of
    the paper's text)."""

    @model_validator(mode="after")
    def _check(self) -> ContextConfig:
        if self.variant == "MF" and self.attend == "previous":
            raise ValueError("attend: 'previous' is for SH and MH; MF always attends to the end of the previous block")
        return self

    def unread(self) -> list[str]:
        """Return the fields that differ from their defaults, but are of another `variant`."""
        return [] if self.variant == "MF" else self.changed("states")

    def width(self, model_width: int) -> int:
        """Return the SSM width Ds of a model of width D."""
        return self.ssm_width or model_width // (8 if self.variant == "MF" else 4)


class SSMConfig(Config):
    """The state space model inside a layer."""

    kernel: Literal["s4d"] = "s4d"
    """Diagonal state space. Each other kernel has its own settings (kernels.py)."""
    state: int = Field(16, ge=2, le=65536, multiple_of=2)
    """Real state size N per channel: N/2 complex modes."""
    init: Literal["lin", "inv", "legs"] = "lin"
    """Initial frequencies Im A (arXiv 2206.11893, section 4): S4D-Lin, S4D-Inv, or the normal part of HiPPO-LegS."""
    dt_min: float = Field(1e-3, gt=0, le=1e3, allow_inf_nan=False)
    """Smallest initial step; steps are log-uniform per channel. 1/dt is the time scale in tokens."""
    dt_max: float = Field(1e-1, gt=0, le=1e3, allow_inf_nan=False)
    """Largest initial step."""
    chunk: int = Field(64, ge=1, le=65536)
    """Tokens computed as one causal matrix (T); must divide the block."""

    _check = model_validator(mode="after")(_ordered_steps)


class DPLRConfig(Config):
    """S4's structured kernel."""

    kernel: Literal["s4-dplr"]
    """Diagonal plus low rank, computed by a Cauchy kernel and Woodbury's identity."""
    state: int = Field(16, ge=2, le=4096, multiple_of=2)
    """Real state size N per channel: N/2 complex modes."""
    dt_min: float = Field(1e-3, gt=0, le=1e3, allow_inf_nan=False)
    """Smallest initial step; steps are log-uniform per channel. 1/dt is the time scale in tokens."""
    dt_max: float = Field(1e-1, gt=0, le=1e3, allow_inf_nan=False)
    """Largest initial step."""
    chunk: int = Field(64, ge=1, le=65536)
    """Tokens computed as one causal matrix (T); must divide the block."""

    _check = model_validator(mode="after")(_ordered_steps)


class FilterConfig(Config):
    """Settings common to the unstructured kernels."""

    chunk: ClassVar[int] = 1  # no chunks: any number of tokens can be computed at once
    length: int = Field(ge=1, le=2**30)
    """Filter length K in tokens, as trained. In longer sequences a token sees only the last K inputs."""
    fast_decay: float = Field(0.3, gt=0, le=1e6, allow_inf_nan=False)
    """The window of the fastest channel falls to 1/100 at this fraction of the trained length."""
    slow_decay: float = Field(1.5, gt=0, le=1e6, allow_inf_nan=False)
    """The same for the slowest channel; the rates of the others are evenly spaced between the two (as in Hyena)."""


class ExplicitConfig(FilterConfig):
    """A filter whose values are parameters."""

    kernel: Literal["explicit"] = "explicit"
    """The filter's values are free parameters, under a decaying window."""


class HyenaConfig(FilterConfig):
    """A filter computed from its positions by a small network."""

    kernel: Literal["hyena"] = "hyena"
    """The filter's values come from a network with sines on a position embedding, under a decaying window."""
    hidden: int = Field(64, ge=1, le=65536)
    """Width of the network."""
    hidden_layers: int = Field(3, ge=1, le=100)
    """Number of sine layers before the linear one."""
    bands: int = Field(16, ge=1, le=65536)
    """Frequencies in the position embedding: it has 1 + 2 bands features."""
    sine: float = Field(10.0, gt=0, le=1e6, allow_inf_nan=False)
    """Initial frequency of the sines; higher values give rougher filters."""


class SelectiveConfig(Config):
    """Settings common to the selective state space models."""

    state: int = Field(64, ge=1, le=65536)
    """State size N of each channel."""
    dt_min: float = Field(1e-3, gt=0, le=1e3, allow_inf_nan=False)
    """Smallest initial step; steps are log-uniform per head."""
    dt_max: float = Field(1e-1, gt=0, le=1e3, allow_inf_nan=False)
    """Largest initial step."""
    chunk: int = Field(64, ge=1, le=65536)
    """Tokens computed as one causal matrix (T); must divide the block."""

    _check = model_validator(mode="after")(_ordered_steps)


class SSDConfig(SelectiveConfig):
    """A selective state space in the place of S4D, for SH and MH."""

    kernel: Literal["ssd"]
    """Mamba-2's state space: decay, input and read-out depend on the token."""
    head: int = Field(16, ge=1, le=65536)
    """Channels that share one decay; must divide the SSM's width."""


class NoConvolutionConfig(Config):
    """The ablation without an SSM."""

    chunk: ClassVar[int] = 1  # any number of tokens can be computed at once
    kernel: Literal["none"]
    """No convolution: a token's output is its own input, scaled for each map."""


def _kernel_name(section: Any) -> str:
    return section.get("kernel", "s4d") if isinstance(section, dict) else getattr(section, "kernel", "s4d")


KernelConfig: TypeAlias = Annotated[
    Annotated[SSMConfig, Tag("s4d")]
    | Annotated[DPLRConfig, Tag("s4-dplr")]
    | Annotated[ExplicitConfig, Tag("explicit")]
    | Annotated[HyenaConfig, Tag("hyena")]
    | Annotated[SSDConfig, Tag("ssd")]
    | Annotated[NoConvolutionConfig, Tag("none")],
    Discriminator(_kernel_name),
]
"""The settings of one kernel, selected by the field `kernel`. A field of another kernel is an error."""


class TransformerXLConfig(Config):
    """The segments of Transformer-XL."""

    window: int = Field(2048, ge=1, le=2**24)
    """Segment length in tokens, and the number of keys that each token sees; a multiple of the block."""


class BlockRecurrentConfig(Config):
    """The state of a Block-Recurrent layer."""

    states: int = Field(512, ge=1, le=65536)
    """State vectors S, each as wide as the model."""


class GSSConfig(Config):
    """The widths of a gated state space layer; its SSM is the section `ssm` (state: 512 as published)."""

    gate: int = Field(4, ge=1, le=1024)
    """Width of the gated path, as a multiple of the model's width."""
    reduce: int = Field(4, ge=1, le=1024)
    """The SSM's width is the model's width divided by this; must divide it."""


class Mamba2Config(SelectiveConfig):
    """A Mamba-2 layer."""

    expand: int = Field(2, ge=1, le=1024)
    """Width of the SSM, as a multiple of the model's width."""
    head: int = Field(64, ge=1, le=65536)
    """Channels that share one decay; must divide the SSM's width."""
    convolution: int = Field(4, ge=1, le=1024)
    """Taps of the convolution before the SSM."""


class GatedDeltaNetConfig(Config):
    """A Gated DeltaNet layer; its heads are the model's."""

    expand: int = Field(2, ge=1, le=1024)
    """Width of a head's values, as a multiple of the width of its keys."""
    dt_min: float = Field(1e-3, gt=0, le=1e3, allow_inf_nan=False)
    """Smallest initial step of the decay; steps are log-uniform per head."""
    dt_max: float = Field(1e-1, gt=0, le=1e3, allow_inf_nan=False)
    """Largest initial step."""
    convolution: int = Field(4, ge=1, le=1024)
    """Taps of the convolution before the state."""
    chunk: int = Field(64, ge=1, le=65536)
    """Tokens computed as one triangular system (T); must divide the block."""

    _check = model_validator(mode="after")(_ordered_steps)


class FullAttentionConfig(Config):
    """Full causal attention."""

    longest: int = Field(16384, ge=1, le=2**30)
    """Longest sequence or stream allowed, in tokens. Time grows with its square, the cache linearly."""


MIXER_SECTIONS: dict[str, tuple[str, ...]] = {
    "bst": ("attention", "context", "ssm"),
    "bst-no-cross": ("attention", "context", "ssm"),
    "bst-joint": ("attention", "context", "ssm"),
    "sliding": ("attention",),
    "transformer-xl": ("attention", "transformer_xl"),
    "block-recurrent": ("attention", "block_recurrent"),
    "gss": ("gss", "ssm"),
    "ssm": ("ssm",),
    "mamba2": ("mamba2",),
    "gated-deltanet": ("gated_deltanet",),
    "full": ("attention", "full"),
}
"""The settings sections that each mixer reads. `layers.MIXERS` has the classes under the same names."""


Chunked = TypeVar("Chunked", bound=Config)


def within_block(settings: Chunked, block: int) -> Chunked:
    """Return the settings of a recurrence with chunks no longer than a block, so that chunks end at block ends."""
    return settings.model_copy(update={"chunk": block}) if settings.chunk > block else settings


class LayerConfig(Config):
    """Settings common to all layers of a model."""

    width: int = Field(ge=1, le=2**20)
    """Model width D."""
    heads: int = Field(ge=1, le=2**16)
    """Attention heads H; must divide the width unless head_width is set."""
    head_width: int | None = Field(None, ge=1, le=2**20)
    """Width of a head, dh; null: width / heads. heads x head_width may differ from the width: the paper's large model
    has 16 heads of 128 at width 1024."""
    ffn: int = Field(ge=1, le=2**22)
    """Width M of the feed-forward network."""
    activation: Literal["relu", "relu2", "gelu", "swiglu"] = "relu"
    """Activation of the feed-forward network: relu, relu2 (its square), gelu, or swiglu (SiLU times a second projection
    of the input). swiglu has a third matrix: two thirds of the width M give the same number of parameters."""
    block: int = Field(ge=1, le=2**20)
    """Block length W in tokens: the attention window, and the unit that everything is aligned to."""
    attention: AttentionConfig = AttentionConfig()
    context: ContextConfig = ContextConfig()
    ssm: KernelConfig = SSMConfig()
    transformer_xl: TransformerXLConfig = TransformerXLConfig()
    block_recurrent: BlockRecurrentConfig = BlockRecurrentConfig()
    gss: GSSConfig = GSSConfig()
    mamba2: Mamba2Config = Mamba2Config()
    gated_deltanet: GatedDeltaNetConfig = GatedDeltaNetConfig()
    full: FullAttentionConfig = FullAttentionConfig()

    @model_validator(mode="after")
    def _layer_fits(self) -> LayerConfig:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width}), or head_width must be given")
        if self.heads % self.kv_heads:
            raise ValueError(f"attention.kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.attention.position == "rope" and self.head % 2:
            raise ValueError(f"rope needs an even head width, got {self.head}")
        if problem := conflict(self, set(self.mixers()), self._used_sections()):
            raise ValueError(problem)
        return self

    @property
    def head(self) -> int:
        """Width of a head, dh."""
        return self.head_width or self.width // self.heads

    @property
    def inner(self) -> int:
        """Width of all heads together, H dh."""
        return self.heads * self.head

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads in self-attention."""
        return self.attention.kv_heads or self.heads

    @property
    def kv_inner(self) -> int:
        """Width of the keys of all these heads together."""
        return self.kv_heads * self.head

    @property
    def ffn_matrices(self) -> int:
        """Number of D x M matrices in the feed-forward network."""
        return 3 if self.activation == "swiglu" else 2

    def mixers(self) -> list[str]:
        """Return the mixers that read these settings: here none, as they are not known. `ModelConfig` returns the mixer
        of each layer."""
        return []

    def _used_sections(self) -> set[str]:
        return {section for mixer in self.mixers() for section in MIXER_SECTIONS[mixer]}

    def unread(self) -> list[str]:
        """Return the sections that differ from their defaults although no layer reads them, and such fields of others.

        This is not an error: one recipe can compare mixers or positions by an override of one setting. A run reports
        them at its start.
        """
        used = self._used_sections()
        known = {section for read in MIXER_SECTIONS.values() for section in read}
        unread = self.changed(*sorted(known - used))
        for name in sorted(used & {"attention", "context"}):
            unread += [f"{name}.{field}" for field in getattr(self, name).unread()]
        return unread


class ModelConfig(LayerConfig):
    """A stack of layers: `mixer` in the layers named by `placement`, `filler` in all others."""

    vocab_size: int | None = Field(None, ge=2, le=2**24)
    """Vocabulary size V; null: the corpus's."""
    depth: int = Field(ge=1, le=10_000)
    """Number of layers."""
    mixer: Literal[tuple(MIXER_SECTIONS)]  # type: ignore[valid-type]
    """The mixer of the layers under study."""
    placement: list[int] | Literal["all"] = "all"
    """Layers that use `mixer`, counted from 0: [1, 7, 9] are the 2nd, 8th and 10th."""
    filler: Literal[tuple(MIXER_SECTIONS)] = "sliding"  # type: ignore[valid-type]
    """The mixer of all other layers."""
    tied: bool = True
    """Use the embedding as the output head's matrix too; false: the head has its own."""
    parametrisation: ParametrisationConfig = StandardConfig()

    @model_validator(mode="after")
    def _model_fits(self) -> ModelConfig:
        if self.placement != "all":
            if len(set(self.placement)) < len(self.placement):
                raise ValueError(f"placement {self.placement} names a layer twice")
            outside = [place for place in self.placement if not 0 <= place < self.depth]
            if outside:
                raise ValueError(f"placement {outside} is outside the {self.depth} layers (0 to {self.depth - 1})")
        if self.parametrisation.kind == "completep" and self.context.ssm_width is not None:
            raise ValueError("under completep, context.ssm_width must be proportional to the width: leave it out")
        return self

    def mixers(self) -> list[str]:
        """Return the mixer of each layer."""
        if self.placement == "all":
            return [self.mixer] * self.depth
        return [self.mixer if place in self.placement else self.filler for place in range(self.depth)]
