"""Lesson 2's exercises, solved in another way than in the notebook."""

import math
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F


def log_likelihood(logits, labels):
    one_loss_a_token = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return -one_loss_a_token.sum(dim=1)


def success_matrix(objects, containers, done, colours):
    episodes = defaultdict(list)
    for object_colour, container_colour, success in zip(objects, containers, done):
        episodes[object_colour, container_colour].append(float(success))
    return [[float(np.mean(episodes[a, b])) if (a, b) in episodes else math.nan for b in colours] for a in colours]


def attention_share(attention, positions, image, target):
    shares = []
    for head in attention:
        for position in positions:
            onto_image = torch.where(image, head[position], 0.0)
            shares.append(float((onto_image / onto_image.sum())[target].sum()))
    return sum(shares) / len(shares)
