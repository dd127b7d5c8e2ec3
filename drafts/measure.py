"""python measure.py SPEC...  where SPEC = task:source:variant:readout:frames:recipe:seed ; appends to measured.jsonl. task 'none' etc not allowed."""
import sys, json, time, inspect, torch, numpy as np
torch.set_num_threads(1)
import labkit.rollouts as R
src = inspect.getsource(R.lock_step).replace('observations[i] = {**observation, "instruction": said}', 'observations[i] = {**observation, "instruction": said, "previous_rgb": observations[i]["rgb"]}')
assert 'previous_rgb' in src
exec(src, R.__dict__)
from labkit.demonstrations import read
from labkit.paths import DATA
from labkit.tabletop import Variation
from labkit.task_specific_vla import *
from labkit.waypoint_regression import *
RECIPES = {
 "ours": dict(epochs=20, head_rate=1e-3, tower_rate=3e-4, step_size=10, gamma=0.5, loss="l1", pointing=0.1),
 "plain": dict(epochs=20, head_rate=1e-3, tower_rate=3e-4, step_size=10, gamma=0.5, loss="l1"),
 "long": dict(epochs=60, head_rate=1e-3, tower_rate=3e-4, step_size=30, gamma=0.5, loss="l1", pointing=0.1),
 "sheet": dict(epochs=20, head_rate=1e-4, tower_rate=5e-6, step_size=10, gamma=0.9, loss="mse"),
 "sheet0": dict(epochs=20, head_rate=1e-4, tower_rate=0.0, step_size=10, gamma=0.9, loss="mse"),
 "none": dict(epochs=0),
}
OUT='/tmp/p/lab9/measured.jsonl'
DATASETS={}
def data(task, split, frames):
    if (task,split) not in DATASETS: DATASETS[task,split]=read(DATA/"demonstrations"/task, split)
    return waypoint_samples(DATASETS[task,split], frames)
def run(spec, episodes=100):
    task, source, variant, readout, frames, recipe, seed = spec.split(":"); frames=int(frames); seed=int(seed)
    if source=="towers": policy=policy_from_clip(readout=readout, frames=frames, seed=seed)
    elif source=="random":
        from labkit.clip_pretraining import Recipe, build_model, build_processor
        c=build_model(Recipe()); policy=policy_from_towers(c.vision_model,c.text_model,build_processor(),readout=readout,frames=frames,seed=seed)
    else:
        policy=load_waypoint_policy(DATA/("tiny_clip_policy" if readout=="spatial" else "tiny_clip_policy_pooled") if source=="generic" else source)
        if frames==2: policy=with_two_frames(policy)
    before={n:p.detach().clone() for n,p in policy.model.named_parameters()}
    row=dict(task=task,source=source,variant=variant,readout=readout,frames=frames,recipe=recipe,seed=seed)
    r=dict(RECIPES[recipe])
    if variant=="lora": r["tower_rate"]=2e-3
    begun=time.perf_counter()
    if r["epochs"]:
        set_trainable(policy.model, variant, seed=seed)
        c=fit(policy, data(task,"train",frames), data(task,"validation",frames), seed=seed, progress=False, **r)
        row.update(fit_seconds=round(c.seconds,1), train=round(c.train[-1],4), val=round(min(c.validation),4), best=c.best_epoch, trainable=c.trainable)
        policy.model=merged(policy.model)
        after=dict(policy.model.named_parameters())
        tw=[n for n in before if "encoder" in n]; num=sum(float((after[n].detach()-before[n]).square().sum()) for n in tw)**.5; den=sum(float(before[n].square().sum()) for n in tw)**.5
        row["towers_moved"]=num/den
    acc=action_accuracy(policy, data(task,"test",frames)); row["test_error"]={k:round(v["error"],4) for k,v in acc.items()}
    t=time.perf_counter()
    res=R.rollout(policy, task, episodes, variation=Variation(bin_yaw=0.5) if task=="align" else Variation(), progress=False)
    lo,hi=res.interval
    row.update(success=int(res.success.sum()), n=episodes, low=round(lo,3), high=round(hi,3), first_error_cm=round(100*float(res.position_error.mean()),2), ms=round(float(np.median(res.milliseconds)),1), rollout_seconds=round(time.perf_counter()-t,1))
    open(OUT,"a").write(json.dumps(row)+"\n"); print(json.dumps(row), flush=True)
if __name__=="__main__":
    done={":".join(str(r[k]) for k in ("task","source","variant","readout","frames","recipe","seed")) for r in map(json.loads, open(OUT))} if __import__("os").path.exists(OUT) else set()
    stop=time.time()+float(sys.argv[1])
    for spec in sys.argv[2:]:
        if spec in done: continue
        if time.time()>stop: print("TIME"); break
        run(spec)
