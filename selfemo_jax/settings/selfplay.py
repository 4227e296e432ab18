"""Settings of the cold start and of self-play."""

from dataclasses import dataclass, field
from typing import Literal

from selfemo_jax.settings.model import Optim
from selfemo_jax.settings.numbers import Count, Natural, NotNegative, Positive, Share


def _sft_optim() -> Optim:
    return Optim(lr=1e-5, b2=0.95, schedule="cosine", warmup=0.1)


def _label_optim() -> Optim:
    return Optim(lr=1e-4, b2=0.98, schedule="linear", warmup=0.05)


@dataclass(frozen=True, kw_only=True)
class LabelRows:
    """Labels alone, learned before any answer: one row a dialogue, a question after each labelled line. Made
    for `output.prompt_style: dialogue`, whose prompts share the row."""

    epochs: NotNegative = 0.0
    """Passes over the dialogues of the training data, all their labelled lines; 0: no such phase."""
    batch_size: Count = 8
    """Dialogues per optimizer step."""
    optim: Optim = field(default_factory=_label_optim)
    """Learning rate and schedule of this phase."""
    token_dropout: Share = 0.0
    """Share of the dialogue's tokens that are blanked in training, for models that overfit."""
    dev_dialogues: Count = 40
    """Dev dialogues whose labels are scored when a dev score is due, fixed by the seed."""


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """Supervised steps that teach the answer format before any reward; its optim serves every SFT phase."""

    source: Literal["human", "expert", "mixed", "none"] = "human"
    """human: targets made from gold labels and the real next turn; expert: written by `expert`; mixed: the
    expert's where one passes, else the human-made; none: no cold start."""
    num: Count | None = None
    """Inputs used, or asked about; null: all that can be made."""
    tau: Share = 0.5
    """Least r1 of an expert's answer against the gold that it did not see."""
    gold: Literal["hidden", "shown"] = "hidden"
    """Whether the expert sees the gold labels; shown asks it to explain them."""
    epochs: Positive = 2.0
    """Passes over those inputs."""
    batch_size: Count = 64
    """Examples per optimizer step."""
    optim: Optim = field(default_factory=_sft_optim)
    """Learning rate and schedule of SFT."""
    order: Literal["shuffled", "curriculum"] = "shuffled"
    """How supervised passes go through their inputs: in random order, or from dialogues in which feelings
    rarely shift to those in which they often do; of the phase on labels too."""
    rows: Literal["examples", "dialogues"] = "examples"
    """What batch_size counts: examples, each in a segment of its own, or dialogues, whose examples share what
    their prompts have in common."""
    label_weight: Positive = 1.0
    """Weight of the token that tells the emotion label apart, where any other token has 1; rows dialogues."""
    class_power: Share = 0.0
    """A label counts as its frequency to the power of minus this (0 all lines alike, 1 all labels alike): in
    the phase on labels, and with rows dialogues where an answer tells its label."""
    lines: Literal["answered", "all"] = "answered"
    """answered: the inputs that an answer can be made for or was written for; all: every other labelled
    line of the training dialogues too, up to the token that tells its label apart; with rows dialogues."""
    whole_answers: Share = 1.0
    """Share of the human-made answers that are learned to their end, drawn by the seed; the others end with
    the token that tells their label apart, which costs far fewer tokens; below 1 with rows dialogues."""
    labels: LabelRows = field(default_factory=LabelRows)
    """A phase before the cold start, on labels alone."""


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """How the harvest is used in the next iteration."""

    method: Literal["grpo", "sft", "sft_then_grpo"] = "grpo"
    """The next RL phase alone, SFT on the best rollouts, or SFT and then RL."""
    init: Literal["base", "cold", "current"] = "base"
    """Weights it starts from: the base model's, the cold start's, or the last phase's."""


@dataclass(frozen=True, kw_only=True)
class Hygiene:
    """What a reply must be to enter the store; each rule has its own reason of rejection."""

    min_words: Count = 1
    """Words of an accepted reply at least."""
    max_words: Count = 80
    """Words of an accepted reply at most."""
    near_duplicate: Share = 0.8
    """Jaccard similarity of word 3-grams from which a reply repeats one in the store; 1: equal 3-grams."""
    language: str | None = "english"
    """Language of the replies; one of four words or more that is almost surely in another is rejected; null:
    any language."""
    label_words: Literal["declared", "any", "keep"] = "declared"
    """Rejects a reply that names an emotion that it declares, or any of the list; keep: neither."""


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """A frozen recogniser that reads an accepted reply and must see the emotions that were declared."""

    weights: str | None = None
    """base: the policy before training; cold: the cold start's, which saw human labels alone; a folder; null:
    no verifier (the arm verifier_labels asks the cold start's, without one the base policy)."""
    tau: Share = 0.5
    """Least weighted IoU between its answer and the declared emotions."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Jensen-Shannon divergence (base 2, from 0 to 1) of a harvest's labels to the human ones, the mean over
    data sets weighted by their synthetic inputs: of those accepted, or of those left to train on, whichever
    is further."""

    alarm: Share = 0.1
    """Divergence from which the harvest is reported as drifting."""
    stop: Share | None = None
    """Divergence from which the run stops before it trains on the harvest; null: never."""
    least: Count = 50
    """Synthetic inputs, accepted or to train on, below which their divergence is noise and only reported."""


@dataclass(frozen=True, kw_only=True)
class Flywheel:
    """Self-play: accepted best rollouts become new labelled inputs."""

    iterations: Natural = 1
    """Rounds of RL, play and harvest before the final RL phase; 0: no self-play."""
    harvest: Literal["sample", "replay"] = "sample"
    """What is judged. sample: the frozen policy plays after RL, turn after turn; replay: what RL
    itself sampled in its last max_age steps, one turn a dialogue, nothing sampled anew."""
    max_age: Count = 50
    """Steps of RL whose rollouts a harvest by replay looks at, counted from its end."""
    max_inputs: Count | None = None
    """Inputs that self-play begins from per iteration, chosen by the seed; null: all."""
    dialogues_per_step: Count = 256
    """Dialogues that one engine call plays on by a turn; a killed harvest repeats one call at most."""
    n_syn: Natural = 8000
    """Synthetic inputs kept per iteration at most; 0: none, a harvest is made and nothing learns from it."""
    tau: Share = 0.5
    """Least r1 of an accepted rollout."""
    tau_low: Share | None = None
    """Synthetic inputs are left out once RL asked them and the mean r1 of their group stayed below this, or
    all their answers were right; null: they stay. Needs `rollout.keep: all`."""
    select: Literal["reward", "acceptable"] = "reward"
    """Which rollout of a group is judged. reward: the best, whatever its reply; acceptable: the best of those
    whose reply passes every rule, for policies that often say a single word."""
    max_depth: Count = 3
    """Generated turns a dialogue may carry."""
    max_share: Share = 0.5
    """Share of synthetic inputs in the RL buffer at most."""
    heldout: Share = 0.05
    """Share of synthetic inputs, by root dialogue, kept out of training for evaluation."""
    max_label_ratio: Positive | None = 2.0
    """Share of a label among a harvest's training inputs at most, as a multiple of its share in the human
    data of the set; null: no bound."""
    control: Literal["none", "shuffled_labels", "verifier_labels", "original_only", "all_original"] = "none"
    """Arm of comparison. none: the method; shuffled_labels: declared labels change places within a data set;
    verifier_labels: the verifier's answer is the gold of a synthetic input; original_only: the same phases
    and steps, without synthetic inputs; all_original: no self-play, every original utterance that somebody
    else can answer."""
    hygiene: Hygiene = field(default_factory=Hygiene)
    """Rules for the text of a reply."""
    verifier: Verifier = field(default_factory=Verifier)
    """Gate between a declared emotion and the store."""
    drift: Drift = field(default_factory=Drift)
    """Watch on the labels of what self-play makes."""
    retrain: Retrain = field(default_factory=Retrain)
    """What the next iteration starts from."""
