"""A CPU as the platform of verl in this process. Import it before anything that asks verl for its platform."""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform

os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # the engine for CUDA runs on a CPU too

NAMES = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
MEMORY = {name: lambda: 0 for name in NAMES} | {"mem_get_info": lambda: (0, 0)}
NAME = {"get_device_name": lambda: "CPU"}


class PlatformCPU(PlatformCUDA):
    """What verl asks of a device, answered for a CPU: one device, gloo, and nothing to set or to wait for."""

    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(**vars(torch.cpu), **MEMORY, **NAME)

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass


set_platform(PlatformCPU())
