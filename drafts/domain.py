import sys
exec(open('/tmp/p/lab9/measure.py').read().split('if __name__')[0])
V={"camera":("put",Variation(camera_shift=(0.16,0.0,0.0))),"dim":("put",Variation(light=0.2)),"stack":("stack",Variation()),"forward":("forward",Variation()),"spatial":("spatial",Variation())}
for spec in sys.argv[1:]:
    name,variant,recipe=spec.split(":"); task,v=V[name]
    if time.localtime().tm_hour==17 and time.gmtime().tm_min>=29: break
    p=load_waypoint_policy(DATA/"tiny_clip_policy"); fitted="-"
    if variant!="none":
        set_trainable(p.model,variant,seed=0); r=dict(RECIPES[recipe]); r["tower_rate"]=2e-3 if variant=="lora" and recipe=="ours" else r["tower_rate"]
        if name=="camera": r["pointing"]=0.0
        c=fit(p,data(name,"train",1),data(name,"validation",1),progress=False,**r); fitted=round(c.seconds,1)
    res=R.rollout(p,task,100,variation=v,progress=False); lo,hi=res.interval
    row=dict(data=name,variant=variant,recipe=recipe,success=int(res.success.sum()),low=round(lo,3),high=round(hi,3),fit=fitted,first_cm=round(100*float(res.position_error.mean()),2))
    open('/tmp/p/lab9/domain.jsonl','a').write(json.dumps(row)+"\n"); print(row,flush=True)
