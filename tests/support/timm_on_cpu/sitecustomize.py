"""On the path of a process that imports timm beside PyTorch's CPU build.

torchvision's wheels of the package index want libraries of the CUDA build. Without them its
operators are missing, of which timm needs none, and describing those to torch fails.
"""

import sys
import types

sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
