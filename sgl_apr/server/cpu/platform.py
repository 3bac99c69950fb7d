"""A plain CPU with stock torch as an SGLang platform; no kernel package, no graphs."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]  # SGLang has no types
    """Out of tree, because SGLang's own CPU platform wants a kernel package that no registry has."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "apr_cpu"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    def get_graph_runner_cls(self) -> None:
        return None
