import sys; sys.path.insert(0,"/tmp/p/w7/tests"); sys.path.insert(0,"/tmp/p/w7")
import warnings; warnings.filterwarnings("ignore")
from tests import test_exercises as T
for id in sys.argv[1:]:
    f=T.fates(id); v=list(f.values())
    print(id,len(f),{k:v.count(k) for k in ("public","hidden",None)})
    for w,by in f.items():
        if by is None: print("    ",w)
