import torch


def int8_weights(weight):
    """Symmetric int8 weights with a scale for each row (output channel).

    weight: (O, I) float, not all zero.
    Returns {"q": (O, I) weight / scale rounded to the nearest whole number, -127 to 127,
             "scale": (O,) the row's largest absolute weight / 127; 1 for a row of zeros,
             "error": Frobenius norm of weight - scale * q, divided by that of weight}.
    """
    ### BEGIN SOLUTION
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    q = (weight / scale).round()
    error = (weight - scale * q).norm() / weight.norm()
    return {"q": q, "scale": scale.flatten(), "error": error}
    ### END SOLUTION


def answered_by(sketches, capacity, threshold):
    """Whose encoding answers each request, from a cache where the least recently used one makes room.

    sketches: (N, 2) float, a request each; how alike two are is their Euclidean distance.
    capacity: how many encodings are kept, at least 1.   threshold: what is no further away may answer.
    Returns N numbers, counted from 0: that of the nearest kept request where it is near enough, which
    counts as use; else the request's own, which is encoded and kept. What another answered is not kept.
    """
    ### BEGIN SOLUTION
    kept, answers = [], []
    for number, sketch in enumerate(sketches):
        away = [float((sketch - sketches[other]).norm()) for other in kept]
        if kept and min(away) <= threshold:
            found = kept.pop(away.index(min(away)))
        else:
            found = number
        kept = [*kept, found][-capacity:]
        answers.append(found)
    return answers
    ### END SOLUTION


def latest(seconds, window, deadline):
    """How the last decisions were, after each one.

    seconds: (N,) float.   window: how many decisions, at least 1.   deadline: seconds.
    Returns {"p95": (N,) 95th percentile of the last `window` decisions, this one included (of all, while
             there are fewer), interpolated as torch.quantile does,
             "missed": (N,) share of the same decisions that took longer than the deadline}.
    """
    ### BEGIN SOLUTION
    p95, missed = [], []
    for end in range(1, len(seconds) + 1):
        recent = seconds[max(0, end - window):end]
        p95.append(torch.quantile(recent, 0.95))
        missed.append((recent > deadline).float().mean())
    return {"p95": torch.stack(p95), "missed": torch.stack(missed)}
    ### END SOLUTION


def page_hinkley(values, delta, threshold):
    """The Page-Hinkley test for a mean that rises.

    values: (N,) float.   delta, threshold: in the values' unit.
    Returns {"evidence": (N,) sum of value - mean so far - delta, less the least this sum has been so far
             ("so far" includes the value itself),
             "alarm": the first place, counted from 0, where the evidence is above the threshold, or -1}.
    """
    ### BEGIN SOLUTION
    mean = values.cumsum(0) / torch.arange(1, len(values) + 1)
    total = (values - mean - delta).cumsum(0)
    evidence = total - total.cummin(0).values
    above = (evidence > threshold).nonzero()
    return {"evidence": evidence, "alarm": int(above[0]) if len(above) else -1}
    ### END SOLUTION
