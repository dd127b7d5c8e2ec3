import numpy as np, torch, math
from labkit.exercises import lab_deployment as L
def ok_walk(walk, cap, t):
    kept=[]
    for i,p in enumerate(walk):
        d=[math.dist(p,walk[j]) for j in kept]
        if kept and min(d)<=t:
            if d.count(min(d))>1: return None
            f=kept.pop(d.index(min(d)))
        else: f=i
        kept=[*kept,f][-cap:]
    return True
def ans(f, walk, cap, t): return [float(x) for x in f(torch.tensor(walk).float(), cap, t)]
M=[L._first_in_first_out,L._chained,L._first_that_is_close,L._threshold_excluded,L._one_more_kept,L._never_full,L._latest_makes_room,L._squared_distance]

rng=np.random.default_rng(2)
found={}
for n,cap in ((8,2),(10,3)):
    found[n]=[]
    for _ in range(5000):
        w=[tuple(map(int,x)) for x in rng.integers(0,[12,6],(n,2))]
        if not ok_walk(w,cap,5.0): continue
        a=[tuple(ans(f,w,cap,5.0)) for f in [L._served,*M]]
        if len(set(a))>=7 and len(set(a[0]))<n-1: found[n].append((w,a))
    print(n,len(found[n]), max((len(set(a)) for _,a in found[n]),default=0))
done=False
for w,a in sorted(found[8],key=lambda x:-len(set(x[1]))):
    for u,b in sorted(found[10],key=lambda x:-len(set(x[1]))):
        pairs=list(zip(a,b))
        if len(set(pairs))==9 and all(x!=a[0] or y!=b[0] for x,y in pairs[1:]):
            print(w,a[0]); print(u,b[0]); done=True; break
    if done: break
