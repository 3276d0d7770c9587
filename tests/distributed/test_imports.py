"""One process neither waits for the imports of many, nor needs a PyTorch that has them."""

import subprocess
import sys

PROGRAM = """
import sys, torch
import vattn, vattn.models.fifo, vattn.models.laps, vattn.models.mebt, vattn.models.svitt
print([name for name in ("vattn.distributed", "torch.distributed.tensor") if name in sys.modules])
q = torch.ones(1, 1, 2, 4)
vattn.latent_attention(q, q, q)
vattn.nn.LeapAttention(4, num_heads=1, num_frames=2, leap=1)(torch.ones(2, 1, 4))
print("vattn.distributed" in sys.modules)
torch.distributed.is_available = lambda: False
try:
    import vattn.distributed
except ImportError as error:
    print(error)
"""


def test_one_process_imports_nothing_of_many():
    printed = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    names, used, refused = printed.splitlines()
    assert (names, used) == ("[]", "False")
    assert refused.startswith("vattn.distributed: PyTorch must be built with distributed support")
