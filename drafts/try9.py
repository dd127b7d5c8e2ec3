import torch, json, math
from labkit.exercises import lab_task_specific_vla as L
from labkit.exercises.exercise import exercises_of
from labkit.exercises.judging import AnswerKey, judge_by
from labkit.exercises.asking import answer
import re
def learning_rates(names, head_rate, tower_rate, last):
    layer = {n: re.match(r"(.*layers)\.(\d+)\.", n) for n in names}
    count = {}
    for m in layer.values():
        if m: count[m[1]] = max(count.get(m[1], 0), int(m[2]) + 1)
    rates = {n: head_rate for n in names if n.startswith("head.")}
    return rates | {n: tower_rate for n, m in layer.items() if m and int(m[2]) >= count[m[1]] - last}
def moved_wrongly(before, after, trained):
    same = [n for n in before if torch.equal(before[n], after[n])]
    return {"still": [n for n in trained if n in same], "moved": [n for n in before if n not in same and n not in trained]}
def action_scale(actions):
    std = actions.std(0, correction=0)
    return {"mean": actions.mean(0), "std": torch.where(std == 0, 1.0, std)}
def best_and_last(losses, patience):
    best, least = 0, math.inf
    for epoch, loss in enumerate(losses):
        if loss < least: best, least = epoch, loss
        if epoch - best == patience: break
    return [best, epoch]
for e in exercises_of("09_lab_task_specific_vla"):
    for hidden in (False, True):
        key = AnswerKey(e, "x"*32 if hidden else "public", hidden=hidden)
        v = judge_by(key, lambda c: answer(globals()[e.entry], c))
        print(e.id, hidden, v.status, v.sentence[:150])
    for s, f in e.misconceptions.items():
        for hidden in (False,):
            key = AnswerKey(e, "public", hidden=False)
            v = judge_by(key, lambda c: answer(f, c))
            ok = v.status != "correct" and v.sentence.startswith(s[:25].split("{")[0])
            print("   ", "ok" if ok else "XX", f.__name__, "" if ok else v.sentence[:200])
import sys; sys.path.insert(0, ".")
from tests.second_solutions import lab_task_specific_vla as S
for e in exercises_of("09_lab_task_specific_vla"):
    key = AnswerKey(e, "x"*32, hidden=True)
    print(e.id, "second", judge_by(key, lambda c: answer(getattr(S, e.entry), c)).status)
    for f in S.ALMOST_RIGHT[e.entry]:
        v = judge_by(AnswerKey(e, "public", hidden=False), lambda c: answer(f, c)); w = judge_by(key, lambda c: answer(f, c))
        print("   ", f.__name__, v.status, w.status)
