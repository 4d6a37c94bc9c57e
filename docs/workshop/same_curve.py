"""How far the curve of one run is from another's: python docs/workshop/same_curve.py runs/micro2 runs/micro4"""

import sys
from pathlib import Path

from stepladder.reporting import curves, runs

first, other = runs.read_all([Path(name) for name in sys.argv[1:]])
found = curves.between(first, other)
print(
    f"{other.name}: {found.steps} steps compared, losses at most {found.loss:.2g} apart, "
    f"gradient norms {found.grad_norm:.2g}"
)
print(f"the same curve (fp32): {'yes' if found.within() else 'no'}")
