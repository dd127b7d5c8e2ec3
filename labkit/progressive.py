"""A progressive network of two columns: a `TaskSpecificVLA` that stays as it is, and beside it a column that learns another task with its help.

How a column is fitted is in waypoint_regression.py; which column answers is for whoever knows the task.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import relu

from labkit.task_specific_vla import SentenceAttention, TaskSpecificVLA, WaypointPolicy, merged


class ProgressiveVLA(nn.Module):
    """A frozen old column and a learning one, which reads the old one's layers through lateral connections and never writes to them.

    With h1, h2 the activations of the old and of the learning column at one level and the next level's weights W and U, the learning column has
    f(W h2 + U h1) (Rusu et al., Progressive Neural Networks, arXiv 1606.04671, equation 1, without the adapters of equation 2). Three levels,
    from the bottom: what the towers see and read, where the sentence looks, the hidden layer. At the lowest, the learning column has nothing of
    its own, unlike the paper's: towers cannot be learnt from fifty demonstrations.
    Nothing that trains this model moves the old column, whatever it is told to train: no gradient is taken there, and it has no dropout.
    """

    def __init__(self, old: TaskSpecificVLA, hidden: int | None = None, dropout: float = 0.1):
        """old: copied, LoRA merged.   hidden, dropout: of the learning column's head; as wide as the old one's by default."""
        super().__init__()
        self.old = merged(old).eval().requires_grad_(False)
        seen, read = old.vision_encoder.config.hidden_size, old.text_encoder.config.hidden_size
        spatial = old.sentence_attention is not None
        queries = old.sentence_attention.queries if spatial else 0
        self.sentence_attention = SentenceAttention(seen, read, queries) if spatial else None
        hidden = old.action_head[0].out_features if hidden is None else hidden
        self.hidden = nn.Linear(read + old.frames * seen * (1 + queries), hidden)
        self.from_old_looks = nn.Linear(old.frames * seen * queries, hidden, bias=False) if spatial else None
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, old.normaliser.width)
        self.from_old_hidden = nn.Linear(old.action_head[0].out_features, old.normaliser.width, bias=False)

    readout = property(lambda self: self.old.readout)
    frames = property(lambda self: self.old.frames)
    normaliser = property(lambda self: self.old.normaliser)
    image_size = property(lambda self: self.old.image_size)
    vision_encoder = property(lambda self: self.old.vision_encoder)
    text_encoder = property(lambda self: self.old.text_encoder)

    def begin_as_the_old_one(self) -> None:
        """Give the column the old one's weights and silent lateral connections: it says what the old one says, until it learns.

        The paper's columns begin at random. Raises ValueError where the two heads differ in width.
        """
        first, last = self.old.action_head[0], self.old.action_head[3]
        if self.hidden.out_features != first.out_features:
            raise ValueError(f"the old column's head is {first.out_features} wide, this one's {self.hidden.out_features}: leave `hidden` as it is")
        pairs = [(self.hidden, first), (self.out, last), (self.sentence_attention, self.old.sentence_attention)]
        for own, others in pairs:
            if own is not None:
                own.load_state_dict(others.state_dict())
        for lateral in (self.from_old_looks, self.from_old_hidden):
            if lateral is not None:
                nn.init.zeros_(lateral.weight)

    def train(self, mode: bool = True) -> "ProgressiveVLA":
        """The learning column in training mode; the old one answers as ever."""
        super().train(mode)
        self.old.eval()
        return self

    def towers(self) -> list[nn.Module]:
        """The old column's; both columns read them."""
        return self.old.towers()

    @torch.no_grad()
    def encode_images(self, pixel_values):
        """As `TaskSpecificVLA.encode_images`, without a gradient."""
        return self.old.encode_images(pixel_values)

    @torch.no_grad()
    def encode_pictures(self, pixel_values):
        """As `TaskSpecificVLA.encode_pictures`, without a gradient."""
        return self.old.encode_pictures(pixel_values)

    @torch.no_grad()
    def encode_sentences(self, input_ids, attention_mask=None):
        """As `TaskSpecificVLA.encode_sentences`, without a gradient."""
        return self.old.encode_sentences(input_ids, attention_mask)

    def predict(self, pooled, patches, sentence):
        """As `TaskSpecificVLA.predict`: (B, width) normalised actions of the learning column, and where it looks."""
        with torch.no_grad():
            old_looks, _ = _looks(self.old.sentence_attention, patches, sentence)
            old_hidden = relu(self.old.action_head[0](_features(pooled, old_looks, sentence)))
        own_looks, where = _looks(self.sentence_attention, patches, sentence)
        inside = self.hidden(_features(pooled, own_looks, sentence))
        if self.from_old_looks is not None:
            inside = inside + self.from_old_looks(torch.cat(old_looks, dim=1))
        numbers = self.out(self.dropout(relu(inside))) + self.from_old_hidden(old_hidden)
        return numbers, torch.stack(where, 1) if where else sentence[:, :0]

    def forward(self, pixel_values, input_ids, attention_mask=None):
        """Pictures and sentences  ->  (B, width) normalised actions of the learning column."""
        return self.predict(*self.encode_images(pixel_values), self.encode_sentences(input_ids, attention_mask))[0]


def _looks(attention, patches, sentence):
    """What a column's attention sees in each frame, and where it looks; empty for the pooled readout."""
    found = [] if attention is None else [attention(patches[:, frame], sentence) for frame in range(patches.shape[1])]
    return [seen for seen, _ in found], [where for _, where in found]


def _features(pooled, looks, sentence):
    """What goes into a head, in the order that `TaskSpecificVLA.predict` has."""
    parts = [sentence]
    for frame in range(pooled.shape[1]):
        parts += [pooled[:, frame], *looks[frame : frame + 1]]
    return torch.cat(parts, dim=1)


def with_column(policy: WaypointPolicy, hidden: int | None = None, dropout: float = 0.1, copied: bool = False, seed: int = 0) -> WaypointPolicy:
    """A policy that answers with a second column beside `policy`'s own; `policy` is not changed.

    hidden, dropout: of its head.   copied: it begins as the old one (`begin_as_the_old_one`), not at random, from `seed`.
    `fit` trains the column as it is: what may change needs no choosing, and `set_trainable` is for a model of one column.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ProgressiveVLA(policy.model, hidden, dropout)
    if copied:
        model.begin_as_the_old_one()
    return WaypointPolicy(model.eval(), policy.processor, f"{policy.name}, progressive")


def old_column(policy: WaypointPolicy) -> WaypointPolicy:
    """The policy that a progressive one began with, for the tasks it knew.   Raises ValueError where `policy` has one column."""
    if not isinstance(policy.model, ProgressiveVLA):
        raise ValueError(f"{policy.name!r} has one column: `with_column` gives it another")
    return WaypointPolicy(policy.model.old, policy.processor, policy.name)
