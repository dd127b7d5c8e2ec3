"""Deployment once more: int8 row by row in numpy, the cache by times of use, percentiles by numpy, Page's recursion.

ALMOST_RIGHT: entry -> answers that are right on the usual inputs and wrong on inputs that the docstring of the entry allows, too.
"""

import math

import numpy as np
import torch


def int8_weights(weight):
    rows, scales, lost = [], [], 0.0
    for row in weight.double().numpy():
        scale = max(row.max(), -row.min()) / 127 or 1.0
        numbers = np.rint(row / scale)
        rows.append(numbers.astype(np.int8).tolist())
        scales.append(float(scale))
        lost += float(((row - scale * numbers) ** 2).sum())
    return {"q": rows, "scale": scales, "error": math.sqrt(lost / float((weight.double() ** 2).sum()))}


def answered_by(sketches, capacity, threshold):
    used, answers = {}, []
    for time, point in enumerate(sketches.tolist()):
        away = {number: math.dist(point, sketches[number].tolist()) for number in used}
        found = min(away, key=away.get, default=time)
        if away.get(found, math.inf) > threshold:
            found = time
        if found == time and len(used) == capacity:
            del used[min(used, key=used.get)]
        used[found] = time
        answers.append(found)
    return answers


def latest(seconds, window, deadline):
    times = seconds.double().numpy()
    windows = [times[max(0, end - window) : end] for end in range(1, len(times) + 1)]
    return {"p95": [float(np.percentile(w, 95)) for w in windows], "missed": [float(np.mean(w > deadline)) for w in windows]}


def page_hinkley(values, delta, threshold):
    evidence, mean, alarm = [], 0.0, -1
    for place, value in enumerate(values.tolist()):
        mean += (value - mean) / (place + 1)
        evidence.append(max(0.0, (evidence[-1] if evidence else 0.0) + value - mean - delta))
        alarm = place if alarm < 0 and evidence[-1] > threshold else alarm
    return {"evidence": evidence, "alarm": alarm}


def wider_than_one(weight):
    """Wrong where a row has one number only."""
    found = int8_weights(weight)
    return found if weight.shape[1] > 1 else {**found, "scale": [1.0] * len(weight)}


def the_first_row_is_not_zero(weight):
    """Wrong where the first row is one of zeros."""
    found = int8_weights(weight)
    return found if weight[0].any() else {**found, "scale": [math.nan, *found["scale"][1:]]}


def room_for_two_at_least(sketches, capacity, threshold):
    """Wrong where there is room for one only."""
    return answered_by(sketches, max(2, capacity), threshold)


def similar_means_different(sketches, capacity, threshold):
    """Wrong where the threshold is 0: the same picture is a hit, too."""
    return answered_by(sketches, capacity, threshold or -1.0)


def full_windows(seconds, window, deadline):
    """Wrong where there are never as many decisions as the window holds."""
    return latest(seconds, window, deadline) if len(seconds) >= window else {"p95": [math.nan] * len(seconds), "missed": [0.0] * len(seconds)}


def two_at_least(seconds, window, deadline):
    """Wrong where the window is one decision."""
    return latest(seconds, max(window, 2), deadline)


def alarm_at_the_threshold(values, delta, threshold):
    """Wrong where the evidence is the threshold to the bit."""
    found = page_hinkley(values, delta, threshold)
    return {**found, "alarm": next((i for i, e in enumerate(found["evidence"]) if e >= threshold), -1)}


def always_an_alarm(values, delta, threshold):
    """Wrong where nothing drifts."""
    found = page_hinkley(values, delta, threshold)
    return {**found, "alarm": found["alarm"] if found["alarm"] >= 0 else len(values) - 1}


def drift_to_both_sides(values, delta, threshold):
    """Wrong where decisions become quicker."""
    found = page_hinkley(values, delta, threshold)
    other = page_hinkley(-torch.as_tensor(values), delta, threshold)["alarm"]
    return {**found, "alarm": other if found["alarm"] < 0 else found["alarm"]}


def two_values_at_least(values, delta, threshold):
    """Wrong where there is one value only."""
    return page_hinkley(values, delta, threshold) if len(values) > 1 else {"evidence": [math.nan], "alarm": -1}


ALMOST_RIGHT = {
    "int8_weights": [wider_than_one, the_first_row_is_not_zero],
    "answered_by": [room_for_two_at_least, similar_means_different],
    "latest": [full_windows, two_at_least],
    "page_hinkley": [alarm_at_the_threshold, always_an_alarm, drift_to_both_sides, two_values_at_least],
}
