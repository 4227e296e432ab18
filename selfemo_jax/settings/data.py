"""Settings of the data and of what the policy is asked to write."""

from dataclasses import dataclass, field
from typing import Literal

from selfemo_jax.settings.numbers import Count, Natural, Positive


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How often each data set is drawn."""

    kind: Literal["proportional", "temperature", "weights"] = "proportional"
    """By size, by size**(1/temperature), or by `weights`."""
    temperature: Positive = 1.0
    """1 is proportional; larger is flatter. Only for kind temperature."""
    weights: dict[str, float] = field(default_factory=dict)
    """Data set name -> relative weight. Only for kind weights."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which dialogues become training inputs."""

    root: str | None = None
    """Folder that holds the data sets' folders; null: the environment's SELFEMO_DATA."""
    sets: list[str] = field(default_factory=lambda: ["sample"])
    """sample (all three bundled sets), meld, emorynlp, iemocap, or the path of a folder of your own."""
    rule: Literal["context_and_responder", "any_responder", "all"] = "context_and_responder"
    """Which utterances are training inputs: with a context and a real next speaker, any speaker, all."""
    decontaminate: bool = False
    """Drop training dialogues that share scenes with any evaluation split."""
    speaker_style: Literal["name", "index"] = "name"
    """Write speakers by name or as Speaker 1, Speaker 2."""
    mixture: Mixture = field(default_factory=Mixture)
    """How often each data set is drawn."""
    max_prompt: Count = 512
    """Tokens; the oldest turns of a longer prompt are dropped."""
    max_items: Count | None = None
    """Training inputs used, chosen by the seed; null: all."""
    persona: bool = True
    """Tell the responder's persona and the scene's theme where they are known."""
    shuffle_gold: bool = False
    """Control arm: permute the gold labels among the training inputs."""
    num_workers: Natural = 0
    """Reader processes; 0 reads in the training process."""
    dev_split: Literal["dev"] = "dev"
    """Split that selects checkpoints; the test split never does."""


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """What the policy is asked to write."""

    max_labels: Count = 3
    """Emotions an answer may list."""
    prompt_style: Literal["full", "brief", "dialogue"] = "full"
    """Complete rules with an example, for pretrained models; a short form for small ones; or the shortest,
    whose prompts of one dialogue grow on one trunk, so that rows of dialogues share it."""
    descriptions: bool = False
    """Say in the prompt what each label of the known sets means."""
    biography: Literal["none", "train_lines", "expert"] = "none"
    """What the prompt tells of the speaker to recognise: nothing; facts counted from the speaker's lines in
    other training dialogues; or sentences that `expert` wrote from such lines."""
